"""Shell completion: one parser of all verbs, from which tyro writes the script."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from regard.cli.main import VERBS


def main(argv: list[str]) -> int:
    """Writes the completion script that `--tyro-write-completion SHELL FILE` asks for."""
    import tyro

    verbs: dict[str, Callable[..., Any]] = {}
    for verb in VERBS:
        module = import_module(f"regard.cli.{verb}")
        options = module.completions() if hasattr(module, "completions") else {"": module.Options}
        verbs |= {f"{verb} {name}".strip(): kind for name, kind in options.items()}
    tyro.extras.subcommand_cli_from_dict(verbs, prog="regard", args=argv)
    return 0
