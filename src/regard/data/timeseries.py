"""Labelled time series: real sets that ship inside sktime, and users' own `.ts` and CSV files."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["BUNDLED", "SeriesSet", "bundled", "hold_out", "load_series", "mean_and_deviation", "standardise"]

BUNDLED = ("ItalyPowerDemand", "GunPoint", "ArrowHead", "BasicMotions", "JapaneseVowels")
"""Sets of the UCR and UEA archives whose files ship inside the sktime package."""


@dataclass(frozen=True)
class SeriesSet:
    """Time series of any lengths, padded with zeros behind their ends."""

    series: Float[Tensor, "count time features"]
    lengths: Int[Tensor, "count"]
    labels: Int[Tensor, "count"] | None
    """The class of each series, an index into `classes`; None where the file has no labels."""
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    """The name of each series: what a CSV file calls it, its number from 1 in a `.ts` file."""
    features: tuple[str, ...] = ()
    """The columns of a CSV file in the order of `series`; a `.ts` file has no names for them."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Int[Tensor, "chosen"] | slice) -> "SeriesSet":
        """The chosen series, padded to the longest of them."""
        chosen = torch.arange(len(self))[index]
        lengths = self.lengths[chosen]
        longest = int(lengths.max()) if len(chosen) else 0
        return replace(
            self,
            series=self.series[chosen, :longest],
            lengths=lengths,
            labels=None if self.labels is None else self.labels[chosen],
            names=tuple(self.names[each] for each in chosen.tolist()) if self.names else (),
        )

    @property
    def mask(self) -> Bool[Tensor, "count time"]:
        """True on the values, False on the padding."""
        return torch.arange(self.series.shape[1]) < self.lengths[:, None]


def bundled(name: str) -> tuple[SeriesSet, SeriesSet]:
    """The training and the test set of that name, split as shipped, values as in the archive.

    Raises ValueError where the name is not in `BUNDLED`, ModuleNotFoundError where sktime is not installed.
    """
    if name not in BUNDLED:
        raise ValueError(f"the series set must be one of {', '.join(BUNDLED)}, got {name!r}")
    spec = find_spec("sktime")  # finds the folder without the seconds that importing it takes
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the bundled series sets are inside sktime: pip install 'regard[data]'")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name
    train = load_series(folder / f"{name}_TRAIN.ts")
    return train, load_series(folder / f"{name}_TEST.ts", classes=train.classes)


def hold_out(series: SeriesSet, share: float, seed: int = 0) -> tuple[SeriesSet, SeriesSet]:
    """The set without that share of the series of each class, and the series held out, drawn by the seed.

    At least one series of a class stays, and one of every class with two or more is held out.

    Raises ValueError where the set has no labels, the share is not between 0 and 1, or no class has two series.
    """
    if series.labels is None:
        raise ValueError("series must have labels to be held out by class")
    if not 0 < share < 1:
        raise ValueError(f"the share of series to hold out must be between 0 and 1, got {share}")
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(series), dtype=torch.bool)
    for label in range(len(series.classes)):
        members = (series.labels == label).nonzero().squeeze(1)
        count = min(max(round(len(members) * share), 1), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[: max(count, 0)]]] = True
    if not held.any():
        raise ValueError("no class has two series, so that none can be held out")
    return series[(~held).nonzero().squeeze(1)], series[held.nonzero().squeeze(1)]


def mean_and_deviation(train: SeriesSet) -> tuple[Float[Tensor, "features"], Float[Tensor, "features"]]:
    """Each feature's mean and standard deviation over all values of the set; 1 for the deviation of a constant."""
    values = train.series[train.mask].double()
    deviation = values.std(0, correction=0)
    varies = deviation > 1e-7 * values.abs().amax(0)  # more than what rounding makes of a constant
    return values.mean(0).float(), torch.where(varies, deviation, 1.0).float()


def standardise(train: SeriesSet, *others: SeriesSet) -> tuple[SeriesSet, ...]:
    """The sets with each feature at mean 0 and deviation 1 over the training set (z-normalised)."""
    mean, deviation = mean_and_deviation(train)
    return tuple(
        replace(each, series=(each.series - mean) / deviation * each.mask[..., None]) for each in (train, *others)
    )


def load_series(path: Path, classes: Sequence[str] | None = None, features: Sequence[str] | None = None) -> SeriesSet:
    """The series of a `.ts` file (sktime, aeon) or of a `.csv` file.

    CSV: a header; the column `series` names the series that a row belongs to, its rows in order of time; the column
    `label`, which may be missing or blank, holds its class; every other column is a feature. `classes` fixes the order
    of the classes; without it, that of the `.ts` header or the alphabet's. `features` picks the columns of a CSV file,
    and their order.

    Raises ValueError, naming file and line, where the file is not like that, holds a value that is no finite number,
    lacks a feature, or has a label that is not among the classes; FileNotFoundError where there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no series file {path}")
    if path.suffix.lower() not in (".ts", ".csv"):
        raise ValueError(f"{path}: series must be in a .ts or .csv file, got {path.suffix or 'no ending'!r}")
    content = _read_ts(path) if path.suffix.lower() == ".ts" else _read_csv(path, features)
    rows, labels = content.rows, content.labels
    if not rows:
        raise ValueError(f"{path}: the file holds no series")
    widths = sorted({row.shape[1] for row in rows})
    if len(widths) > 1:
        raise ValueError(f"{path}: every series must have the same features, got {widths[0]} and {widths[1]}")
    known, index = tuple(classes or content.declared), None
    if labels is not None:
        known = known or tuple(sorted(set(labels)))
        unknown = sorted(set(labels) - set(known))
        if unknown:
            raise ValueError(f"{path}: labels must be out of {', '.join(known)}, got {unknown[0]!r}")
        index = torch.tensor([known.index(label) for label in labels])
    lengths = torch.tensor([len(row) for row in rows])
    return SeriesSet(
        pad_sequence(rows, batch_first=True), lengths, index, known, tuple(content.names), tuple(content.features)
    )


class _Content(NamedTuple):
    """What a file holds."""

    rows: list[Tensor]
    """Each series, (time, features)."""
    labels: list[str] | None
    declared: Sequence[str]
    """The classes that the file's header names."""
    names: Sequence[str]
    features: Sequence[str]


