"""Softmax attention, by whichever way is fastest for what is asked.

| asked for | way |
|---|---|
| no mask, `causal()` over equal lengths, a tensor, a bias | PyTorch's fused kernel (SDPA) |
| a mask that hides whole blocks of keys | the fused kernel over the visible blocks only, or FlexAttention on a GPU |
| lse | `partial_attention` |
| weights, a recording, gradients of a bias, no keys at all | the definition, `attend_reference` |
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.attention import recorder
from regard.attention.masks import BLOCK, Mask, causal
from regard.attention.merge import partial_attention

Query = Float[Tensor, "batch heads queries dim"]
Key = Float[Tensor, "batch kv_heads keys dim"]
Value = Float[Tensor, "batch kv_heads keys value_dim"]
Out = Float[Tensor, "batch heads queries value_dim"]
TensorMask = Bool[Tensor, "..."] | None
AnyMask = Mask | TensorMask
AnyBias = Float[Tensor, "..."] | None

_SPARSE = 0.75
"""Share of blocks with a visible key up to which leaving out the other blocks pays."""
_flex_devices = {"cuda", "xpu"}
"""Where FlexAttention is used. On CPU it took 1.3 to 1.7 times as long as the fused kernel over the same blocks."""


class Attended(NamedTuple):
    """The output, and what else was asked for; None where it was not."""

    out: Out
    weights: Float[Tensor, "batch heads queries keys"] | None = None
    """Non-negative, summing to 1 over the keys, or to 0 in a row that may attend to nothing; at least fp32."""
    lse: Float[Tensor, "batch heads queries"] | None = None
    """Log of the sum of the exponentials of the scores, -inf in a row that may attend to nothing; at least fp32."""


@overload
def attend(
    q: Query,
    k: Key,
    v: Value,
    *,
    mask: AnyMask = None,
    bias: AnyBias = None,
    scale: float | None = None,
    need_weights: Literal[False] = False,
    need_lse: Literal[False] = False,
) -> Out: ...
@overload
def attend(
    q: Query,
    k: Key,
    v: Value,
    *,
    mask: AnyMask = None,
    bias: AnyBias = None,
    scale: float | None = None,
    need_weights: Literal[True],
    need_lse: bool = False,
) -> Attended: ...
@overload
def attend(
    q: Query,
    k: Key,
    v: Value,
    *,
    mask: AnyMask = None,
    bias: AnyBias = None,
    scale: float | None = None,
    need_weights: bool = False,
    need_lse: Literal[True],
) -> Attended: ...
def attend(
    q: Query,
    k: Key,
    v: Value,
    *,
    mask: AnyMask = None,
    bias: AnyBias = None,
    scale: float | None = None,
    need_weights: bool = False,
    need_lse: bool = False,
) -> Out | Attended:
    """Attention of the queries over the keys: the output alone, or `Attended` where weights or lse are needed.

    `heads` is a multiple of `kv_heads`, query head h reading key head h // (heads / kv_heads); keys are never repeated.
    A `Mask` takes the queries as the last of the keys; for other offsets pass `mask.tensor(..., offset=...)`. A tensor
    mask (True = may attend) and a bias, added to the scaled scores, broadcast to (batch, heads, queries, keys).
    `scale` defaults to dim ** -0.5. A row that may attend to nothing, or has no keys, gives zeros.

    Make a mask once and hand the same object to every layer: what is derived from it is kept with it.

    Raises ValueError where shapes do not fit each other, TypeError where a tensor mask is not boolean.
    """
    heads, kv_heads, queries, keys = _sizes(q, k, v, mask, bias)
    recording = recorder.wanted()
    trained_bias = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if need_weights or recording or trained_bias or not keys or (need_lse and bias is not None):
        attended = attend_reference(q, k, v, mask=mask, bias=bias, scale=scale)
        if recording and attended.weights is not None:
            recording.keep(attended.weights)
        return _asked(attended, need_weights, need_lse)

    if mask is causal() and queries == 1:
        mask = None  # the last token sees every key
    if isinstance(mask, Mask):
        if mask is causal() and queries == keys and not need_lse and bias is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads != kv_heads)
        strips = _strips(mask, q, keys) if queries >= BLOCK and keys >= 4 * BLOCK else None
        if strips is not None:
            if q.device.type in _flex_devices and not need_lse and bias is None:
                out = _flex(q, k, v, mask, scale)
                if out is not None:
                    return out
            return _in_strips(q, k, v, strips, bias, scale, need_lse)
        mask = _tensor(mask, q, keys)
    if need_lse:
        out, lse = partial_attention(q, k, v, mask=mask, scale=scale)
        return Attended(out, lse=lse)
    if mask is None and bias is None and heads == kv_heads:
        return scaled_dot_product_attention(q, k, v, scale=scale)  # as for decoding, where microseconds count
    return _fused(q, k, v, mask, bias, scale)


def attend_reference(
    q: Query, k: Key, v: Value, *, mask: AnyMask = None, bias: AnyBias = None, scale: float | None = None
) -> Attended:
    """Output, weights and lse of `attend`, by the definition, in fp32 or better.

    Source: "Attention Is All You Need" (Vaswani et al., 2017), eq. 1; groups of heads: "GQA" (Ainslie et al., 2023).
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys, value_dim = v.shape[1:]
    precision = torch.promote_types(q.dtype, torch.float32)
    scale = dim**-0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.to(precision).reshape(batch, kv_heads, heads // kv_heads * queries, dim)
        scores = (grouped @ k.to(precision).mT * scale).view(batch, heads, queries, keys)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            allowed = _tensor(mask, q, keys) if isinstance(mask, Mask) else mask
            scores = scores.masked_fill(~allowed, -math.inf)
        top = scores.detach().logsumexp(-1, keepdim=True)
        exponentials = (scores - torch.where(top.isfinite(), top, 0.0)).exp()  # no inf - inf in rows without keys
        total = exponentials.sum(-1, keepdim=True)
        safe = torch.where(total == 0, 1.0, total)  # keeps the gradient finite
        weights = exponentials / safe
        lse = torch.where(total == 0, -math.inf, top + safe.log()).squeeze(-1)
        out = weights.view(batch, kv_heads, heads // kv_heads * queries, keys) @ v.to(precision)
    return Attended(out.view(batch, heads, queries, value_dim).to(q.dtype), weights, lse)


class _Strip(NamedTuple):
    """A block of queries and the keys that at least one of them may attend to."""

    queries: slice
    keys: list[slice]
    mask: Bool[Tensor, "#batch #heads queries keys"] | None
    """Over the chosen keys; None where every query may attend to all of them."""


def _strips(mask: Mask, q: Query, keys: int) -> list[_Strip] | None:
    """The work that the mask leaves, a block of queries at a time; None where it leaves most of it."""
    batch, heads, queries, _ = q.shape

    def make() -> list[_Strip] | None:
        some = mask.block_table(queries, keys, batch=batch, heads=heads, device=q.device).some
        visible = some.flatten(0, 1).any(0)
        if visible.float().mean() > _SPARSE:
            return None
        strips = []
        for row, key_blocks in enumerate(visible.tolist()):
            start, stop = row * BLOCK, min((row + 1) * BLOCK, queries)
            runs = _runs(key_blocks, keys)
            offset = keys - queries + start
            rows = mask.tensor(stop - start, keys, offset=offset, batch=batch, heads=heads, device=q.device)
            chosen = _picked(rows, runs, dim=3)
            strips.append(_Strip(slice(start, stop), runs, None if chosen.all() else chosen.contiguous()))
        return strips

    return mask.remember(("strips", queries, keys, batch, heads, q.device), make)


def _runs(key_blocks: list[bool], keys: int) -> list[slice]:
    """The visible blocks of a row as slices of keys, neighbours joined."""
    runs: list[slice] = []
    for column, visible in enumerate(key_blocks):
        start, stop = column * BLOCK, min((column + 1) * BLOCK, keys)
        if visible and runs and runs[-1].stop == start:
            runs[-1] = slice(runs[-1].start, stop)
        elif visible:
            runs.append(slice(start, stop))
    return runs


def _picked(of_keys: Tensor, runs: list[slice], dim: int) -> Tensor:
    """The chosen keys, without a copy where they are one run."""
    parts = [of_keys.narrow(dim, run.start, run.stop - run.start) for run in runs]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim) if parts else of_keys.narrow(dim, 0, 0)


def _in_strips(
    q: Query, k: Key, v: Value, strips: list[_Strip], bias: AnyBias, scale: float | None, need_lse: bool
) -> Out | Attended:
    """Attention of each block of queries over the blocks of keys that it can see, exact."""
    if bias is not None:
        bias = bias.expand(*bias.shape[:-2], q.shape[2], k.shape[2])
    parts: list[Any] = []
    for strip in strips:
        part_bias = None
        if bias is not None:
            part_bias = _picked(bias[..., strip.queries, :], strip.keys, dim=bias.ndim - 1)
        part_k, part_v = _picked(k, strip.keys, dim=2), _picked(v, strip.keys, dim=2)
        part_q = q[:, :, strip.queries]
        if need_lse:
            parts.append(attend(part_q, part_k, part_v, mask=strip.mask, bias=part_bias, scale=scale, need_lse=True))
        else:
            parts.append(attend(part_q, part_k, part_v, mask=strip.mask, bias=part_bias, scale=scale))
    if not need_lse:
        return torch.cat(parts, dim=2)
    return Attended(torch.cat([part.out for part in parts], 2), lse=torch.cat([part.lse for part in parts], 2))


def _fused(q: Query, k: Key, v: Value, mask: TensorMask, bias: AnyBias, scale: float | None) -> Out:
    """PyTorch's fused kernel over all keys."""
    batch, heads, queries, dim = q.shape
    kv_heads = k.shape[1]
    extra = mask
    if bias is not None:
        bias = bias.to(q.dtype)
        extra = bias if mask is None else torch.where(mask, bias, -math.inf)
    if extra is not None and extra.ndim == 1:
        extra = extra[None]
    if queries != 1 or heads == kv_heads:
        return scaled_dot_product_attention(q, k, v, attn_mask=extra, scale=scale, enable_gqa=heads != kv_heads)
    # decoding: a group of heads costs less as several queries of one head
    if extra is not None and extra.ndim > 2 and extra.shape[-3] > 1:
        extra = extra.reshape(-1, kv_heads, heads // kv_heads, extra.shape[-1])
    packed = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    return scaled_dot_product_attention(packed, k, v, attn_mask=extra, scale=scale).view(batch, heads, 1, v.shape[-1])


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _flex(q: Query, k: Key, v: Value, mask: Mask, scale: float | None) -> Out | None:
    """FlexAttention over the mask's blocks; None, with one warning, where it does not compile on this machine."""
    batch, heads, queries, _ = q.shape
    blocks = mask.block_mask(queries, k.shape[2], batch=batch, heads=heads, device=q.device)
    try:
        return _compiled_flex()(q, k, v, block_mask=blocks, scale=scale, enable_gqa=heads != k.shape[1])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler raises: the other way gives the same result
        _flex_devices.clear()
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"FlexAttention does not compile here, using PyTorch's fused kernel: {reason}", RuntimeWarning, 3)
        return None


def _tensor(mask: Mask, q: Query, keys: int) -> Bool[Tensor, "#batch #heads queries keys"]:
    batch, heads, queries, _ = q.shape
    if queries * keys > 1 << 24:  # too large to keep
        return mask.tensor(queries, keys, batch=batch, heads=heads, device=q.device)
    key = ("tensor", queries, keys, batch, heads, q.device)
    return mask.remember(key, lambda: mask.tensor(queries, keys, batch=batch, heads=heads, device=q.device))


def _asked(attended: Attended, need_weights: bool, need_lse: bool) -> Out | Attended:
    if not need_weights and not need_lse:
        return attended.out
    return Attended(attended.out, attended.weights if need_weights else None, attended.lse if need_lse else None)


def _sizes(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, bias: Tensor | None
) -> tuple[int, int, int, int]:
    """How many heads, kv_heads, queries and keys there are, once everything is seen to fit; raises where it does not.

    Every call pays for this, and each look at a shape costs as much as ten comparisons: one look per tensor.
    """
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        raise ValueError(f"q, k and v must have 4 dimensions, got {len(q_shape)}, {len(k_shape)} and {len(v_shape)}")
    batch, heads, queries, dim = q_shape
    k_batch, kv_heads, keys, k_dim = k_shape
    v_batch, v_heads, v_keys, _ = v_shape
    if not (k_batch == v_batch == batch and kv_heads == v_heads and keys == v_keys and k_dim == dim):
        raise ValueError(
            "q, k and v must agree in batch, kv_heads, keys and dim, "
            f"got q {tuple(q_shape)}, k {tuple(k_shape)}, v {tuple(v_shape)}"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} heads and {kv_heads} kv_heads")
    full = (batch, heads, queries, keys)
    if mask is not None and not isinstance(mask, Mask):
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean (True = may attend), got {mask.dtype}: a bias goes in bias")
        _check_broadcasts("mask", mask, full)
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"bias must be floating-point, got {bias.dtype}")
        _check_broadcasts("bias", bias, full)
    return heads, kv_heads, queries, keys


def _check_broadcasts(name: str, given: Tensor, full: tuple[int, int, int, int]) -> None:
    shape = given.shape
    fits = 1 <= len(shape) <= 4 and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to (batch, heads, queries, keys) = {full}, got {tuple(shape)}")
