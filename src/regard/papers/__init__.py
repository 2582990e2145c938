"""The registry: every room of the house, and every room that another package offers by entry point.

A room is a package with a `card.md` beside its `__init__.py`. Ours are the sub-packages of this one; another package
offers rooms through the entry point group `regard.papers` (name: the slug, value: the room's import path).
Nothing here imports a room, so listing them costs a few file reads.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from regard.paper import Paper, Published

__all__ = ["UnknownPaper", "all", "get"]

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class UnknownPaper(LookupError):
    """No room has that slug."""


@cache
def _rooms() -> dict[str, Paper]:
    here = Path(__file__).parent
    rooms = {card.parent.name: (f"{__name__}.{card.parent.name}", card.parent) for card in here.glob("*/card.md")}
    for entry in entry_points(group="regard.papers"):
        spec = find_spec(entry.value)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"the entry point {entry.name} = {entry.value} in regard.papers is not a package")
        rooms[entry.name] = (entry.value, Path(spec.submodule_search_locations[0]))
    return {slug: read_card(slug, module, folder) for slug, (module, folder) in sorted(rooms.items())}


def read_card(slug: str, module: str, folder: Path) -> Paper:
    """The record in the front matter of a room's `card.md`.

    Raises ValueError, naming the file and the field, where the front matter is not as documented.
    """
    path = folder / "card.md"
    parts = path.read_text(encoding="utf-8").split("---\n", 2)
    if len(parts) != 3 or parts[0]:
        raise ValueError(f"{path}: the card must begin with front matter between two lines '---'")
    try:
        front = yaml.load(parts[1], Loader=_Loader)
        published = tuple(Published(**row) for row in front.pop("published", None) or ())
        provides, extends = tuple(front.pop("provides")), tuple(front.pop("extends", None) or ())
        paper = Paper(**front, published=published, provides=provides, extends=extends, module=module, folder=folder)
    except (TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: the front matter does not describe a paper: {error}") from None
    if paper.slug != slug:
        raise ValueError(f"{path}: slug must be {slug!r}, the name of the room, got {paper.slug!r}")
    return paper


def all() -> list[Paper]:
    """Every paper of the house, by slug."""
    return list(_rooms().values())


def get(slug: str) -> Paper:
    """The paper of that slug.

    Raises UnknownPaper, with the nearest slug, where there is none.
    """
    rooms = _rooms()
    if slug in rooms:
        return rooms[slug]
    near = difflib.get_close_matches(slug, rooms, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownPaper(f"no paper {slug!r}{hint} (regard list shows all {len(rooms)})")
