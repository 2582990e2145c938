"""Based: short convolutions, Taylor linear attention and small windows, so that recall is bought with state size."""

from collections.abc import Callable
from typing import Any

from regard.blocks.sequence_mixer import SequenceMixer
from regard.papers.based.mixer import BaseConv, SlidingWindowAttention, TaylorLinearAttention
from regard.papers.based.model import Based, BasedConfig
from regard.papers.based.recipe import Recipe

__all__ = [
    "EXAMPLES",
    "MIXERS",
    "BaseConv",
    "Based",
    "BasedConfig",
    "Recipe",
    "SlidingWindowAttention",
    "TaylorLinearAttention",
]

EXAMPLES: dict[str, Callable[[], Any]] = {
    "BaseConv": lambda: BaseConv(12),
    "TaylorLinearAttention": lambda: TaylorLinearAttention(12, num_heads=3, feature_dim=4, chunk=5),
    "SlidingWindowAttention": lambda: SlidingWindowAttention(12, num_heads=3, window=6),
    "Based": lambda: Based(Based.published["tiny"]),
}

MIXERS: dict[str, Callable[[int], SequenceMixer]] = {
    "based": lambda dim: TaylorLinearAttention(dim, num_heads=max(1, dim // 64)),
    "based.conv": lambda dim: BaseConv(dim),
    "based.window": lambda dim: SlidingWindowAttention(dim, num_heads=max(1, dim // 64)),
}
