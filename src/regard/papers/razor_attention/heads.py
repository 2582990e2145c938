"""Which heads keep every token: the list that the search finds, and the file formats it comes in."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from regard.data.files import write_atomically

Place = tuple[int, int]
"""(layer, KV head), both from 0."""
FILE = "heads.json"
SHIPPED = Path(__file__).parent / "heads"


@dataclass(frozen=True)
class Heads:
    """The KV heads that keep every token, the most important one first."""

    protected: tuple[Place, ...]
    shape: Place | None = None
    """Layers and KV heads per layer of the model; None where the list does not say."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How they were found."""

    def __post_init__(self) -> None:
        if len(set(self.protected)) != len(self.protected):
            raise ValueError("heads must name every head once")
        layers, heads = self.shape or (1 << 30, 1 << 30)
        for layer, head in self.protected:
            if not (0 <= layer < layers and 0 <= head < heads):
                raise ValueError(f"heads must be in {layers} layers x {heads} KV heads, got layer {layer}, head {head}")

    def __hash__(self) -> int:
        return hash((self.protected, self.shape))

    def __repr__(self) -> str:
        return f"Heads({len(self.protected)} heads of a model of {self.shape or 'any size'})"

    def mask(self, layers: int, kv_heads: int) -> Bool[Tensor, "layers kv_heads"]:
        """True at the heads that keep every token.

        Raises ValueError where the list is for a model of another shape.
        """
        if self.shape not in (None, (layers, kv_heads)):
            raise ValueError(
                f"the heads are of a model of {self.shape[0]} layers x {self.shape[1]} KV heads, this one has "
                f"{layers} x {kv_heads}; find its heads (regard train razor_attention) or give a published list"
            )
        mask = torch.zeros(layers, kv_heads, dtype=torch.bool)
        for layer, head in Heads(self.protected, (layers, kv_heads)).protected:
            mask[layer, head] = True
        return mask

    @classmethod
    def of_mask(cls, protected: Bool[Tensor, "layers kv_heads"]) -> Heads:
        """The heads that are True, in the order of layers."""
        layers, heads = protected.shape
        places = tuple((layer, head) for layer, head in protected.nonzero().tolist())
        return cls(places, (layers, heads))


def find_heads(source: str | os.PathLike[str]) -> Heads:
    """The heads of that name which ship with this room, or those in a file, or in a folder's `heads.json`.

    Raises FileNotFoundError, with the names that ship, where there are none of them.
    """
    path = Path(source)
    places = [path, path / FILE]
    if path.name == os.fspath(source):
        places.insert(0, SHIPPED / f"{path.name}.json")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        names = ", ".join(sorted(place.stem for place in SHIPPED.glob("*.json")))
        raise FileNotFoundError(
            f"heads must be a file, a folder with {FILE} in it, or one of {names}, got {str(source)!r}"
        )
    return load_heads(file)


def load_heads(file: str | os.PathLike[str]) -> Heads:
    """The heads in a file: ours, golden-stick's JSON, or msmodelslim's PyTorch file.

    The latter two map layers to KV heads, and know neither the model's shape nor which heads matter most. Of
    msmodelslim's two maps the heads in `copying` come first, which are few.

    Raises FileNotFoundError where there is no such file, ValueError where it holds no such list.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return _from_msmodelslim(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a file of heads: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must map layers to KV heads, got a {type(content).__name__}")
    if "heads" not in content:
        return Heads(_places(path, content))
    try:
        shape = (int(content.pop("layers")), int(content.pop("kv_heads")))
        places = tuple((int(layer), int(head)) for layer, head in content.pop("heads"))
        return Heads(places, shape, content)
    except KeyError as error:
        raise ValueError(f"{path} must have layers, kv_heads and heads, {error} is missing") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def save_heads(heads: Heads, file: str | os.PathLike[str]) -> Path:
    """The file, which now holds the heads as JSON, the most important one first.

    Raises ValueError where the shape of the model is not known.
    """
    if heads.shape is None:
        raise ValueError("heads need the shape of their model, (layers, kv_heads), to be saved")
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    layers, kv_heads = heads.shape
    listed = [list(place) for place in heads.protected]
    content = {"layers": layers, "kv_heads": kv_heads, "heads": listed, **heads.settings}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    return write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _from_msmodelslim(path: Path) -> Heads:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a file of heads: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not {"prefix_matching", "copying"} <= set(content):
        raise ValueError(f"{path} must hold the maps 'prefix_matching' and 'copying'")
    return Heads(_places(path, content["copying"], content["prefix_matching"]))


def _places(path: Path, *maps: Any) -> tuple[Place, ...]:
    """The heads of maps from layers to lists of KV heads, one map after the other; each head once."""

    def each() -> Iterable[Place]:
        for of_layers in maps:
            for layer, heads in of_layers.items():
                yield from ((int(layer), int(head)) for head in heads)

    try:
        return tuple(dict.fromkeys(each()))
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} must map layers to lists of KV heads, as in {{'3': [0, 2]}}") from None
