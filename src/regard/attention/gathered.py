"""Attention of one query over keys chosen by position, at the cost of reading the chosen ones alone.

A decoding step that attends to the top of a score, to retrieved pages or to a kept set asks for this. Keys and values
lie in a large cache, so the time goes into fetching scattered rows: the cache is read in place as a table of rows, the
chosen keys are copied once, and the chosen values never.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["gathered_attention", "gathered_attention_reference"]

Query = Float[Tensor, "batch heads 1 dim"]
Key = Float[Tensor, "batch kv_heads keys dim"]
Value = Float[Tensor, "batch kv_heads keys value_dim"]
Index = Int[Tensor, "batch groups chosen"]
Mask = Bool[Tensor, "batch groups chosen"] | None
Out = Float[Tensor, "batch heads 1 value_dim"]

_devices = {"cpu", "cuda"}
"""Where PyTorch's `embedding_bag` takes weights in every dtype of `_dtypes`."""
_dtypes = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def gathered_attention(
    q: Query, k: Key, v: Value, index: Index, *, mask: Mask = None, scale: float | None = None
) -> Out:
    """Attention of one query per head over the keys at the positions in `index`; softmax in fp32 or better.

    `heads` is a multiple of `kv_heads`, query head h reading KV head h // (heads / kv_heads). `groups` is `kv_heads`,
    one choice for all query heads of a KV head, or `heads`, a choice for each. A position chosen twice counts twice.
    `mask` (False = do not attend) pads choices of different lengths; a row that may attend to nothing gives zeros.
    `scale` defaults to dim ** -0.5.

    Fast over a cache in which every row starts at a multiple of its own length from the first, as in contiguous
    tensors, slices `buffer[:, :, :used]` and transposed (batch, keys, heads, dim): nothing but the chosen rows is
    read. Other layouts, mixed dtypes and calls that need gradients go through `gathered_attention_reference`.

    Raises ValueError where shapes do not fit each other, TypeError where the mask is not boolean, and on CPU IndexError
    where a position, masked ones too, is not in 0..keys - 1; on other devices, where a look would cost a wait, such a
    position reads another row.
    """
    _check(q, k, v, index, mask)
    needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    alike = q.dtype == k.dtype == v.dtype and q.dtype in _dtypes and q.device.type in _devices
    key_rows, value_rows = _rows(k), _rows(v)
    if needs_gradient or not alike or not index.numel() or key_rows is None or value_rows is None:
        return gathered_attention_reference(q, k, v, index, mask=mask, scale=scale)

    batch, heads, _, dim = q.shape
    groups, chosen = index.shape[1:]
    sharing = heads // groups  # query heads with the same choice
    precision = torch.promote_types(q.dtype, torch.float32)
    chosen_keys = key_rows.at(index)
    chosen_values = chosen_keys if value_rows.steps == key_rows.steps else value_rows.at(index)

    # Bags of one row are a copy that fetches ahead, which `embedding` does not.
    keys = _sums(key_rows.table, chosen_keys, 1).view(-1, chosen, dim)
    queries = q.reshape(-1, sharing, dim).to(precision) * (dim**-0.5 if scale is None else scale)
    scores = queries.bmm(keys.to(precision).mT)  # in this order: keys by queries takes seven times as long on CPU
    if mask is None:
        weights = scores.softmax(-1)
    else:
        hidden = ~mask.reshape(-1, 1, chosen)
        weights = scores.masked_fill_(hidden, -math.inf).softmax(-1).masked_fill_(hidden, 0.0)
    if sharing > 1:  # the rows come from the cache after the first head, so that a copy for all heads costs more
        chosen_values = chosen_values.view(-1, 1, chosen).expand(-1, sharing, -1).reshape(-1)
    out = _sums(value_rows.table, chosen_values, chosen, weights.view(-1).to(v.dtype))
    return out.view(batch, heads, 1, -1)


