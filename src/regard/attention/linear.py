"""Linear attention as a state scan: a chunk of tokens reads a state and advances it.

Where the weight of a value is a product of features, `phi(query) . phi(key)`, everything that later queries need of
the earlier tokens is the sum of `phi(key) value^T`. So one function covers the three forms of the literature, by the
size of its chunks: parallel (`chunk >= tokens`), chunked, recurrent (`chunk = 1`). Their equality is a law, held by
`tests/attention/test_linear.py` together with the plain loop `linear_attention_reference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["FeatureMap", "Identity", "LinearState", "Taylor", "linear_attention", "linear_attention_reference"]


class LinearState(NamedTuple):
    """All that linear attention keeps of the tokens it has read; float32, or float64 where the inputs are."""

    kv: Tensor
    """(batch, heads, features, value_dim): the decayed sum of `phi(key) value^T`."""
    k: Tensor
    """(batch, heads, features): the decayed sum of `phi(key)`; no features where there is no normaliser."""


@runtime_checkable
class FeatureMap(Protocol):
    """The map `phi` of queries and keys to features, and the similarity that it stands for."""

    def size(self, dim: int) -> int:
        """How many features a vector of `dim` numbers has."""
        ...

    def __call__(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows features"]:
        """The features `phi(x)`."""
        ...

    def similarity(
        self, q: Float[Tensor, "*rows queries dim"], k: Float[Tensor, "*rows keys dim"]
    ) -> Float[Tensor, "*rows queries keys"]:
        """`phi(q) . phi(k)` for all pairs, without the features where a closed form exists."""
        ...


@dataclass(frozen=True)
class Identity:
    """Features that the caller has already applied to queries and keys, or none at all."""

    def size(self, dim: int) -> int:
        """The number of features: as many as numbers."""
        return dim

    def __call__(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """The vectors themselves."""
        return x

    def similarity(
        self, q: Float[Tensor, "*rows queries dim"], k: Float[Tensor, "*rows keys dim"]
    ) -> Float[Tensor, "*rows queries keys"]:
        """The dot products of all pairs."""
        return q @ k.transpose(-1, -2)


@dataclass(frozen=True)
class Taylor:
    """The second-order Taylor polynomial of `exp(q . k / sqrt(dim))`, which is always positive.

    Source: "Simple linear attention language models balance the recall-throughput tradeoff", section 3.1.
    """

    dim: int
    """Numbers per query and key."""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, got {self.dim}")

    def size(self, dim: int) -> int:
        """The number of features: 1 + dim + dim^2."""
        if dim != self.dim:
            raise ValueError(f"queries and keys must have dim {self.dim} for Taylor({self.dim}), got {dim}")
        return 1 + dim + dim * dim

    def __call__(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows features"]:
        """`[1, x / dim^(1/4), vec(x x^T) / sqrt(2 dim)]`."""
        linear = x.transpose(-1, -2).contiguous() * self.dim**-0.25  # products of whole rows are several times faster
        square = (linear[..., :, None, :] * (linear * math.sqrt(0.5))[..., None, :, :]).flatten(-3, -2)
        return torch.cat([torch.ones_like(linear[..., :1, :]), linear, square], dim=-2).transpose(-1, -2)

    def similarity(
        self, q: Float[Tensor, "*rows queries dim"], k: Float[Tensor, "*rows keys dim"]
    ) -> Float[Tensor, "*rows queries keys"]:
        """`1 + s + s^2 / 2` of the scaled products s, for all pairs."""
        scores = (q * self.dim**-0.5) @ k.transpose(-1, -2)
        return torch.addcmul(1 + scores, scores, scores, value=0.5)


def linear_attention(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    v: Float[Tensor, "batch heads tokens value_dim"],
    *,
    feature_map: FeatureMap = Identity(),
    decay: Float[Tensor, ...] | None = None,
    eps: float | None = 1e-12,
    state: LinearState | None = None,
    chunk: int = 128,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], LinearState]:
    """The attended values, and the state after the last token.

    `out_t = sum_s w_ts v_s / (sum_s w_ts + eps)` over the tokens s <= t, `w_ts = phi(q_t) . D_ts phi(k_s)`, where D_ts
    is the product of the decays of the tokens s+1 .. t. The result does not depend on `chunk`, beyond rounding.

    `decay` is the logarithm of the decay, at most 0 and finite, and broadcasts to (batch, heads, tokens, features):
    (heads, 1, 1) is a constant per head, (batch, heads, tokens, 1) a gate per token, and features in the last place a
    decay per channel. `eps=None` leaves the denominator out. Sums are in float32 whatever the inputs and autocast,
    in float64 for float64 inputs; the output has the dtype of v.

    Time and memory per token grow with `chunk * (dim + value_dim) + features * value_dim`; with a decay per channel,
    with `chunk * features`, and closed similarities are of no use there: take chunks of about 16.

    Raises ValueError where shapes, `chunk` or a state from other sizes do not fit.

    Source: "Transformers are RNNs", section 3; the chunked form with decay of "Lightning Attention", algorithm 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    batch, heads, tokens, _ = q.shape
    features = feature_map.size(q.shape[-1])
    precise = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    sums = features if eps is not None else 0
    held = _checked(state, (batch, heads, features, v.shape[-1]), sums, precise)
    log_decay = _per_token(decay, (batch, heads, tokens, features))

    with torch.autocast(q.device.type, enabled=False):
        outs = []
        for start in range(0, tokens, chunk):
            piece = slice(start, start + chunk)
            out, held = _chunk(
                q[:, :, piece].to(precise),
                k[:, :, piece].to(precise),
                v[:, :, piece].to(precise),
                feature_map,
                None if log_decay is None else log_decay[:, :, piece].to(precise),
                eps,
                held,
            )
            outs.append(out.to(v.dtype))
    if held is None:
        held = LinearState(
            q.new_zeros(batch, heads, features, v.shape[-1], dtype=precise),
            q.new_zeros(batch, heads, sums, dtype=precise),
        )
    return torch.cat(outs, dim=2) if outs else torch.empty_like(v), held


