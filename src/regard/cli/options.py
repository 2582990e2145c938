"""What the verbs share: parsing options, checking what all of them check, printing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")


class UsageError(Exception):
    """A command line that cannot be carried out as it was given; its message is one sentence for the user."""


def parse(kind: Callable[..., T], argv: list[str], prog: str, description: str) -> T:
    """The options of a verb, a dataclass (or a function's result), from its words.

    Exits with 2, saying why, where they do not parse. Raises UsageError where the options refuse their values.
    """
    import tyro

    try:
        return tyro.cli(kind, args=argv, prog=prog, description=description, config=(tyro.conf.FlagCreatePairsOff,))
    except ValueError as error:
        raise UsageError(str(error)) from error


def given_for(option: str, argv: Sequence[str], default: str = "") -> str:
    """The word that the command line gives for an option which decides what other options there are."""
    value = default
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        if word == option:
            value = following
        elif word.startswith(f"{option}="):
            value = word.removeprefix(f"{option}=")
    return value


def check_device(name: str) -> str:
    """The name of a device that PyTorch can use here."""
    if name == "cpu":  # known without asking PyTorch, which takes seconds to import
        return name
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        have = ["cpu", *(kind for kind in ("cuda", "mps", "xpu") if _available(kind))]
        raise UsageError(f"--device must be one that is here ({', '.join(have)}), got {name!r}") from None
    return name


def check_folder(path: Path, option: str) -> Path:
    """The path, which is a folder or can become one."""
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise UsageError(f"{option} must be a folder, got {path}, where {part} is a file")
            break
    return path


def print_json(value: Any) -> None:
    """Prints the value as JSON, for scripts."""
    print(json.dumps(value, indent=2, allow_nan=False))


def progress() -> Progress:
    """A progress display on stderr, so that stdout can be piped."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _available(kind: str) -> bool:
    import torch

    module = getattr(torch, kind, None)
    return bool(module is not None and module.is_available())