def gathered_attention_reference(
    q: Query, k: Key, v: Value, index: Index, *, mask: Mask = None, scale: float | None = None
) -> Out:
    """The same as `gathered_attention`, by the definition: gather, softmax, weighted mean. Carries gradients."""
    _check(q, k, v, index, mask)
    batch, heads, _, dim = q.shape
    kv_heads, value_dim = v.shape[1], v.shape[-1]
    groups, chosen = index.shape[1:]
    precision = torch.promote_types(q.dtype, torch.float32)
    scale = dim**-0.5 if scale is None else scale
    positions = index.reshape(batch, kv_heads, groups // kv_heads * chosen, 1).long()
    keys = k.gather(2, positions.expand(-1, -1, -1, dim)).view(batch, groups, chosen, dim)
    values = v.gather(2, positions.expand(-1, -1, -1, value_dim)).view(batch, groups, chosen, value_dim)
    with torch.autocast(q.device.type, enabled=False):
        scores = q.reshape(batch, groups, heads // groups, dim).to(precision) @ keys.to(precision).mT * scale
        if mask is None:
            weights = scores.softmax(-1)
        else:
            visible, empty = mask[:, :, None], ~mask.any(-1)[:, :, None, None]
            # A row that may attend to nothing keeps its scores, so that no gradient meets inf - inf.
            weights = scores.masked_fill(~visible & ~empty, -math.inf).softmax(-1).masked_fill(empty, 0.0)
        out = weights @ values.to(precision)
    return out.reshape(batch, heads, 1, value_dim).to(q.dtype)


class _Rows(NamedTuple):
    """The memory of keys or values as one table, without a copy."""

    table: Float[Tensor, "rows dim"]
    steps: tuple[int, int, int]
    """Rows from one batch row, head and position to the next."""
    kv_heads: int

    def at(self, index: Index) -> Int[Tensor, " number"]:
        """The table's rows that hold these positions, as int64."""
        of_batch, of_head, of_position = self.steps
        batch = torch.arange(index.shape[0], device=index.device)[:, None, None]
        head = torch.arange(self.kv_heads, device=index.device)[:, None]
        positions = index.reshape(index.shape[0], self.kv_heads, -1)
        return torch.add(batch * of_batch + head * of_head, positions, alpha=of_position).view(-1)


def _sums(
    table: Float[Tensor, "rows dim"],
    rows: Int[Tensor, " number"],
    bag: int,
    weights: Float[Tensor, " number"] | None = None,
) -> Float[Tensor, "bags dim"]:
    """The weighted sum of each `bag` rows that follow each other.

    `nn.functional.embedding_bag` without its checks, which take longer than the call for few rows.
    """
    starts = torch.arange(0, len(rows), bag, device=rows.device)
    return torch.embedding_bag(table, rows, starts, False, 0, False, weights)[0]  # 0 is the sum


def _rows(stored: Key | Value) -> _Rows | None:
    """The table of rows behind the tensor; None where its layout is none, or it is empty."""
    sizes, strides, dim = stored.shape[:3], stored.stride(), stored.shape[-1]
    if not stored.numel() or strides[3] != 1 or any(stride % dim for stride in strides[:3]):
        return None
    steps = strides[0] // dim, strides[1] // dim, strides[2] // dim
    rows = 1 + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    return _Rows(stored.as_strided((rows, dim), (dim, 1)), steps, sizes[1])


def _check(q: Tensor, k: Tensor, v: Tensor, index: Tensor, mask: Tensor | None) -> None:
    """Raises where the shapes do not fit: a table of rows would take them and read something else."""
    if not q.ndim == k.ndim == v.ndim == 4 or index.ndim != 3:
        raise ValueError(
            f"q, k and v must have 4 dimensions and index 3, got {q.ndim}, {k.ndim}, {v.ndim} and {index.ndim}"
        )
    batch, heads, queries, dim = q.shape
    kv_heads = k.shape[1]
    if queries != 1:
        raise ValueError(f"there must be one query per head, got {queries}")
    if k.shape[:3] != v.shape[:3] or not batch == k.shape[0] == index.shape[0] or dim != k.shape[-1]:
        raise ValueError(
            "q, k, v and index must agree in batch, kv_heads, keys and dim, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, index {tuple(index.shape)}"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} heads and {kv_heads} kv_heads")
    if index.numel() and index.device.type == "cpu":
        lowest, highest = (int(end) for end in index.aminmax())
        if lowest < 0 or highest >= k.shape[2]:
            wrong = lowest if lowest < 0 else highest
            raise IndexError(f"index must be positions from 0 to {k.shape[2] - 1}, got {wrong}")
    if index.shape[1] not in (kv_heads, heads):
        raise ValueError(
            f"index must have a group for each of {kv_heads} kv_heads or {heads} heads, got {index.shape[1]}"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean (True = may attend), got {mask.dtype}")
    if mask.shape != index.shape:
        raise ValueError(f"mask must have the shape of index, {tuple(index.shape)}, got {tuple(mask.shape)}")