def _read_ts(path: Path) -> _Content:
    header: dict[str, list[str]] = {}
    rows: list[Tensor] = []
    labels: list[str] = []
    lines = _lines(path)
    for line, text in lines:
        if not text.startswith("@"):
            raise ValueError(f"{path}, line {line}: a line before @data must begin with @ or #, got {text[:30]!r}")
        key, *words = text[1:].split() or [""]
        header[key.lower()] = words
        if key.lower() == "data":
            break
    else:
        raise ValueError(f"{path}: a .ts file must have a line @data")
    for key, meaning in (("timestamps", "series with time stamps"), ("targetlabel", "numbers as labels")):
        if (header.get(key) or ["false"])[0].lower() == "true":
            raise ValueError(f"{path}: {meaning} are not supported, @{key} must be false")
    labelled, *declared = header.get("classlabel") or ["false"]
    has_labels = labelled.lower() == "true"
    for line, text in lines:
        dimensions = text.split(":")
        if has_labels:
            labels.append(dimensions.pop().strip())
            if not dimensions:
                raise ValueError(f"{path}, line {line}: a series must end in a colon and its label, got {text[:30]!r}")
        values = [_numbers(dimension.split(","), path, line) for dimension in dimensions]
        if len({len(dimension) for dimension in values}) != 1:
            lengths = ", ".join(str(len(dimension)) for dimension in values)
            raise ValueError(f"{path}, line {line}: all features of a series must be equally long, got {lengths}")
        rows.append(torch.tensor(values).T)
    names = [str(number) for number in range(1, len(rows) + 1)]
    return _Content(rows, labels if has_labels else None, declared, names, ())


def _read_csv(path: Path, wanted: Sequence[str] | None) -> _Content:
    rows: dict[str, list[list[float]]] = {}
    labels: dict[str, str] = {}
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        try:
            columns = [column.strip() for column in next(reader, [])]
            features = _features(path, columns, wanted)
            series_at, label_at = columns.index("series"), columns.index("label") if "label" in columns else None
            places = [columns.index(feature) for feature in features]
            for row in reader:
                if not row:
                    continue
                line = reader.line_num
                if len(row) != len(columns):
                    raise ValueError(f"{path}, line {line}: a row must have {len(columns)} values, got {len(row)}")
                name = row[series_at]
                rows.setdefault(name, []).append(_numbers([row[place] for place in places], path, line, features))
                label = "" if label_at is None else row[label_at].strip()
                if labels.setdefault(name, label) != label:
                    raise ValueError(
                        f"{path}, line {line}: series {name!r} must have one label, got {labels[name]!r} and {label!r}"
                    )
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not a row of CSV: {error}") from None
    unlabelled = [name for name, label in labels.items() if not label]
    if unlabelled and len(unlabelled) < len(labels):
        raise ValueError(f"{path}: every series must have a label or none of them, got none for {unlabelled[0]!r}")
    return _Content(
        rows=[torch.tensor(values) for values in rows.values()],
        labels=None if unlabelled else [labels[name] for name in rows],
        declared=(),
        names=list(rows),
        features=features,
    )


def _features(path: Path, columns: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The columns that are features: those wanted, or all but `series` and `label`."""
    if not columns:
        raise ValueError(f"{path}: the file is empty")
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise ValueError(f"{path}: every column must have a name of its own, got {twice[0]!r} more than once")
    features = [column for column in columns if column not in ("series", "label")] if wanted is None else list(wanted)
    for needed in ("series", *features):
        if needed not in columns:
            raise ValueError(f"{path}: the column {needed!r} is missing, the columns are {', '.join(columns)}")
    if not features:
        raise ValueError(f"{path}: a column with values is missing, the columns are {', '.join(columns)}")
    return features


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are neither empty nor comments, with their numbers."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and not line.startswith("#"):
                yield number, line.strip()


def _numbers(words: Sequence[str], path: Path, line: int, columns: Sequence[str] = ()) -> list[float]:
    try:
        numbers = list(map(float, words))
    except ValueError:
        numbers = [math.nan]
    if all(abs(number) <= _LARGEST for number in numbers):  # which NaN is not
        return numbers
    place, word = next((place, word) for place, word in enumerate(words) if not _is_number(word))
    where = f", column {columns[place]!r}" if columns else ""
    raise ValueError(f"{path}, line {line}{where}: a value must be a finite number, got {word.strip()!r}")


def _is_number(word: str) -> bool:
    try:
        return abs(float(word)) <= _LARGEST
    except ValueError:
        return False


_LARGEST = torch.finfo(torch.float32).max
