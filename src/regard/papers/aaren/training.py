"""Training of a series classifier: what the accuracy claim and `regard train aaren` share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import nll_loss

from regard.data.files import as_bytes, write_atomically
from regard.data.timeseries import SeriesSet, mean_and_deviation
from regard.papers.aaren.heads import SeriesClassifier, SeriesClassifierConfig


@dataclass(frozen=True)
class Training:
    """How a classifier is trained; the defaults are those of the accuracy claim."""

    epochs: int = 60
    """Passes over the training series."""
    batch: int = 16
    """Series in a step."""
    learning_rate: float = 1e-3
    """Of AdamW, the same in every step."""
    weight_decay: float = 0.01
    """Of AdamW."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")


class Score(NamedTuple):
    """How well a classifier does on labelled series."""

    loss: float
    """Cross entropy, in nats."""
    accuracy: float


class Epoch(NamedTuple):
    """What came of one pass over the training series."""

    loss: float
    """Mean cross entropy of the training series as they were learnt from, dropout included."""
    validation: Score | None


def make_classifier(config: SeriesClassifierConfig, train: SeriesSet, seed: int) -> SeriesClassifier:
    """A classifier with the initial weights of that seed, which takes values in the units of the training series."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SeriesClassifier(config)
    mean, deviation = mean_and_deviation(train)
    model.mean.copy_(mean)
    model.deviation.copy_(deviation)
    return model


@torch.no_grad()
def log_probabilities(model: SeriesClassifier, series: SeriesSet, batch: int = 64) -> Float[Tensor, "count classes"]:
    """The log probability of each class for each series, on the CPU."""
    was_training = model.training
    model.eval()
    parts = []
    for start in range(0, len(series), batch):
        some = series[start : start + batch]
        parts.append(
            model(some.series.to(model.mean), some.lengths.to(model.mean.device)).float().log_softmax(-1).cpu()
        )
    model.train(was_training)
    return torch.cat(parts)


def score(model: SeriesClassifier, series: SeriesSet) -> Score:
    """Loss and accuracy on labelled series."""
    assert series.labels is not None
    scores = log_probabilities(model, series)
    accuracy = (scores.argmax(-1) == series.labels).double().mean().item()
    return Score(nll_loss(scores, series.labels).item(), accuracy)


class Trainer:
    """Trains a classifier step by step; what it has done so far can be saved and taken up again exactly.

    With a validation set, `best` holds the weights of the epoch with the highest accuracy there, the lower loss
    deciding between equals.
    """

    def __init__(
        self, model: SeriesClassifier, train: SeriesSet, validation: SeriesSet | None, training: Training, seed: int
    ) -> None:
        self.model, self.train, self.validation, self.training, self.seed = model, train, validation, training, seed
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        self.step = 0
        self.losses: list[Tensor] = []
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] | None = None
        self.steps_per_epoch = -(-len(train) // training.batch)
        self.steps = self.steps_per_epoch * training.epochs

    def advance(self) -> None:
        """Takes one step; the last of an epoch also measures it."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed((self.seed << 32) + epoch)
        order = torch.randperm(len(self.train), generator=generator)
        some = self.train[order[place * self.training.batch : (place + 1) * self.training.batch]]
        assert some.labels is not None
        device = self.model.mean.device
        self.model.train()
        loss = self.model.loss(some.series.to(device), some.lengths.to(device), some.labels.to(device))
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.losses.append(loss.detach() * len(some))
        self.step += 1
        if place + 1 == self.steps_per_epoch:
            self._end_epoch()

    def _end_epoch(self) -> None:
        loss = torch.stack(self.losses).sum().item() / len(self.train)
        self.losses = []
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss of epoch {len(self.history) + 1} is not finite: learning_rate must be lower, "
                f"got {self.training.learning_rate}"
            )
        validation = None if self.validation is None else score(self.model, self.validation)
        earlier = [epoch.validation for epoch in self.history]
        self.history.append(Epoch(loss, validation))
        if validation is not None and all(_better(validation, other) for other in earlier if other is not None):
            self.best = {name: weight.detach().clone() for name, weight in self.model.state_dict().items()}

    def save(self, path: Path) -> None:
        """Writes all that the next step depends on; the file is whole or not there."""
        state = {
            "about": self._about(),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generators": _generator_states(self.model.mean.device),
            "losses": self.losses,
            "history": [(epoch.loss, *(epoch.validation or ())) for epoch in self.history],
            "best": self.best,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, as_bytes(state))

    def restore(self, path: Path) -> None:
        """Takes up the training that `save` wrote, generators included.

        Raises ValueError where the file is damaged, or is of another training.
        """
        device = self.model.mean.device
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            ours, theirs = self._about(), state["about"]
            different = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
            if not different:
                self.model.load_state_dict(state["model"])
                self.optimiser.load_state_dict(state["optimiser"])
        except Exception as error:
            raise ValueError(f"{path} is not a checkpoint of this training ({type(error).__name__})") from None
        if different:
            name = different[0]
            raise ValueError(
                f"{path} is of a training with {name} {theirs.get(name)}, got {ours.get(name)}; "
                "go on with the same, or begin in another folder"
            )
        _set_generator_states(state["generators"], device)
        self.step, self.losses = state["step"], [loss.to(device) for loss in state["losses"]]
        self.history = [Epoch(loss, Score(*rest) if rest else None) for loss, *rest in state["history"]]
        self.best = state["best"]

    def _about(self) -> dict[str, Any]:
        sets = {"training series": self.train, "validation series": self.validation}
        digests = {name: None if each is None else _digest(each) for name, each in sets.items()}
        return {**asdict(self.model.config), **asdict(self.training), "seed": self.seed, **digests}


def fit(
    model: SeriesClassifier,
    train: SeriesSet,
    training: Training,
    *,
    validation: SeriesSet | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    progress: Callable[[Iterable[int], int], Iterable[int]] = lambda steps, total: steps,
) -> list[Epoch]:
    """What came of every epoch; the model then has the best weights on `validation`, or the last without it.

    With a `checkpoint`, all is written there every so many steps, and a run that finds one goes on from it to the same
    weights as if it had never stopped. The global generators are as before afterwards.
    """
    trainer = Trainer(model, train, validation, training, seed)
    with _own_generators(model.mean.device):
        torch.manual_seed(seed)
        if checkpoint is not None and checkpoint.exists():
            trainer.restore(checkpoint)
        for _ in progress(range(trainer.step, trainer.steps), trainer.steps - trainer.step):
            trainer.advance()
            if checkpoint is not None and (trainer.step % checkpoint_every == 0 or trainer.step == trainer.steps):
                trainer.save(checkpoint)
    if trainer.best is not None:
        model.load_state_dict(trainer.best)
    model.eval()
    return trainer.history


def _better(score: Score, other: Score) -> bool:
    return (score.accuracy, -score.loss) > (other.accuracy, -other.loss)


def _digest(series: SeriesSet) -> str:
    assert series.labels is not None
    content = hashlib.sha256()
    for part in (series.series, series.lengths, series.labels):
        content.update(part.contiguous().numpy().tobytes())
    return content.hexdigest()[:8]


@contextmanager
def _own_generators(device: torch.device) -> Iterator[None]:
    before = _generator_states(device)
    try:
        yield
    finally:
        _set_generator_states(before, device)


def _generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that a step on the device draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def _set_generator_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type])
