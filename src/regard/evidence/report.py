"""Reports: one HTML file with its pictures inside, which can be sent to somebody as it is."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.data.files import write_atomically
from regard.paper import Paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.evidence.runner import Outcome

_TEMPLATE = Path(__file__).with_name("report.html")
_PNG = b"\x89PNG\r\n\x1a\n"


class Report:
    """A page that is put together part by part, then written at once.

    >>> report = Report("Three numbers").text("They were counted.").table(["name", "n"], [["a", 1], ["b", 2.5]])

    All text is escaped. A column of a table whose cells are all numbers is set flush right.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._parts: list[dict[str, Any]] = []

    def heading(self, text: str) -> Report:
        """The report, with a new section."""
        return self._add("heading", text=text)

    def text(self, text: str) -> Report:
        """The report, with a paragraph."""
        return self._add("text", text=text)

    def code(self, text: str) -> Report:
        """The report, with text to be shown as it is: a command, a document, a model's answer."""
        return self._add("code", text=text)

    def verdict(self, good: bool, text: str) -> Report:
        """The report, with a badge: green where good, else red."""
        return self._add("verdict", good=good, text=text)

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> Report:
        """The report, with a table. Numbers are shown to four significant digits.

        Raises ValueError where a row has more or fewer cells than there are headers.
        """
        cells = [list(row) for row in rows]
        for row in cells:
            if len(row) != len(headers):
                raise ValueError(f"each row of the table must have {len(headers)} cells, got {len(row)}: {row}")
        numeric = [bool(cells) and all(_is_number(row[column]) for row in cells) for column in range(len(headers))]
        shown = [[format_cell(cell) for cell in row] for row in cells]
        return self._add("table", headers=list(headers), rows=shown, numeric=numeric, caption=caption)

    def figure(self, figure: Figure | Path, caption: str = "") -> Report:
        """The report, with a picture: a matplotlib figure or a PNG file."""
        if isinstance(figure, Path):
            png = figure.read_bytes()
            if not png.startswith(_PNG):
                raise ValueError(f"{figure} must be a PNG file")
        else:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
            png = buffer.getvalue()
        return self._add("figure", png=base64.b64encode(png).decode("ascii"), caption=caption)

    def html(self) -> str:
        """The whole page."""
        from jinja2 import Environment, StrictUndefined

        from regard import __version__

        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
        footer = f"Written by regard {__version__}."
        return template.render(title=self.title, subtitle=self.subtitle, parts=self._parts, footer=footer)

    def write(self, path: Path) -> Path:
        """The path, which now holds the page, whole or not at all."""
        page = self.html()
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_atomically(path, page)

    def _add(self, kind: str, **fields: Any) -> Report:
        self._parts.append({"kind": kind, **fields})
        return self


def evidence_report(paper: Paper, outcomes: Sequence[Outcome]) -> Report:
    """What a run measured: for each claim its rule and verdict, published beside measured, every seed, the pictures."""
    held = sum(outcome.evidence.holds for outcome in outcomes)
    report = Report(paper.title, subtitle=" · ".join(filter(None, [paper.slug, paper.venue, paper.summary])))
    report.text(f"{held} of {len(outcomes)} claims held in this run.")
    report.table(
        ["claim", "published", "measured", "holds"],
        [[o.evidence.claim, o.evidence.published, _summary(o.evidence.measured), o.evidence.holds] for o in outcomes],
    )
    for outcome in outcomes:
        evidence = outcome.evidence
        report.heading(evidence.claim).text(evidence.statement)
        report.verdict(evidence.holds, "The claim holds" if evidence.holds else "The claim does not hold")
        report.table(
            ["", "value"],
            [["published", evidence.published], ["baseline", evidence.baseline], ["device", evidence.device]],
        )
        keys = list(evidence.measured)
        rows: list[list[object]] = [
            [str(result.seed), *(result.measured[key] for key in keys), result.seconds] for result in evidence.results
        ]
        if evidence.seeds > 1:
            seconds = sum(result.seconds for result in evidence.results) / evidence.seeds
            rows.append(["mean", *evidence.measured.values(), seconds])
        report.table(["seed", *keys, "seconds"], rows, caption="What was measured, seed by seed.")
        for caption, path in outcome.figures.items():
            report.figure(path, caption)
    if outcomes:
        first = outcomes[0].evidence
        report.heading("How it was measured")
        report.text(f"Measured on {first.device}, {first.recorded_at}.")
        report.table(["package", "version"], list(first.versions.items()))
        report.code(f"regard run {paper.slug}")
    return report


def format_cell(value: object) -> str:
    """The value as a table shows it: truth as yes or no, floats to four significant digits, thousands apart."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() or abs(value) >= 10_000 else f"{value:.4g}"
    return "" if value is None else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _summary(measured: dict[str, float]) -> str:
    return ", ".join(f"{key} {format_cell(value)}" for key, value in measured.items())
