"""What `regard train`, `predict` and `eval` run for Aaren: classifiers of time series of your own."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from regard.data.files import write_atomically
from regard.data.timeseries import BUNDLED, SeriesSet, bundled, hold_out, load_series
from regard.paper import Run
from regard.papers.aaren.heads import Attention, SeriesClassifier, SeriesClassifierConfig
from regard.papers.aaren.model import StackConfig
from regard.papers.aaren.training import Epoch, Training, fit, log_probabilities, make_classifier, score


@dataclass(frozen=True)
class Train:
    """Trains a classifier of time series, and keeps the weights of the epoch that was best on validation series.

    Writes the model to the folder `model`; give it to `predict` and `eval` as `--checkpoint`. A run that was
    interrupted goes on where it stopped, to the same weights.
    """

    data: str = "ItalyPowerDemand"
    """A .ts or .csv file of labelled series (docs/data-formats.md), or the name of a bundled set, whose training series
    are taken: ItalyPowerDemand, GunPoint, ArrowHead, BasicMotions, JapaneseVowels."""
    validation: Path | None = None
    """A file of labelled series to choose the best epoch by; without it, some of `data` is held out."""
    validation_share: float = 0.2
    """Share of the series of each class that is held out where there is no `validation` file."""
    attention: Attention = "aaren"
    """aaren, or transformer: the causal Transformer of the same sizes."""
    stack: StackConfig = field(default_factory=lambda: StackConfig(positions="sinusoid"))
    """The sizes of the model."""
    training: Training = field(default_factory=Training)
    """How it is trained."""
    checkpoint_every: int = 50
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share}")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}")

    def run(self, run: Run) -> Path:
        """The folder with the model."""
        train, validation = self._sets(run.seed)
        sizes: dict[str, Any] = {**vars(self.stack), "features": train.series.shape[2], "columns": train.features}
        config = SeriesClassifierConfig(**sizes, classes=train.classes, attention=self.attention)
        model = make_classifier(config, train, run.seed).to(run.device)
        history = fit(
            model,
            train,
            self.training,
            validation=validation,
            seed=run.seed,
            checkpoint=run.workdir / "training.pt",
            checkpoint_every=self.checkpoint_every,
            progress=lambda steps, total: run.progress(steps, "training", total),
        )
        run.figure("learning_curve", draw_learning(history))
        return _save(model, run.workdir / "model")

    def _sets(self, seed: int) -> tuple[SeriesSet, SeriesSet]:
        train = bundled(self.data)[0] if self.data in BUNDLED else load_series(_file(self.data))
        if train.labels is None:
            raise ValueError(f"{self.data}: the series must have labels to learn from")
        if len(train.classes) < 2:
            raise ValueError(f"{self.data}: the series must be of two classes or more, got {', '.join(train.classes)}")
        if self.validation is None:
            return hold_out(train, self.validation_share, seed)
        validation = load_series(self.validation, train.classes, train.features or None)
        _check(validation, self.validation, train.series.shape[2], labelled=True)
        return train, validation


@dataclass(frozen=True)
class Predict:
    """Applies a trained classifier to series of your own.

    Writes predictions.csv: for each series its name (in a .ts file its number, from 1), the class, and the probability
    of each class.
    """

    checkpoint: Path
    """The folder that training wrote."""
    input: Path
    """A .ts or .csv file of series, with or without labels."""
    batch: int = 64
    """Series that are read together."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")

    def run(self, run: Run) -> Path:
        """The CSV file with the predictions."""
        model = load_classifier(self.checkpoint, run.device)
        series = load_series(self.input, features=model.config.columns or None)
        _check(series, self.input, model.config.features, labelled=False)
        probability = _in_batches(model, series, self.batch, run)
        classes = model.config.classes
        path = run.workdir / "predictions.csv"
        rows: list[list[Any]] = [["series", "predicted", *(f"probability of {name}" for name in classes)]]
        for name, row in zip(series.names, probability.tolist(), strict=True):
            rows.append([name, classes[row.index(max(row))], *(f"{each:.6f}" for each in row)])
        return _write_table(path, rows)


