"""`regard show SLUG`: the card of a paper, and its evidence."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from regard import papers
from regard.cli.evidence import rows_of, table_of
from regard.cli.list import record
from regard.cli.options import parse, print_json


@dataclass(frozen=True)
class Options:
    """What `regard show` accepts."""

    slug: Positional[str]
    """The paper, as `regard list` names it."""
    json: bool = False
    """Print the record, the page and the evidence as JSON."""


def main(argv: list[str]) -> int:
    """Prints the card and the evidence."""
    options = parse(Options, argv, "regard show", "One paper: its card and its evidence.")
    paper = papers.get(options.slug)
    evidence = rows_of(paper)
    if options.json:
        print_json(record(paper) | {"page": paper.page, "evidence": evidence})
        return 0
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(highlight=False)
    console.rule(f"[bold]{paper.slug}[/]")
    links = [f"arXiv {paper.arxiv}" if paper.arxiv else "", paper.code or "", f"import {paper.module}"]
    console.print(" · ".join(filter(None, [f"{paper.date:%B %Y}", paper.venue, *links])), style="dim", markup=False)
    console.print(Markdown(paper.page))
    console.rule("evidence")
    if evidence:
        console.print(table_of(evidence))
    else:
        console.print(f"Nothing is recorded yet. regard run {paper.slug} measures its claims.")
    return 0
