"""`regard run SLUG`: measures a paper's claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from regard import papers
from regard.cli.options import UsageError, check_device, check_folder, parse, print_json, progress
from regard.evidence import store
from regard.evidence.report import evidence_report, format_cell
from regard.evidence.runner import Outcome, UnknownClaim, choose, run_claims


@dataclass(frozen=True)
class Options:
    """What `regard run` accepts."""

    slug: Positional[str]
    """The paper, as `regard list` names it."""
    only: tuple[str, ...] = ()
    """Names of claims to measure; all of them where none is named."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: as the claim says)")] = None
    """How many seeds to measure."""
    record: bool = False
    """Keep what is measured in the room's evidence.json."""
    workdir: Path = Path("runs")
    """The folder below which results, pictures and the report go; a run that was stopped continues from there."""
    device: str = "cpu"
    """The PyTorch device to measure on."""
    json: bool = False
    """Print what was measured as JSON."""


def main(argv: list[str]) -> int:
    """Measures, prints published beside measured, and writes the report. A claim that does not hold is no failure."""
    options = parse(Options, argv, "regard run", "Measure a paper's claims; a run that was stopped continues.")
    paper = papers.get(options.slug)
    if options.seeds is not None and options.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {options.seeds}")
    check_folder(options.workdir, "--workdir")
    try:
        choose(paper, options.only)
    except UnknownClaim as error:
        raise UsageError(str(error)) from None
    check_device(options.device)
    if options.record:
        store.read(paper)  # a file that cannot be read is said before hours of measuring
    try:
        with progress() as display:
            outcomes = run_claims(
                paper, options.workdir, options.only, options.seeds, device=options.device, display=display
            )
    except KeyboardInterrupt:
        kept = options.workdir / paper.slug
        raise KeyboardInterrupt(
            f"interrupted; what was measured is kept in {kept}, and the same command continues with what is missing"
        ) from None
    report = evidence_report(paper, outcomes).write(options.workdir / paper.slug / "report.html")
    if options.record:
        store.write(paper, [outcome.evidence for outcome in outcomes], claims=[c.name for c in paper.claims()])
    if options.json:
        print_json([_as_json(paper.slug, outcome, report) for outcome in outcomes])
    else:
        _print(outcomes, report)
    return 0


def _as_json(slug: str, outcome: Outcome, report: Path) -> dict[str, Any]:
    evidence = asdict(outcome.evidence)
    results = evidence.pop("results")
    measured = outcome.evidence.measured
    return {"slug": slug, **evidence, "measured": measured, "seeds": results, "report": str(report)}


def _print(outcomes: Sequence[Outcome], report: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    for name in ("claim", "published", "measured (mean)", "seeds", "holds"):
        table.add_column(name, overflow="fold")
    for outcome in outcomes:
        evidence = outcome.evidence
        measured = "\n".join(f"{key} {format_cell(value)}" for key, value in evidence.measured.items())
        holds = Text("yes", "green") if evidence.holds else Text("no", "red")
        table.add_row(Text(evidence.claim), Text(evidence.published), Text(measured), str(evidence.seeds), holds)
    console = Console(highlight=False)
    console.print(table)
    for outcome in outcomes:
        console.print(Text.assemble((outcome.evidence.claim, "bold"), ": ", outcome.evidence.statement))
    console.print(f"Report: {report}", markup=False, soft_wrap=True)
