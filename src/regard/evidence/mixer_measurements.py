"""What is measured of a sequence mixer: how well it models text and recalls, what a token costs, what it remembers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import median
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.tree import tree_bytes
from regard.blocks.convolution import CausalConvolution
from regard.blocks.feedforward import SwiGLU
from regard.blocks.language_model import LanguageModel, LanguageModelConfig
from regard.blocks.sequence_mixer import SequenceMixer
from regard.data import text
from regard.data.mqar import IGNORED, mqar
from regard.evidence.timing import timed
from regard.paper import Run

Module = TypeVar("Module", bound=nn.Module)
Maker = Callable[[int], SequenceMixer]
Batch = tuple[Tensor, Tensor]
"""Tokens, and the label of each position."""

POINTS = 10
"""How many points a curve has."""


@dataclass(frozen=True)
class Training:
    """How every model of a comparison is trained."""

    steps: int
    learning_rate: float

    def fit(
        self, model: LanguageModel, batches: Iterator[Batch], measure: Callable[[], float], run: Run, description: str
    ) -> list[tuple[int, float]]:
        """`measure()` at some of the steps, the last among them, while the model is trained on the batches.

        AdamW with a tenth of the steps to warm up and a cosine to zero. Raises ValueError where a measurement is not
        finite.
        """
        matrices = [weight for weight in model.parameters() if weight.dim() > 1]
        vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self.rate)
        curve = [(0, measure())]
        for step, (tokens, labels) in enumerate(run.progress(islice(batches, self.steps), description, self.steps), 1):
            loss = _cross_entropy(model, tokens.to(run.device), labels.to(run.device))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            if step == self.steps or step * POINTS // self.steps > (step - 1) * POINTS // self.steps:
                curve.append((step, measure()))
                if not math.isfinite(curve[-1][1]):
                    raise ValueError(f"{description}: no finite number at step {step}; try a lower learning_rate")
        return curve

    def rate(self, step: int) -> float:
        """The share of the learning rate that a step has, counted from 0."""
        warmup = max(1, self.steps // 10)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


@dataclass(frozen=True)
class TextTask:
    """Next bytes of real text: what a model is trained on, and what it is measured on."""

    train: Tensor
    validation: Tensor
    """(windows, length + 1): the first stretches of the held-out end of the text."""
    batch: int

    @classmethod
    def of(cls, source: str, length: int, batch: int) -> TextTask:
        """The task on a text, which must be long enough to hold out a part of it."""
        train, held_out = text.split(text.encode(source))
        windows = min(64, (len(held_out) - 1) // length)
        if windows < 1:
            raise ValueError(f"data must hold at least {10 * length + 20} bytes for length {length}, got {len(source)}")
        places = torch.arange(windows)[:, None] * length + torch.arange(length + 1)
        return cls(train, held_out[places].long(), batch)

    def learn(self, maker: Maker, dim: int, layers: int, training: Training, run: Run, name: str) -> TextResult:
        """The curve of validation bits per byte of a language model with that mixer in every layer."""
        length = self.validation.shape[1] - 1
        model = _model(LanguageModelConfig(256, dim, f"mixer*{layers}"), maker, SwiGLU, run)
        generator = torch.Generator().manual_seed(run.seed)

        def batches() -> Iterator[Batch]:
            while True:
                window = text.windows(self.train, length, self.batch, generator)
                yield window[:, :-1], window[:, 1:]

        @torch.no_grad()
        def bits_per_byte() -> float:
            parts = self.validation.to(run.device).split(self.batch)
            nats = sum(_cross_entropy(model, part[:, :-1], part[:, 1:]).item() * len(part) for part in parts)
            return nats / len(self.validation) / math.log(2)

        start = time.perf_counter()
        curve = training.fit(model, batches(), bits_per_byte, run, f"{name}: text")
        parameters = sum(weight.numel() for weight in model.parameters())
        return TextResult(curve, parameters, time.perf_counter() - start)


@dataclass(frozen=True)
class TextResult:
    """What training on text gave."""

    curve: list[tuple[int, float]]
    parameters: int
    seconds: float


@dataclass(frozen=True)
class RecallTask:
    """Multi-query associative recall (`regard.data.mqar`), fresh sequences in every batch."""

    pairs: int
    length: int
    vocab: int
    batch: int

    def check(self) -> None:
        """Raises ValueError where the sizes do not fit one another."""
        self.draw(1, torch.Generator())

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Sequences and their labels."""
        return mqar(count, self.pairs, self.length, self.vocab, generator=generator)

    def learn(self, maker: Maker, dim: int, training: Training, run: Run, name: str) -> list[tuple[int, float]]:
        """The curve of the share of keys recalled by a short convolution and that mixer, without feed-forward nets.

        The convolution lets a value meet the key before it, which not every mixer can do by itself.
        """
        model = _model(LanguageModelConfig(self.vocab, dim, "convolution mixer"), maker, None, run)
        generator = torch.Generator().manual_seed(run.seed)
        tokens, labels = (part.to(run.device) for part in self.draw(256, generator))

        def batches() -> Iterator[Batch]:
            while True:
                yield self.draw(self.batch, generator)

        @torch.no_grad()
        def recall() -> float:
            asked = labels != IGNORED
            return (model(tokens)[0].argmax(dim=-1)[asked] == labels[asked]).float().mean().item()

        return training.fit(model, batches(), recall, run, f"{name}: recall")


@dataclass(frozen=True)
class Cost:
    """What one mixer layer costs at one length of text."""

    length: int
    forward: float
    """Seconds per token to read a text of that length at once."""
    decode: float
    """Seconds for one token after it."""
    state_bytes: int
    """Of the state after it, one sequence."""


@torch.no_grad()
def cost(maker: Maker, dim: int, length: int, run: Run, repeats: int = 3, decoded: int = 16) -> Cost:
    """What one layer of the mixer costs at that length: medians over the repeats and over the decoded tokens."""
    mixer = _seeded(run, lambda: maker(dim)).eval()
    x = torch.randn(1, length + decoded, dim, generator=torch.Generator().manual_seed(run.seed)).to(run.device)
    mixer(x[:, : min(length, 256)])  # the first call pays for what is set up once
    reading, state = [], None
    for _ in range(repeats):
        del state
        seconds, (_, state) = timed(partial(mixer, x[:, :length]), run.device)
        reading.append(seconds)
    held, decoding = tree_bytes(state), []
    for at in range(length, length + decoded):
        seconds, (_, state) = timed(partial(mixer, x[:, at : at + 1], state), run.device)
        decoding.append(seconds)
    return Cost(length, median(reading) / length, median(decoding), held)


def _model(config: LanguageModelConfig, maker: Maker, feedforward: Callable | None, run: Run) -> LanguageModel:
    """A model in which all but the mixer is the same for every mixer."""
    mixers: dict[str, Maker] = {"mixer": maker, "convolution": lambda dim: CausalConvolution(dim, 3)}
    return _seeded(run, lambda: LanguageModel(config, mixers, feedforward=feedforward))


def _seeded(run: Run, make: Callable[[], Module]) -> Module:
    """The module, its weights drawn by the run's seed; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return make().to(run.device)


def _cross_entropy(model: LanguageModel, tokens: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy, in nats, over the positions that have a label."""
    logits, _ = model(tokens)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
