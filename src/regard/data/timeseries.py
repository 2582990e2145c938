"""Labelled time series: real sets that ship inside sktime, and users' own `.ts` and CSV files."""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["BUNDLED", "SeriesSet", "bundled", "load_series", "mean_and_deviation", "standardise"]

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

    def __len__(self) -> int:
        return len(self.lengths)

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


def mean_and_deviation(train: SeriesSet) -> tuple[Float[Tensor, "features"], Float[Tensor, "features"]]:
    """Each feature's mean and standard deviation over all values of the set; 1 for the deviation of a constant."""
    values = train.series[train.mask]
    deviation = values.std(0, correction=0)
    return values.mean(0), torch.where(deviation > 0, deviation, 1.0)


def standardise(train: SeriesSet, *others: SeriesSet) -> tuple[SeriesSet, ...]:
    """The sets with each feature at mean 0 and deviation 1 over the training set (z-normalised)."""
    mean, deviation = mean_and_deviation(train)
    return tuple(
        replace(each, series=(each.series - mean) / deviation * each.mask[..., None]) for each in (train, *others)
    )


def load_series(path: Path, classes: Sequence[str] | None = None) -> SeriesSet:
    """The series of a `.ts` file (sktime, aeon) or of a `.csv` file.

    CSV: a header; the column `series` names the series that a row belongs to, its rows in order of time; the column
    `label`, which may be missing, holds its class; every other column is a feature. `classes` fixes the order of the
    classes; without it, that of the `.ts` header or the alphabet's.

    Raises ValueError, naming file and line, where the file is not like that, holds a value that is no finite number,
    or a label that is not among the classes; FileNotFoundError where there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no series file {path}")
    readers = {".ts": _read_ts, ".csv": _read_csv}
    if path.suffix not in readers:
        raise ValueError(f"{path}: series must be in a .ts or .csv file, got {path.suffix or 'no ending'!r}")
    rows, labels, declared = readers[path.suffix](path)
    if not rows:
        raise ValueError(f"{path}: the file holds no series")
    widths = sorted({row.shape[1] for row in rows})
    if len(widths) > 1:
        raise ValueError(f"{path}: every series must have the same features, got {widths[0]} and {widths[1]}")
    lengths = torch.tensor([len(row) for row in rows])
    padded = pad_sequence(rows, batch_first=True)
    if labels is None:
        return SeriesSet(padded, lengths, None, tuple(classes or declared))
    names = tuple(classes or declared or sorted(set(labels)))
    unknown = sorted(set(labels) - set(names))
    if unknown:
        raise ValueError(f"{path}: labels must be out of {', '.join(names)}, got {unknown[0]!r}")
    return SeriesSet(padded, lengths, torch.tensor([names.index(label) for label in labels]), names)


Rows = tuple[list[Tensor], list[str] | None, Sequence[str]]
"""The series (time, features), their labels if they have any, and the classes that the file declares."""


def _read_ts(path: Path) -> Rows:
    header: dict[str, list[str]] = {}
    rows: list[Tensor] = []
    labels: list[str] = []
    lines = _lines(path)
    for line, text in lines:
        if not text.startswith("@"):
            raise ValueError(f"{path}, line {line}: a line before @data must begin with @ or #, got {text[:30]!r}")
        key, *words = text[1:].split()
        header[key.lower()] = words
        if key.lower() == "data":
            break
    else:
        raise ValueError(f"{path}: a .ts file must have a line @data")
    if header.get("timestamps", ["false"])[0].lower() == "true":
        raise ValueError(f"{path}: series with time stamps are not supported, @timeStamps must be false")
    labelled, *declared = header.get("classlabel") or ["false"]
    has_labels = labelled.lower() == "true"
    for line, text in lines:
        dimensions = text.split(":")
        if has_labels:
            labels.append(dimensions.pop().strip())
        values = [_numbers(dimension.split(","), path, line) for dimension in dimensions]
        if not values or len({len(dimension) for dimension in values}) != 1:
            lengths = ", ".join(str(len(dimension)) for dimension in values) or "none"
            raise ValueError(f"{path}, line {line}: all features of a series must be equally long, got {lengths}")
        rows.append(torch.tensor(values).T)
    return rows, labels if has_labels else None, declared


def _read_csv(path: Path) -> Rows:
    rows: dict[str, list[list[float]]] = {}
    labels: dict[str, str] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        features = [column for column in columns if column not in ("series", "label")]
        if "series" not in columns or not features:
            given = ", ".join(columns) or "none"
            raise ValueError(f"{path}: the columns must be series, label (optional) and features, got {given}")
        for row in reader:
            line = reader.line_num
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {line}: a row must have {len(columns)} values like the header")
            name = row["series"]
            rows.setdefault(name, []).append(_numbers([row[feature] for feature in features], path, line))
            if "label" in columns and labels.setdefault(name, row["label"]) != row["label"]:
                raise ValueError(
                    f"{path}, line {line}: series {name!r} must have one label, "
                    f"got {labels[name]!r} and {row['label']!r}"
                )
    return _tensors(rows), [labels[name] for name in rows] if "label" in columns else None, ()


def _tensors(rows: Mapping[str, list[list[float]]]) -> list[Tensor]:
    return [torch.tensor(values) for values in rows.values()]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are neither empty nor comments, with their numbers."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and not line.startswith("#"):
                yield number, line.strip()


def _numbers(words: Sequence[str], path: Path, line: int) -> list[float]:
    numbers = []
    for word in words:
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{path}, line {line}: a value must be a finite number, got {word.strip()!r}")
        numbers.append(number)
    return numbers
