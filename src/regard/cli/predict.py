"""`regard predict SLUG [STAGE]`: applies a paper to input of yours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from regard.cli.jobs import completions_of, run_job


def main(argv: list[str]) -> int:
    """Applies a model or an analysis."""
    return run_job("predict", "Apply a model or an analysis of a paper to input of yours.", argv)


def completions() -> dict[str, Callable[..., Any]]:
    """The papers and stages, for shell completion."""
    return completions_of("predict")
