"""Softmax attention over a union of key sets, as a merge of the attention over each.

A `Partial` is what attention over some keys leaves behind: its output and the log of its normaliser. Two of them over
disjoint keys merge exactly into the one over both. Sinks and window, retrieved and local keys, chunks of a prompt and
shards of a ring are all this merge; `regard.attention.scan` gives it at every prefix of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

__all__ = ["Partial", "merge", "merge_all", "partial_attention", "plain_partial_attention"]

Query = Float[Tensor, "batch heads queries dim"]
Key = Float[Tensor, "batch kv_heads keys dim"]
Value = Float[Tensor, "batch kv_heads keys value_dim"]
Mask = Bool[Tensor, "..."] | None


class Partial(NamedTuple):
    """Attention over some of the keys."""

    out: Float[Tensor, "*rows dim"]
    """The weighted mean of the values; zero in a row that saw no key."""
    lse: Float[Tensor, "*rows"]
    """Log of the sum of the exponentials of the scores; -inf in a row that saw no key."""

    @classmethod
    def empty(cls, *shape: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Partial:
        """Attention over no keys, the identity of `merge`. The shape is (*rows, dim)."""
        out = torch.zeros(shape, device=device, dtype=dtype)
        return cls(out, out.new_full(shape[:-1], -math.inf))


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint key sets, given the attention over each.

    Associative and commutative, with identity `Partial.empty`. Exact up to rounding; safe where one side has no keys.
    The result has the wider of the two dtypes, so that a chain of merges begun in fp32 stays in fp32.

    Source: online softmax (Milakov and Gimelshein, 2018), eq. 4; the scan of "Attention as an RNN", section 3.2.
    """
    top = torch.maximum(a.lse, b.lse).detach()
    top = torch.where(top.isfinite(), top, 0.0)  # rows with no keys on either side
    weight_a, weight_b = (a.lse - top).exp(), (b.lse - top).exp()
    total = weight_a + weight_b
    empty = total == 0
    safe = torch.where(empty, 1.0, total)  # keeps the gradient finite
    out = (weight_a[..., None] * a.out + weight_b[..., None] * b.out) / safe[..., None]
    return Partial(out, lse=torch.where(empty, -math.inf, top + safe.log()))


def merge_all(parts: Iterable[Partial]) -> Partial:
    """Attention over the union of any number of disjoint key sets.

    Raises ValueError where there is no part: the shape of the identity would be unknown.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("parts must hold at least one Partial, got none")
    return reduce(merge, parts)


def partial_attention(q: Query, k: Key, v: Value, *, mask: Mask = None, scale: float | None = None) -> Partial:
    """Attention of the queries over these keys, ready to be merged with attention over others.

    `heads` is a multiple of `kv_heads`, query head h reading key head h // (heads / kv_heads). `mask` (True = may
    attend) broadcasts to (batch, heads, queries, keys). `scale` defaults to dim ** -0.5. `out` has the dtype of q,
    `lse` is at least fp32. Both carry gradients. On CPU this is the fused kernel under PyTorch's SDPA; elsewhere, and
    where that kernel does not apply, it is `plain_partial_attention`.

    Raises ValueError where the shapes do not fit each other.
    """
    _check(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    fits = q.device.type == "cpu" and q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1]
    if not fits or q.numel() == 0 or k.numel() == 0:  # the kernel divides by the numbers of queries and of keys
        return plain_partial_attention(q, k, v, mask=mask, scale=scale)
    batch, heads, queries, _ = q.shape
    if queries == 1 and heads != k.shape[1]:  # decoding: a group of heads costs less as several queries of one head
        q = q.reshape(batch, k.shape[1], -1, q.shape[-1])
        if mask is not None:
            mask = _four(mask)
            mask = mask.reshape(mask.shape[0], k.shape[1], -1, mask.shape[-1]) if mask.shape[1] > 1 else mask
    bias = None
    if mask is not None:
        mask = _four(mask).expand(-1, -1, -1, k.shape[2])
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _FusedOnCpu.apply(q, k, v, bias, scale)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    if mask is not None:  # the kernel gives lse = 0 in a row that may attend to nothing
        lse = torch.where(mask.any(-1), lse, -math.inf)
    return Partial(out.reshape(batch, heads, queries, -1), lse.reshape(batch, heads, queries))


def plain_partial_attention(q: Query, k: Key, v: Value, *, mask: Mask = None, scale: float | None = None) -> Partial:
    """The same as `partial_attention`, by the definition: scores, softmax, log-sum-exp. Runs on every device."""
    _check(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    precision = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(precision)
    with torch.autocast(q.device.type, enabled=False):
        scores = grouped @ k[:, :, None].to(precision).mT * scale
        visible = torch.ones_like(scores, dtype=torch.bool)
        if mask is not None:
            mask = _four(mask)
            visible &= mask.unflatten(1, (k.shape[1], -1)) if mask.shape[1] > 1 else mask[:, :, None]
        empty = ~visible.any(-1)
        # A row without a key gets scores of 0 and its results replaced, so that no gradient meets inf - inf.
        scores = scores.masked_fill(~visible & ~empty[..., None], -math.inf).masked_fill(empty[..., None], 0.0)
        weights = scores.softmax(-1).masked_fill(empty[..., None], 0.0)
        out = weights @ v[:, :, None].to(precision)
        lse = scores.logsumexp(-1).masked_fill(empty, -math.inf)
    return Partial(out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2))


class _FusedOnCpu(torch.autograd.Function):
    """The kernel under SDPA on CPU, with the gradient through its log-sum-exp that PyTorch leaves out."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return None, None, None, None, None
        dim = q.shape[-1]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if grad_lse is not None:
            # The gradient of a score is weight * (grad_out . value - grad_out . out + grad_lse). One more column,
            # 1 in every value and grad_lse in grad_out but 0 in out, adds the last term. 16 keep rows aligned.
            q, k, v, out, grad_out = (pad(each, (0, 16)) for each in (q, k, v, out, grad_out))
            v[..., dim], grad_out[..., dim] = 1.0, grad_lse.to(grad_out.dtype)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=ctx.scale
        )
        return *(grad[..., :dim] for grad in grads), None, None


def _four(mask: Tensor) -> Tensor:
    return mask[(None,) * (4 - mask.ndim)]


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError where the shapes do not fit: the kernel would read outside the tensors, or kill the process."""
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k, v must have 4 dimensions, got {q.ndim}, {k.ndim}, {v.ndim}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q, k, v must agree in batch, keys and dim, got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"heads must be a multiple of kv_heads, got {q.shape[1]} and {k.shape[1]}")
    if mask is None:
        return
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask.dtype != torch.bool or not 1 <= mask.ndim <= 4:
        raise ValueError(f"mask must be boolean with up to 4 dimensions, got {mask.dtype} with {mask.ndim}")
    if any(given not in (1, wanted) for given, wanted in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"mask must broadcast to (batch, heads, queries, keys) = {full}, got {tuple(mask.shape)}")
