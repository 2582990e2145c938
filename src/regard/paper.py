"""The vocabulary of the house: what a paper, a claim, a job and a run are. Imports no torch."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args, runtime_checkable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.progress import Progress

T = TypeVar("T")

Provides = Literal["mixer", "model", "cache_policy", "analysis", "training", "benchmark"]


@dataclass(frozen=True)
class Published:
    """One row of the paper's own results, as its authors state it."""

    claim: str
    figure: str
    data: str


@dataclass(frozen=True)
class Paper:
    """The record of one paper: the front matter of its room's `card.md`, and where the room is."""

    slug: str
    title: str
    date: datetime.date
    authors: int
    arxiv: str | None
    venue: str
    code: str | None
    license: str | None
    family: str
    provides: tuple[Provides, ...]
    summary: str
    published: tuple[Published, ...]
    extends: tuple[str, ...]
    module: str
    """The room's import path, `regard.papers.<slug>` for our own."""
    folder: Path
    """The room's folder, which holds `card.md` and `evidence.json`."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.provides) - set(get_args(Provides)))
        if unknown:
            known = ", ".join(get_args(Provides))
            raise ValueError(f"{self.slug}: provides must be out of {known}, got {unknown[0]!r}")

    @property
    def page(self) -> str:
        """What a user reads: the card without its front matter, in Markdown."""
        return (self.folder / "card.md").read_text(encoding="utf-8").split("---\n", 2)[2].strip()

    def part(self, name: str) -> Any | None:
        """The room's module of that name (`claim`, `jobs` ...), or None where the room has none."""
        if find_spec(f"{self.module}.{name}") is None:
            return None
        return import_module(f"{self.module}.{name}")

    def claims(self) -> Sequence[Claim]:
        """What `regard run` measures. Imports the room."""
        part = self.part("claim")
        return [] if part is None else part.CLAIMS

    def jobs(self) -> Mapping[str, type[Job]]:
        """What `regard train`, `eval` and `predict` run, by verb and stage. Imports the room."""
        part = self.part("jobs")
        return {} if part is None else part.JOBS

    def examples(self) -> Mapping[str, Callable[[], Any]]:
        """Makers of tiny instances of the room's public classes. Imports the room."""
        return getattr(import_module(self.module), "EXAMPLES", {})


@dataclass
class Run:
    """What a claim or a job may ask of its surroundings."""

    seed: int
    workdir: Path
    device: str = "cpu"
    display: Progress | None = None
    """The progress display to draw in; None draws nothing."""
    shared: dict[str, Any] = field(default_factory=dict, repr=False)

    def progress(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """The items, one by one, while a bar shows how far they are."""
        if self.display is None:
            yield from items
            return
        if total is None and isinstance(items, Sized):
            total = len(items)
        task = self.display.add_task(description, total=total)
        try:
            for item in items:
                yield item
                self.display.advance(task)
        finally:
            self.display.remove_task(task)

    def figure(self, name: str, figure: Figure) -> Path:
        """The file that the picture was saved to; the report shows it under its name."""
        folder = self.workdir / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        return path

    def once(self, key: str, make: Callable[[], T]) -> T:
        """The value that `make` gave for this key first: training that several claims of one seed share."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


@dataclass(frozen=True)
class Claim:
    """A statement that can fail, and how it is measured."""

    name: str
    statement: str
    """The rule in words, numbers included: written before it is measured."""
    published: str
    """What the authors report, and on what."""
    baseline: str
    measure: Callable[[Run], dict[str, float]]
    """One seed's measurements."""
    holds: Callable[[list[dict[str, float]]], bool]
    """The rule, over the measurements of all seeds."""
    seeds: int = 3
    minutes: float = 5.0
    """Rough cost of one seed on two cores."""


@runtime_checkable
class Job(Protocol):
    """A frozen dataclass tree whose fields are the command line and the `--config` file."""

    def run(self, run: Run) -> Path:
        """The folder or file that the job made."""
        ...