def _chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    decay: Tensor | None,
    eps: float | None,
    state: LinearState | None,
) -> tuple[Tensor, LinearState]:
    """The output of one chunk and the state after it; `state` None stands for no tokens before."""
    key_features = feature_map(k)
    if decay is None:
        weights = feature_map.similarity(q, k).tril()
        key_features_at_end = key_features
    else:
        since_start = decay.cumsum(dim=2)
        between = _decay_between(since_start)
        if decay.shape[-1] == 1:
            weights = feature_map.similarity(q, k) * between[..., 0]
        else:
            weights = torch.einsum("bhtf,bhsf,bhtsf->bhts", feature_map(q), key_features, between)
        key_features_at_end = key_features * (since_start[:, :, -1:] - since_start).exp()

    out = weights @ v
    kv = key_features_at_end.transpose(-1, -2) @ v
    if state is not None:
        query_features = feature_map(q)
        before = state.kv
        if decay is not None:
            query_features = query_features * since_start.exp()
            survival = since_start[:, :, -1].exp()
            before = before * survival[..., None]
        out = out + query_features @ state.kv
        kv = kv + before
    if eps is None:
        return out, LinearState(kv, kv.new_zeros(*kv.shape[:2], 0))

    mass = weights.sum(dim=-1, keepdim=True)
    key_sum = key_features_at_end.sum(dim=2)
    if state is not None:
        mass = mass + query_features @ state.k[..., None]
        key_sum = key_sum + (state.k if decay is None else state.k * survival)
    return out / (mass + eps), LinearState(kv, key_sum)


def _decay_between(since_start: Tensor) -> Tensor:
    """What of token s is left at token t, (..., t, s, features), zero where s > t.

    The difference is taken before the exponential: the factors `exp(t)` and `exp(-s)` alone would overflow.
    """
    tokens = since_start.shape[2]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=since_start.device).triu(1)
    difference = since_start[:, :, :, None] - since_start[:, :, None]
    return difference.masked_fill(later[..., None], -math.inf).exp()


def _per_token(decay: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """The log-decay with all four axes, and its tokens written out."""
    if decay is None:
        return None
    sizes = zip(reversed(decay.shape), reversed(shape), strict=False)
    if decay.dim() > 4 or not all(size in (1, full) for size, full in sizes):
        raise ValueError(
            f"decay must broadcast to (batch, heads, tokens, features) = {shape}, got {tuple(decay.shape)}"
        )
    decay = decay[(None,) * (4 - decay.dim())]
    return decay.expand(-1, -1, shape[2], -1)


def _checked(
    state: LinearState | None, shape: tuple[int, int, int, int], sums: int, dtype: torch.dtype
) -> LinearState | None:
    """The state in that precision, if it is one of these sizes."""
    if state is None:
        return None
    expected = (shape, (*shape[:2], sums))
    got = (tuple(state.kv.shape), tuple(state.k.shape))
    if got != expected:
        raise ValueError(f"the state must have kv of {expected[0]} and k of {expected[1]}, got {got[0]} and {got[1]}")
    return LinearState(state.kv.to(dtype), state.k.to(dtype))


def linear_attention_reference(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads tokens dim"],
    v: Float[Tensor, "batch heads tokens value_dim"],
    *,
    feature_map: FeatureMap = Identity(),
    decay: Float[Tensor, ...] | None = None,
    eps: float | None = 1e-12,
    state: LinearState | None = None,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], LinearState]:
    """The same as `linear_attention`, as its recurrence reads, one token at a time: the plain oracle of the tests."""
    batch, heads, tokens, _ = q.shape
    features, value_dim = feature_map.size(q.shape[-1]), v.shape[-1]
    log_decay = q.new_zeros(()) if decay is None else decay
    kept = log_decay.expand(batch, heads, tokens, features).exp()
    kv = q.new_zeros(batch, heads, features, value_dim) if state is None else state.kv
    key_sum = q.new_zeros(batch, heads, features) if state is None or eps is None else state.k
    out = torch.zeros_like(v)
    for t in range(tokens):
        query, key = feature_map(q[:, :, t]), feature_map(k[:, :, t])
        kv = kept[:, :, t, :, None] * kv + key[..., :, None] * v[:, :, t, None, :]
        key_sum = kept[:, :, t] * key_sum + key
        attended = (query[..., None] * kv).sum(dim=-2)
        if eps is not None:
            attended = attended / ((query * key_sum).sum(dim=-1, keepdim=True) + eps)
        out[:, :, t] = attended
    return out, LinearState(kv, key_sum if eps is not None else key_sum[..., :0])
