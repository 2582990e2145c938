"""Softmax attention as a sequence mixer: the baseline that every other mixer is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from regard.attention.attend import attend
from regard.attention.masks import causal
from regard.attention.positions import rotary_half
from regard.blocks.sequence_mixer import SequenceMixer


class KeyValues(NamedTuple):
    """The keys and values of every token so far; the keys are already rotated to their positions."""

    keys: Tensor
    """(batch, heads, tokens, head_dim)"""
    values: Tensor
    """(batch, heads, tokens, head_dim)"""

    def append(self, keys: Tensor, values: Tensor) -> KeyValues:
        """These and the new ones.

        Without gradients both live in buffers that double when they are full, so a token costs one write. The first
        state made from this one takes the free room behind it; a second one gets buffers of its own, so no state ever
        changes.
        """
        seen, total = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        if total == seen:
            return self
        if torch.is_grad_enabled() and any(part.requires_grad for part in (*self, keys, values)):
            return KeyValues(torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2))
        room = self.keys.__dict__.pop("room", None)
        if room is None or room[0].shape[2] < total or room[0].is_inference() != torch.is_inference_mode_enabled():
            room = tuple(_grown(part, total) for part in self)
        for buffer, new in zip(room, (keys, values), strict=True):
            buffer[:, :, seen:total] = new
        longer = KeyValues(*(buffer[:, :, :total] for buffer in room))
        longer.keys.__dict__["room"] = room
        return longer


def _grown(part: Tensor, tokens: int) -> Tensor:
    """A copy of the part at the start of a buffer for at least that many tokens."""
    batch, heads, seen, dim = part.shape
    buffer = part.new_empty(batch, heads, max(16, 1 << (tokens - 1).bit_length()), dim)
    buffer[:, :, :seen] = part
    return buffer


class SoftmaxAttention(SequenceMixer):
    """Causal multi-head softmax attention with rotary positions and a state that grows with every token; no biases.

    Source: "Attention Is All You Need" (Vaswani et al., 2017), section 3.2, with the positions of "RoFormer"
    (Su et al., 2021).
    """

    def __init__(self, dim: int, num_heads: int, base: float = 10_000.0):
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % (2 * num_heads):
            raise ValueError(f"dim must be a positive multiple of 2 * num_heads, got dim {dim}, num_heads {num_heads}")
        self.num_heads, self.head_dim, self.base = num_heads, dim // num_heads, base
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def initial(self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> KeyValues:
        """No keys and no values."""
        weight, shape = self.in_proj.weight, (batch, self.num_heads, 0, self.head_dim)
        empty = torch.empty(shape, device=device or weight.device, dtype=dtype or weight.dtype)
        return KeyValues(empty, empty.clone())

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], state: KeyValues | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], KeyValues]:
        """Each token's mean of the values up to its own, weighted by how its query meets their keys."""
        q, k, v = rearrange(
            self.in_proj(x),
            "batch tokens (three heads dim) -> three batch heads tokens dim",
            three=3,
            heads=self.num_heads,
        )
        if state is None:
            state = self.initial(x.shape[0], x.device, q.dtype)
        seen, tokens = state.keys.shape[2], x.shape[1]
        position = torch.arange(seen, seen + tokens, device=x.device)
        q, k = rotary_half(q, position, self.base), rotary_half(k, position, self.base)
        state = state.append(k, v)
        out = attend(q, state.keys, state.values, mask=causal())
        return self.out_proj(rearrange(out, "batch heads tokens dim -> batch tokens (heads dim)")), state
