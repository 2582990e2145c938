"""`regard eval SLUG [STAGE]`: evaluates what was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from regard.cli.jobs import completions_of, run_job


def main(argv: list[str]) -> int:
    """Measures a trained or published model."""
    return run_job("eval", "Measure a trained or published model, on built-in data or on files of yours.", argv)


def completions() -> dict[str, Callable[..., Any]]:
    """The papers and stages, for shell completion."""
    return completions_of("eval")
