"""How the authors train a Based language model: what AdamW decays, and the learning rate at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Recipe:
    """The published training recipe: next-token cross entropy under AdamW, warm-up, then a cosine.

    The paper's run has 256 sequences of 2,048 tokens in a step, bf16 autocast, and gradients clipped to norm 1.

    Source: appendix E.1 and the released training configurations.
    """

    steps: int = 20_000
    """Optimiser steps, warm-up included."""
    lr: float = 8e-4
    """The highest learning rate."""
    lr_last: float = 8e-5
    """The learning rate at the last step."""
    warmup: int = 200
    """Steps of linear warm-up."""
    lr_first: float = 1e-6
    """The learning rate at the first step."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: float = 0.1
    """On all weights but biases, norms and the embedding."""
    clip: float = 1.0
    """The norm to which gradients are clipped."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup must be in [0, steps), got warmup {self.warmup} and steps {self.steps}")

    def learning_rate(self, step: int) -> float:
        """The learning rate of that step, counted from 0."""
        if step < self.warmup:
            return self.lr_first + (self.lr - self.lr_first) * step / self.warmup
        done = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return self.lr_last + (self.lr - self.lr_last) * (1 + math.cos(math.pi * done)) / 2

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameters that are decayed and those that are not, for an optimiser."""
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for parameter in model.parameters():  # a tied weight comes once
            (kept if parameter.dim() < 2 or id(parameter) in embeddings else decayed).append(parameter)
        return [{"params": decayed, "weight_decay": self.weight_decay}, {"params": kept, "weight_decay": 0.0}]

    def optimizer(self, model: nn.Module) -> tuple[AdamW, LambdaLR]:
        """The optimiser, and the schedule to be stepped after it."""
        optimizer = AdamW(self.parameter_groups(model), lr=self.lr, betas=self.betas)
        return optimizer, LambdaLR(optimizer, lambda step: self.learning_rate(step) / self.lr)