@dataclass(frozen=True)
class Evaluate:
    """Measures a trained classifier on labelled series.

    Writes evaluation.json (accuracy, cross entropy, the recall of each class), confusion.csv (a row per true class) and
    a picture of it.
    """

    checkpoint: Path
    """The folder that training wrote."""
    data: str = "ItalyPowerDemand"
    """A .ts or .csv file of labelled series, or the name of a bundled set, whose test series are taken."""

    def run(self, run: Run) -> Path:
        """The JSON file with the measurements."""
        model = load_classifier(self.checkpoint, run.device)
        classes, columns = model.config.classes, model.config.columns or None
        if self.data in BUNDLED:
            series = bundled(self.data)[1]
            if series.classes != classes:
                raise ValueError(
                    f"{self.data} has the classes {', '.join(series.classes)}, the model {', '.join(classes)}"
                )
        else:
            series = load_series(_file(self.data), classes, columns)
        _check(series, self.data, model.config.features, labelled=True)
        assert series.labels is not None
        measured = score(model, series)
        predicted = _in_batches(model, series, 64, run).argmax(-1)
        confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
        confusion.index_put_((series.labels, predicted), torch.ones_like(predicted), accumulate=True)
        run.figure("confusion", draw_confusion(confusion, classes, measured.accuracy))
        rows = [["class", *(f"predicted {name}" for name in classes)]]
        rows += [[name, *counts] for name, counts in zip(classes, confusion.tolist(), strict=True)]
        _write_table(run.workdir / "confusion.csv", rows)
        recalls = (confusion.diagonal() / confusion.sum(1).clamp(min=1)).tolist()
        content = {"accuracy": measured.accuracy, "cross_entropy": measured.loss, "series": len(series)}
        content |= {f"recall of {name}": recall for name, recall in zip(classes, recalls, strict=True)}
        return write_atomically(run.workdir / "evaluation.json", json.dumps(content, indent=2) + "\n")


def load_classifier(folder: Path, device: str = "cpu") -> SeriesClassifier:
    """The classifier that training wrote to the folder, or to `model` in it.

    Raises FileNotFoundError where there is none, ValueError where it is another model or damaged.
    """
    places = [place for place in (folder, folder / "model") if (place / "config.json").is_file()]
    if not places:
        raise FileNotFoundError(f"{folder} holds no model that training wrote: config.json is missing")
    try:
        json.loads((places[0] / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{places[0] / 'config.json'} is damaged: {error}") from None
    return SeriesClassifier.from_pretrained(places[0], map_location=device)


def draw_learning(history: Sequence[Epoch]) -> Figure:
    """Losses and validation accuracy, epoch by epoch; a line marks the epoch whose weights were kept."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(history) + 1)
    scores = [epoch.validation for epoch in history if epoch.validation is not None]
    axes.plot(epochs, [epoch.loss for epoch in history], label="training loss")
    axes.plot(epochs, [each.loss for each in scores], label="validation loss")
    axes.set(xlabel="epoch", ylabel="cross entropy", ylim=(0, None))
    right = axes.twinx()
    right.plot(epochs, [each.accuracy for each in scores], color="tab:green", label="validation accuracy")
    right.set(ylabel="accuracy", ylim=(0, 1.02))
    best = max(range(len(scores)), key=lambda epoch: (scores[epoch].accuracy, -scores[epoch].loss))
    axes.axvline(best + 1, color="black", linewidth=0.5)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def draw_confusion(confusion: Int[Tensor, "classes classes"], classes: Sequence[str], accuracy: float) -> Figure:
    """How many series of each class were taken for each class."""
    size = 2.5 + 0.5 * len(classes)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row, counts in enumerate(confusion.tolist()):
        for column, count in enumerate(counts):
            axes.text(
                column,
                row,
                str(count),
                ha="center",
                va="center",
                color="white" if share[row, column] > 0.5 else "black",
            )
    axes.set_xticks(range(len(classes)), classes, rotation=45)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="class", title=f"accuracy {accuracy:.1%}")
    return figure


def _in_batches(model: SeriesClassifier, series: SeriesSet, batch: int, run: Run) -> Float[Tensor, "count classes"]:
    """The probability of each class for each series."""
    starts = run.progress(range(0, len(series), batch), "reading")
    return torch.cat([log_probabilities(model, series[start : start + batch]) for start in starts]).exp()


def _file(data: str) -> Path:
    path = Path(data)
    if not path.is_file() and not path.suffix:
        raise ValueError(f"data must be a .ts or .csv file, or one of {', '.join(BUNDLED)}, got {data!r}")
    return path


def _check(series: SeriesSet, source: str | Path, features: int, labelled: bool) -> None:
    if series.series.shape[2] != features:
        raise ValueError(f"{source}: the series must have {features} features, got {series.series.shape[2]}")
    if labelled and series.labels is None:
        raise ValueError(f"{source}: the series must have labels")


def _write_table(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    """The path of the CSV file, which now holds the rows."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, text.getvalue())


def _save(model: SeriesClassifier, folder: Path) -> Path:
    """The folder, which now holds the model and nothing of an earlier one."""
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    return unfinished.replace(folder)


JOBS = {"train": Train, "predict": Predict, "eval": Evaluate}
