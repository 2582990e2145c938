"""The gates: what the search finds, how they become retrieval and streaming heads, and the authors' file format."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.data.files import write_atomically

TABLE, SETTINGS = "full_attention_heads.tsv", "config.json"


@dataclass(frozen=True, eq=False)
class Gates:
    """How much each KV head needs the whole context: 1 for a retrieval head, 0 for a streaming head."""

    values: Float[Tensor, "layers kv_heads"]
    sinks: int = 128
    """Leading tokens that the streaming heads saw while the gates were trained."""
    recent: int = 256
    """Last tokens, the query's own included, that the streaming heads saw while the gates were trained."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How they were trained, in the authors' words (`lr`, `reg_weight`, `num_steps` ...)."""

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.numel() == 0:
            raise ValueError(f"gates must have shape (layers, kv_heads), got {tuple(self.values.shape)}")
        if not bool(self.values.isfinite().all()):
            raise ValueError("gates must be finite numbers, got nan or inf among them")
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")
        if self.recent < 1:
            raise ValueError(f"recent must be at least 1, the token itself, got {self.recent}")
        object.__setattr__(self, "values", self.values.detach().to("cpu", torch.float32).clamp(0.0, 1.0))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Gates):
            return NotImplemented
        same = (self.sinks, self.recent, dict(self.settings)) == (other.sinks, other.recent, dict(other.settings))
        return same and torch.equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((self.sinks, self.recent, tuple(self.values.flatten().tolist())))

    def __repr__(self) -> str:
        layers, heads = self.values.shape
        mean = float(self.values.mean())
        return f"Gates({layers} layers x {heads} KV heads, mean {mean:.3f}, sinks={self.sinks}, recent={self.recent})"


def binarise(
    gates: Float[Tensor, "layers kv_heads"], sparsity: float, generator: torch.Generator | None = None
) -> Bool[Tensor, "layers kv_heads"]:
    """True where a head is a retrieval head: its gate is at least the `sparsity` quantile of all gates.

    Noise of at most 1e-6 breaks ties, drawn from `generator`; without one it is the same at every call, so that
    equal gates give equal heads. At `sparsity` 0 all heads are retrieval heads, at 1 none is.

    Source: section 2.3 ("Binarizing Attention Implementations"), and the authors' `sparsify_attention_heads`.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity must be from 0 (all heads full) to 1 (all heads streaming), got {sparsity}")
    if sparsity in (0.0, 1.0):
        return torch.full_like(gates, sparsity == 0.0, dtype=torch.bool)
    generator = generator or torch.Generator().manual_seed(0)
    noise = torch.rand(gates.shape, generator=generator, dtype=torch.float64) * 1e-6
    noisy = gates.detach().cpu().double().clamp(0.0, 1.0) + noise
    return noisy >= _quantile(noisy.flatten(), sparsity)


def _quantile(values: Float[Tensor, " values"], fraction: float) -> Float[Tensor, ""]:
    # torch.quantile rounds the position to fp32 and refuses 2**24 values; this interpolates in fp64.
    ordered = values.sort().values
    place = fraction * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def random_gates(
    layers: int, kv_heads: int, generator: torch.Generator, *, sinks: int = 128, recent: int = 256
) -> Gates:
    """Gates that know nothing, uniform in [0, 1]: the baseline for the same memory."""
    return Gates(torch.rand(layers, kv_heads, generator=generator), sinks=sinks, recent=recent)


def load_gates(folder: str | os.PathLike[str]) -> Gates:
    """The gates in a folder with `full_attention_heads.tsv` and `config.json`, as the authors publish them.

    One row per layer, one column per KV head, separated by tabs; values outside [0, 1] are clipped.
    Raises FileNotFoundError where a file is missing, ValueError where one does not hold what it should.
    """
    folder = Path(folder)
    table, settings = folder / TABLE, folder / SETTINGS
    for path in (table, settings):
        if not path.is_file():
            raise FileNotFoundError(f"gates need {TABLE} and {SETTINGS} in one folder, {path} is missing")
    try:
        rows = [[float(cell) for cell in line.split("\t")] for line in table.read_text("utf-8").splitlines() if line]
    except ValueError as error:
        raise ValueError(f"{table}: every cell must be a number, the cells separated by tabs: {error}") from None
    if not rows or len({len(row) for row in rows}) != 1:
        lengths = sorted({len(row) for row in rows})
        raise ValueError(f"{table}: every row must have one number per KV head, got rows of length {lengths or 'none'}")
    try:
        about = json.loads(settings.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{settings}: not JSON: {error}") from None
    if not isinstance(about, dict) or not all(isinstance(about.get(key), int) for key in ("sink_size", "recent_size")):
        raise ValueError(f"{settings}: sink_size and recent_size must be whole numbers")
    sinks, recent = about.pop("sink_size"), about.pop("recent_size")
    try:
        return Gates(torch.tensor(rows, dtype=torch.float32), sinks=sinks, recent=recent, settings=about)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def save_gates(gates: Gates, folder: str | os.PathLike[str]) -> Path:
    """The folder, with the gates in the authors' two files; either file is written whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = ("\t".join(f"{value:.18e}" for value in row) for row in gates.values.tolist())
    about = {**gates.settings, "sink_size": gates.sinks, "recent_size": gates.recent}
    write_atomically(folder / SETTINGS, json.dumps(about, indent=2) + "\n")
    write_atomically(folder / TABLE, "\n".join(rows) + "\n")
    return folder
