"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> Path:
    """The path, which now holds the content.

    The content goes to a temporary file in the same folder, which is renamed when it is complete: an interrupted write
    or a full disk leaves what was there before, and nothing half-written. Raises OSError with the path in it.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private; a report is for others to read
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error
        raise
    return path


def as_bytes(state: Any) -> bytes:
    """What `torch.save` writes of the state, to be written with `write_atomically`."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
