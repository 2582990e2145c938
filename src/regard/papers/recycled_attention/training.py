"""Continued pre-training: the last tokens of each sequence learn to read what one earlier token chose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from regard.attention.attend import attend
from regard.data.files import as_bytes, write_atomically
from regard.data.text import windows
from regard.llm.attach import AttentionFunction, attach
from regard.llm.visible import Visible
from regard.papers.recycled_attention.cache_policy import Group, highest, pooled_scores


@dataclass(frozen=True)
class ContinuedTraining:
    """How a model is trained on to read a small cache; the defaults are the paper's, of one epoch."""

    context: int = 8092
    """First tokens of a sequence, which attend as ever; the last of them chooses."""
    local: int = 50
    """Tokens after them, which attend to the chosen ones and to each other."""
    budget: int = 2048
    """Tokens that each KV head chooses."""
    kernel: int = 7
    """Neighbours whose scores are pooled before the choice; an odd number."""
    group: Group = "max"
    """What query heads that share a KV head make of their scores."""
    steps: int = 1875
    """Steps in all; the paper's 1,875 are an epoch of 120,000 sequences."""
    batch: int = 64
    """Sequences in a step."""
    learning_rate: float = 5e-6
    """Peak, after the warm-up; from there it falls linearly to 0."""
    warm_up: int = 20
    """Steps until the peak."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""

    def __post_init__(self) -> None:
        for name in ("context", "local", "budget", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd number of tokens, got {self.kernel}")
        if self.group not in ("max", "mean", "first"):
            raise ValueError(f"group must be 'max', 'mean' or 'first', got {self.group!r}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.warm_up < self.steps:
            raise ValueError(f"warm_up must be from 0 to {self.steps - 1}, below steps, got {self.warm_up}")

    def share(self, step: int) -> float:
        """The share of the peak learning rate that a step has."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        return (self.steps - step) / (self.steps - self.warm_up)


SMALL = ContinuedTraining(context=480, local=32, budget=60, steps=50, batch=2, warm_up=5)
"""What fits a model of 135M parameters: some minutes on two cores."""


def recycling(training: ContinuedTraining) -> AttentionFunction:
    """Attention under which the first `context` tokens see all before them, later ones what the last of those chose.

    The later tokens also see each other, causally. Gradients flow through what is attended to, not through the choice.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        cut = min(training.context, query.shape[2])
        read = Visible(visible.rule, 0, cut, None, visible.device)
        before = attend(query[:, :, :cut], key[:, :, :cut], value[:, :, :cut], mask=read.over(), scale=scale)
        index = seen_later(query.detach(), key.detach(), read, scale, training)
        rest = Visible(visible.rule, cut, query.shape[2] - cut, None, visible.device)
        mask = rest.at(index)
        if mask.shape[1] > 1:
            mask = mask.repeat_interleave(query.shape[1] // mask.shape[1], dim=1)
        slots = index.clamp(min=0)[..., None]
        keys = key.gather(2, slots.expand(-1, -1, -1, key.shape[-1]))
        values = value.gather(2, slots.expand(-1, -1, -1, value.shape[-1]))
        after = attend(query[:, :, cut:], keys, values, mask=mask, scale=scale)
        return torch.cat([before, after], dim=2)

    return attention


def seen_later(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    read: Visible,
    scale: float,
    training: ContinuedTraining,
) -> Int64[Tensor, "batch kv_heads seen"]:
    """The positions that the last token read chooses, and all that come after it."""
    mask = read.over()
    row = mask[..., -1:, :] if isinstance(mask, Tensor) else None
    last, earlier = query[:, :, read.seen - 1 : read.seen], key[:, :, : read.seen]
    small = highest(pooled_scores(last, earlier, row, scale, training.kernel, training.group), row, training.budget)
    later = torch.arange(read.seen, key.shape[2], device=key.device)
    return torch.cat([small, later.expand(*small.shape[:2], -1)], dim=-1)


def recycled_loss(
    model: PreTrainedModel, tokens: Int64[Tensor, "batch tokens"], training: ContinuedTraining
) -> Float[Tensor, ""]:
    """Nats per next token, over all tokens of sequences without padding.

    Raises ValueError where the sequences end before a token could read what another chose.
    """
    if tokens.shape[1] <= training.context:
        raise ValueError(f"sequences must be longer than context {training.context}, got {tokens.shape[1]} tokens")
    with attach(model, recycling(training)):
        logits = model(tokens[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@dataclass
class Trainer:
    """Trains all weights of a model step by step; what it has done can be saved and taken up again exactly."""

    model: PreTrainedModel
    training: ContinuedTraining
    step: int = 0

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=self.training.learning_rate, weight_decay=0.0)

    def advance(self, tokens: Int64[Tensor, "batch tokens"]) -> float:
        """The loss of one step, which it takes; sequences go through one by one, their gradients added up."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.training.learning_rate * self.training.share(self.step)
        self.optimiser.zero_grad()
        total = 0.0
        for sequence in tokens.to(self.model.device):
            loss = recycled_loss(self.model, sequence[None], self.training) / len(tokens)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        self.optimiser.step()
        self.step += 1
        return total

    def save(self, path: Path) -> None:
        """Writes all that the next step depends on; the file is whole or not there."""
        state = {
            "training": asdict(self.training),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, as_bytes(state))

    def restore(self, path: Path) -> None:
        """Takes up the training that `save` wrote.

        Raises ValueError where the file is damaged, or is of a training with other options or of another model.
        """
        try:
            state = torch.load(path, map_location=self.model.device, weights_only=True)
            ours, theirs, step = asdict(self.training), state["training"], int(state["step"])
        except Exception as error:
            raise ValueError(f"{path} is not a checkpoint of this training ({type(error).__name__})") from None
        different = sorted(name for name in ours if ours[name] != theirs.get(name))
        if different:
            name = different[0]
            raise ValueError(
                f"{path} was trained with {name} {theirs.get(name)}, got {ours[name]}; begin in another folder"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
        except Exception:
            raise ValueError(f"{path} is of another model than {type(self.model).__name__} here") from None
        self.step = step


def train_on(
    model: PreTrainedModel,
    tokens: Int64[Tensor, " tokens"],
    training: ContinuedTraining,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    progress: Callable[[Iterable[int], int], Iterable[int]] = lambda steps, total: steps,
) -> list[float]:
    """The loss of every step taken; the model's weights are then the trained ones.

    A step's sequences are drawn from the text by the seed and the step alone. With a `checkpoint`, the state is written
    there every so many steps, and a run that finds one goes on from it to the same weights as if it had never stopped.
    """
    trainer = Trainer(model.eval().requires_grad_(True), training)
    if checkpoint is not None and checkpoint.exists():
        trainer.restore(checkpoint)
    losses = []
    length = training.context + training.local
    for step in progress(range(trainer.step, training.steps), training.steps - trainer.step):
        generator = torch.Generator().manual_seed((seed << 32) + step)
        losses.append(trainer.advance(windows(tokens, length, training.batch, generator)))
        if checkpoint is not None and (trainer.step % checkpoint_every == 0 or trainer.step == training.steps):
            trainer.save(checkpoint)
    model.requires_grad_(False)
    return losses
