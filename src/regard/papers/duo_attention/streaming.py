"""Attention of streaming heads: the first tokens and the last ones, at a cost linear in the number of queries."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.llm.visible import Visible


def streaming_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys dim_v"],
    sink_key: Float[Tensor, "batch kv_heads sinks dim"],
    sink_value: Float[Tensor, "batch kv_heads sinks dim_v"],
    *,
    recent: int,
    visible: Visible,
    scale: float,
) -> Float[Tensor, "batch heads queries dim_v"]:
    """Attention to the sinks and to the `recent` last tokens, the query's own included: the paper's Λ-shaped mask.

    `key` and `value` are of consecutive tokens, the last of them the last query's. The sinks are every row's first
    tokens after left padding. Queries go in blocks, each with the stretch of keys that its window can reach, so time
    and memory are O(queries * (sinks + recent)); at 512 tokens with 8 + 64 this takes half as long as a dense mask,
    forward and backward.

    Source: section 2.3 and Figure 5 ("streaming attention", Λ-like mask); `generate_streaming_mask` of the authors.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys, sinks = key.shape[1], key.shape[2], sink_key.shape[2]
    block = min(max(64, recent // 2), queries)
    blocks = -(-queries // block)
    span = block + recent - 1
    late = blocks * block - queries
    early = max(span - block - (keys - queries), 0)
    spare = max(keys - queries - (span - block), 0)

    def stretches(tokens: Tensor, of_sinks: Tensor) -> Tensor:
        windows = F.pad(tokens[:, :, spare:], (0, 0, early, late)).unfold(2, span, block)
        windows = windows.permute(0, 2, 1, 4, 3)
        firsts = of_sinks[:, None].expand(-1, blocks, -1, -1, -1)
        return torch.cat([firsts, windows], dim=3).flatten(0, 1)

    mask = _mask(visible, sinks, recent, block, keys, query.dtype)
    mask = mask.expand(batch, blocks, block, sinks + span).flatten(0, 1)[:, None]
    in_blocks = F.pad(query, (0, 0, 0, late)).view(batch, heads, blocks, block, dim).transpose(1, 2).flatten(0, 1)
    out = F.scaled_dot_product_attention(
        in_blocks,
        stretches(key, sink_key),
        stretches(value, sink_value),
        attn_mask=mask,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    out = out.view(batch, blocks, heads, block, out.shape[-1]).transpose(1, 2)
    return out.reshape(batch, heads, blocks * block, out.shape[-1])[:, :, :queries]


def _mask(
    visible: Visible, sinks: int, recent: int, block: int, keys: int, dtype: torch.dtype
) -> Float[Tensor, "rows blocks block keys"]:
    """0 where a query may see a key, -inf elsewhere; a block's keys are the sinks, then the reach of its windows."""
    shape = visible.first, visible.queries, sinks, recent, block, keys
    if visible.plain:
        return _plain_mask(*shape, dtype, visible.device)
    return _as_bias(_allowed(visible, *shape, visible.device), dtype)


@lru_cache(maxsize=2)  # the layers of one forward pass share it
def _plain_mask(
    first: int, queries: int, sinks: int, recent: int, block: int, keys: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "1 blocks block keys"]:
    return _as_bias(_allowed(None, first, queries, sinks, recent, block, keys, device), dtype)


def _allowed(
    visible: Visible | None,
    first: int,
    queries: int,
    sinks: int,
    recent: int,
    block: int,
    keys: int,
    device: torch.device,
) -> Bool[Tensor, "rows blocks block keys"]:
    blocks = -(-queries // block)
    starts = first + block * torch.arange(blocks, device=device)
    query = (starts[:, None] + torch.arange(block, device=device))[None, :, :, None]
    reach = (starts[:, None] - (recent - 1) + torch.arange(block + recent - 1, device=device))[None, :, None, :]
    begin = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    padding = None if visible is None else visible.left_padding()
    if padding is not None:
        begin = padding[:, None, None, None]
    sink = (begin + torch.arange(sinks, device=device)).expand(-1, blocks, -1, -1)
    reach = reach.expand(begin.shape[0], -1, -1, -1)
    held = torch.cat([sink, reach], dim=-1)
    band = (reach >= begin + sinks) & (reach >= first + queries - keys) & (query - reach < recent)
    allowed = torch.cat([band.new_ones(*band.shape[:-1], sinks), band], dim=-1) & (held <= query)
    if visible is not None:
        known = held.clamp(0, visible.seen - 1)
        row = torch.arange(begin.shape[0], device=device)[:, None, None, None]
        allowed = allowed & visible.rule(row, torch.zeros_like(row), query, known)
        if visible.padding is not None:
            allowed = allowed & visible.padding[row, known]
    return allowed


def _as_bias(allowed: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
