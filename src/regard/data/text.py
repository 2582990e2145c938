"""Text to train and measure language models on: what every Python carries, or a user's own files."""

import json
import sysconfig
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

SUFFIXES = (".txt", ".md", ".jsonl")
"""The files that `read_texts` reads."""


@cache
def python_reference() -> str:
    """The Python language reference as the interpreter's `help()` carries it: half a megabyte of technical English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@cache
def standard_library() -> str:
    """The sources of Python's standard library, its tests left out, in the order of their paths: ten megabytes."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    return "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


def read_texts(path: str | Path) -> str:
    """The texts of a file or of a folder's files, in the order of their paths, with a blank line between two.

    Reads `.txt` and `.md` as they are, and `.jsonl` with one object a line whose `text` is a string. Raises
    FileNotFoundError where nothing is there to read, and ValueError that names file and line where a text is broken.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    texts = [text for file in files for text in _texts_of(file) if text.strip()]
    if not texts:
        raise FileNotFoundError(f"no text in {path}; a folder should hold files that end in {', '.join(SUFFIXES)}")
    return "\n\n".join(texts)


def _texts_of(path: Path) -> list[str]:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text; byte {error.start} is not") from None
    if path.suffix != ".jsonl":
        return [content]
    return [_text_of(line, f"{path}, line {n}") for n, line in enumerate(content.split("\n"), 1) if line.strip()]


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f"{where}: must be an object with a string under 'text', got {line[:60]}")
    return row["text"]


def encode(text: str) -> UInt8[Tensor, "bytes"]:
    """The bytes of the text in UTF-8: a vocabulary of 256 that fits any language."""
    return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8) if text else torch.empty(0).byte()


def decode(tokens: Tensor) -> str:
    """The text of byte tokens; bytes that are no UTF-8 come out as the replacement character."""
    return bytes(tokens.flatten().tolist()).decode("utf-8", errors="replace")


def split(tokens: Tensor, held_out: float = 0.1) -> tuple[Tensor, Tensor]:
    """The first part of the tokens to train on, and the last `held_out` of them to validate on."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
    cut = round(len(tokens) * (1 - held_out))
    return tokens[:cut], tokens[cut:]


def windows(
    tokens: Tensor, length: int, batch: int, generator: torch.Generator | None = None
) -> Int64[Tensor, "batch window"]:
    """A batch of windows from random places, each of `length` inputs and one token more, the last target.

    Raises ValueError where the tokens are too few for one window.
    """
    if length < 1 or batch < 1:
        raise ValueError(f"length and batch must be at least 1, got length {length} and batch {batch}")
    if len(tokens) <= length:
        raise ValueError(f"the text must be longer than length {length}, got {len(tokens)} tokens")
    starts = torch.randint(len(tokens) - length, (batch, 1), generator=generator)
    return tokens[starts + torch.arange(length + 1)].long()
