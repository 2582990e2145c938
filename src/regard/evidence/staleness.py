"""Which code a measurement rests on, and what of it has changed since. Reads source files; imports nothing."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from regard.paper import Paper

if TYPE_CHECKING:
    from grimp import ImportGraph


def code_hashes(paper: Paper) -> dict[str, str]:
    """A hash for every module that the room's `claim.py` reaches by imports, itself included.

    Follows imports within regard and within the package that the room lives in. The hash is of the syntax tree without
    docstrings: comments, layout and documentation may change freely.
    """
    start = f"{paper.module}.claim"
    if not (paper.folder / "claim.py").exists():
        return {}
    reached = _imports(paper.module.partition(".")[0]).find_upstream_modules(start) | {start}
    return {module: digest for module in sorted(reached) if (digest := _module_hash(module)) is not None}


def stale(paper: Paper, recorded: Mapping[str, str]) -> list[str]:
    """The modules that differ from what was recorded: changed, gone, or newly reached."""
    now = code_hashes(paper)
    return sorted(module for module in recorded.keys() | now.keys() if recorded.get(module) != now.get(module))


def syntax_hash(source: str) -> str:
    """A hash of what the source does: its syntax tree without docstrings, as Python would write it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # A string that stands alone does nothing, wherever it stands: attributes are documented that way too.
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _is_text(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


@cache
def _imports(package: str) -> ImportGraph:
    import grimp

    # No cache on disk: it would be a folder in the user's working directory, and building takes a fraction of a second.
    return grimp.build_graph(*dict.fromkeys(("regard", package)), exclude_type_checking_imports=True, cache_dir=None)


@cache
def _module_hash(module: str) -> str | None:
    top, *parts = module.split(".")
    spec = find_spec(top)  # of the top package only: a deeper look would import its parents
    for location in (spec.submodule_search_locations or []) if spec else []:
        base = Path(location, *parts)
        for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
            if path.is_file():
                return syntax_hash(path.read_text(encoding="utf-8"))
    return None


def digest(content: str) -> str:
    """A short hash of a text."""
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def code_digest(*places: Path) -> str:
    """A short hash of the code in these files and folders, docstrings and comments aside."""
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*.py")))]
    return digest("".join(_hash_of(file.read_text(encoding="utf-8")) for file in files))


@cache
def _hash_of(source: str) -> str:
    """`syntax_hash`, once for each text: what rooms share is parsed once, not once per room."""
    return syntax_hash(source)
