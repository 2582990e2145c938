"""`regard list`: the papers, one line each."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from regard.cli.options import parse, print_json
from regard.evidence import store
from regard.paper import Paper
from regard.papers import all as all_papers


@dataclass(frozen=True)
class Options:
    """What `regard list` accepts."""

    json: bool = False
    """Print all records as JSON."""


def main(argv: list[str]) -> int:
    """Prints the papers, grouped by family."""
    options = parse(Options, argv, "regard list", "The papers of the house, with what was measured of their claims.")
    papers = all_papers()
    if options.json:
        print_json([record(paper) for paper in papers])
        return 0
    _print_table(papers)
    return 0


def record(paper: Paper) -> dict[str, Any]:
    """The paper's record as plain values: the card's front matter, and the room's import path."""
    values = {field.name: getattr(paper, field.name) for field in fields(paper) if field.name != "folder"}
    values["date"] = paper.date.isoformat()
    values["published"] = [vars(row) for row in paper.published]
    return values | {"provides": list(paper.provides), "extends": list(paper.extends)}


def _print_table(papers: list[Paper]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("paper", "year", "provides", "claims held"):
        table.add_column(name, no_wrap=name == "paper")
    table.add_column("title", ratio=1)
    families = sorted({paper.family for paper in papers})
    for family in families:
        table.add_row(Text(family.replace("_", " "), style="bold"))
        for paper in papers:
            if paper.family != family:
                continue
            provides = ", ".join(paper.provides).replace("_", " ")
            table.add_row(f"  {paper.slug}", str(paper.date.year), provides, _held(paper), Text(paper.title))
    console = Console(highlight=False)
    console.print(table)
    console.print("regard show SLUG has the page of a paper.", style="dim")


def _held(paper: Paper) -> str:
    try:
        evidence = store.read(paper)
    except store.CorruptEvidence:  # regard evidence says what is wrong; the other papers are listed
        return "unreadable"
    return f"{sum(e.holds for e in evidence)} of {len(evidence)}" if evidence else "—"
