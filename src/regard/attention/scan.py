"""Results at every prefix of a sequence: a scan by any associative operation, and softmax attention as running sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from regard.attention.merge import Partial, merge
from regard.attention.tree import tree_leaves, tree_map

__all__ = ["Running", "associative_scan", "plain_prefix_attention", "prefix_attention"]

CHUNK = 32
"""Tokens that are read as one matrix product: the fastest of 16 to 256 on CPU, at 1k and 16k tokens, dim 16 and 64."""


def associative_scan(combine: Callable[[Any, Any], Any], elements: Any, dim: int) -> Any:
    """The combination of all elements up to each position, in order: out[i] = e[0] + ... + e[i] for the operation.

    `elements` is a tree of tensors that all run over the positions along `dim`, `combine` takes two such trees and is
    associative and elementwise in `dim`. O(n) work in 2 log2(n) rounds; autograd runs through it.

    Source: Blelloch, "Prefix sums and their applications" (1990), section 1.3, in its recursive form.
    """
    length = tree_leaves(elements)[0].shape[dim]
    if length < 2:
        return elements

    def take(tree: Any, start: int, stop: int, step: int = 1) -> Any:
        return tree_map(lambda leaf: leaf[(slice(None),) * (dim % leaf.ndim) + (slice(start, stop, step),)], tree)

    pairs = combine(take(elements, 0, length - 1, 2), take(elements, 1, length, 2))
    odd = associative_scan(combine, pairs, dim)
    even = take(elements, 0, 1)
    if length > 2:
        rest = combine(take(odd, 0, (length - 1) // 2), take(elements, 2, length, 2))
        even = tree_map(lambda first, others: torch.cat([first, others], dim), even, rest)
    position = torch.arange(length, device=tree_leaves(elements)[0].device)
    order = position // 2 + position % 2 * ((length + 1) // 2)
    return tree_map(lambda a, b: torch.cat([a, b], dim).index_select(dim, order), even, odd)


class Running(NamedTuple):
    """Softmax attention over the tokens so far, before the division: a `Partial` that also counts without rounding.

    The logarithm in `Partial.lse` cannot tell n from n + 1 keys beyond about a million in fp32; the sums here can up
    to 16 million. `top` carries no gradient of the tokens: the sums carry all of it.
    """

    top: Float[Tensor, "*rows"]
    """The largest score; before any token the lowest finite number, so that a difference of two is never inf - inf."""
    total: Float[Tensor, "*rows"]
    """The sum of exp(score - top): 0 before any token, and at least 1 afterwards, the weight of the largest score."""
    weighted: Float[Tensor, "*rows dim"]
    """The sum of exp(score - top) * value."""

    @classmethod
    def empty(cls, *shape: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Running:
        """Attention over no tokens. The shape is (*rows, dim)."""
        weighted = torch.zeros(shape, device=device, dtype=dtype)
        return cls(weighted.new_full(shape[:-1], _lowest(weighted)), weighted.new_zeros(shape[:-1]), weighted)

    @classmethod
    def of(cls, partial: Partial) -> Running:
        """The same attention as the `Partial`."""
        total = (partial.lse > -math.inf).to(partial.out.dtype)
        return cls(partial.lse.clamp_min(_lowest(partial.lse)), total, partial.out)

    @property
    def out(self) -> Float[Tensor, "*rows dim"]:
        """The weighted mean of the values; zero before any token."""
        return self.weighted / _nonzero(self.total).unsqueeze(-1)

    @property
    def partial(self) -> Partial:
        """The same attention as a `Partial`, to be merged with others."""
        lse = self.top + _nonzero(self.total).log()
        return Partial(self.out, lse.masked_fill(self.total == 0, -math.inf))


def prefix_attention(
    scores: Float[Tensor, "batch heads tokens"],
    values: Float[Tensor, "batch heads tokens dim"],
    initial: Running | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "batch heads tokens dim"], Running]:
    """Softmax attention at every prefix, in O(tokens) time, and the state after the last token.

    out[i] = sum over j <= i of softmax(scores[..i])[j] * values[j], the tokens behind `initial` included. A score of
    -inf leaves its token out (padding); a prefix without tokens gives zero. Exact also where the largest score comes
    late: each row of a chunk is taken relative to its own running maximum. State and sums are at least fp32, the
    output has the dtype of the values.

    Source: "Attention as an RNN", section 3.2 and appendix; chunks in place of a Hillis-Steele scan, because matrix
    products are what processors are fast at.
    """
    if scores.shape != values.shape[:-1]:
        raise ValueError(
            f"scores must have the shape of values without dim, got {tuple(scores.shape)} and {tuple(values.shape)}"
        )
    precision = torch.promote_types(values.dtype, torch.float32)
    tokens, wide = values.shape[-2], values.to(precision)
    if initial is None:
        initial = Running.empty(*values.shape[:-2], values.shape[-1], device=values.device, dtype=precision)
    if tokens == 0:
        return values, initial
    if tokens == 1:
        running = _after(initial, scores.squeeze(-1).to(precision), wide.squeeze(-2))
        return running.out.unsqueeze(-2).to(values.dtype), running
    # Leaves of the scan: the state so far, then one leaf (score, 1, value) per token.
    before = torch.cat([initial.weighted, initial.total[..., None]], -1)[..., None, :]
    top = torch.cat([initial.top[..., None], scores.to(precision)], -1)
    with torch.autocast(values.device.type, enabled=False):
        top, sums = _prefixes(top, torch.cat([before, pad(wide, (0, 1), value=1.0)], -2), chunk)
    last = Running(top[..., -1], sums[..., -1, -1], sums[..., -1, :-1])
    weighted, total = sums[..., 1:, :-1], sums[..., 1:, -1:]
    return (weighted / _nonzero(total)).to(values.dtype), last


def plain_prefix_attention(
    scores: Float[Tensor, "batch heads tokens"],
    values: Float[Tensor, "batch heads tokens dim"],
    initial: Running | None = None,
) -> tuple[Float[Tensor, "batch heads tokens dim"], Running]:
    """The same as `prefix_attention`, by the definition: one merge per token."""
    precision = torch.promote_types(values.dtype, torch.float32)
    partial = Partial.empty(*values.shape[:-2], values.shape[-1], device=values.device, dtype=precision)
    partial = partial if initial is None else initial.partial
    outs = [partial.out]
    for score, value in zip(scores.to(precision).unbind(-1), values.to(precision).unbind(-2), strict=True):
        seen = (score > -math.inf)[..., None]
        partial = merge(partial, Partial(torch.where(seen, value, 0.0), score))
        outs.append(partial.out)
    return torch.stack(outs, -2)[..., 1:, :].to(values.dtype), Running.of(partial)


def _after(before: Running, score: Tensor, value: Tensor) -> Running:
    """The state after one more token."""
    top = torch.maximum(before.top, score).detach()
    keep, new = (before.top - top).exp(), (score - top).exp()
    total = torch.addcmul(new, before.total, keep)
    weighted = torch.addcmul(value * new.unsqueeze(-1), before.weighted, keep.unsqueeze(-1))
    return Running(top, total, weighted)


def _prefixes(top: Tensor, sums: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The running maximum of `top`, whose first entry is finite, and the running sums relative to it.

    Leaf j stands for exp(top[j]) * sums[j]. Within a chunk, prefix i is a row of one triangular matrix product. What
    comes before a chunk is a prefix over whole chunks: the same problem, `chunk` times shorter.
    """
    tokens = top.shape[-1]
    if tokens <= chunk:
        return _prefixes_of_chunk(top, sums, top[..., 0].detach())
    short, lowest = -tokens % chunk, _lowest(top)
    tops = pad(top, (0, short), value=-math.inf).unflatten(-1, (-1, chunk))
    parts = pad(sums, (0, 0, 0, short)).unflatten(-2, (-1, chunk))
    whole_top = tops.detach().amax(-1).clamp_min(lowest)
    whole = ((tops - whole_top[..., None]).exp()[..., None, :] @ parts).squeeze(-2)
    carry_top, carry = _prefixes(whole_top[..., :-1], whole[..., :-1, :], chunk)
    carry_top, carry = pad(carry_top, (1, 0), value=lowest), pad(carry, (0, 0, 1, 0))
    running, local = _prefixes_of_chunk(tops, parts, carry_top)
    keep = (carry_top[..., None] - running).exp()
    local = torch.addcmul(local, keep[..., None], carry[..., None, :])
    return running.flatten(-2)[..., :tokens], local.flatten(-3, -2)[..., :tokens, :]


def _prefixes_of_chunk(top: Tensor, sums: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    running = torch.maximum(top.detach().cummax(-1).values, floor[..., None])
    size = top.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=top.device).triu(1)
    weights = (top[..., None, :] - running[..., None]).masked_fill(later, -math.inf).exp()
    return running, weights @ sums


def _nonzero(total: Tensor) -> Tensor:
    """The sum, 1 before any token. Not `clamp_min(1.0)`: at exactly 1, a first token's, its gradient is 0."""
    return total.masked_fill(total == 0, 1.0)


def _lowest(like: Tensor) -> float:
    return torch.finfo(like.dtype).min
