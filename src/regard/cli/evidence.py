"""`regard evidence`: what was recorded, and which code has changed since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from regard import papers
from regard.cli.options import parse, print_json
from regard.evidence import store
from regard.evidence.report import format_cell
from regard.evidence.staleness import stale
from regard.paper import Paper

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Options:
    """What `regard evidence` accepts."""

    slugs: Positional[tuple[str, ...]] = ()
    """The papers to show; all of them where none is named."""
    json: bool = False
    """Print a list of objects: slug, claim, holds, measured, seeds, recorded_at, stale."""


def main(argv: list[str]) -> int:
    """Prints the evidence of every paper, or of those named."""
    options = parse(Options, argv, "regard evidence", "What was recorded, and which code has changed since.")
    chosen = [papers.get(slug) for slug in options.slugs] or papers.all()
    rows = [row for paper in chosen for row in rows_of(paper)]
    if options.json:
        print_json(rows)
        return 0
    from rich.console import Console

    console = Console(highlight=False)
    if not rows:
        console.print("Nothing is recorded yet. regard run SLUG --record measures a paper's claims and records them.")
        return 0
    console.print(table_of(rows))
    changed = sorted({(row["slug"], module) for row in rows for module in row["stale"]})
    if changed:
        console.print("Changed since it was recorded (regard run SLUG --record measures again):")
        for slug, module in changed:
            console.print(f"  {slug}: {module}")
    return 0


def rows_of(paper: Paper) -> list[dict[str, Any]]:
    """The recorded evidence of the paper as scripts get it; `stale` lists the modules that have changed since."""
    return [
        {
            "slug": paper.slug,
            "claim": evidence.claim,
            "holds": evidence.holds,
            "measured": evidence.measured,
            "seeds": evidence.seeds,
            "recorded_at": evidence.recorded_at,
            "stale": stale(paper, evidence.code),
        }
        for evidence in store.read(paper)
    ]


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("paper", "claim", "holds", "measured (mean)", "seeds", "recorded", "code"):
        table.add_column(name, overflow="fold", no_wrap=name == "paper")
    for row in rows:
        measured = "\n".join(f"{key} {format_cell(value)}" for key, value in row["measured"].items())
        holds = Text("yes", "green") if row["holds"] else Text("no", "red")
        code = f"{len(row['stale'])} changed" if row["stale"] else "unchanged"
        table.add_row(
            row["slug"], Text(row["claim"]), holds, Text(measured), str(row["seeds"]), row["recorded_at"][:10], code
        )
    return table
