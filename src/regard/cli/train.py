"""`regard train SLUG [STAGE]`: trains what a paper describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from regard.cli.jobs import completions_of, run_job


def main(argv: list[str]) -> int:
    """Trains, on built-in data or on files of yours."""
    return run_job("train", "Train what a paper describes, on built-in data or on files of yours.", argv)


def completions() -> dict[str, Callable[..., Any]]:
    """The papers and stages, for shell completion."""
    return completions_of("train")
