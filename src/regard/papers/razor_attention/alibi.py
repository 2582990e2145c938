"""How far the heads of an ALiBi model can see: from their weights, without running the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

HeadWeights = Float[Tensor, "heads dim hidden"]
"""The query or key projection of one layer, as `nn.Linear` stores it, split into heads."""


def alibi_slopes(heads: int) -> Float[Tensor, " heads"]:
    """The slope of every head: what one token of distance takes off its scores.

    Source: "Train Short, Test Long" (Press et al., 2022), section 3, and its code where `heads` is no power of two.
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    between = [2.0 ** (-8.0 * (head + 1) / (2 * power)) for head in range(0, 2 * power, 2)]
    return torch.tensor(slopes + between[: heads - power])


def vision_scope(
    query: HeadWeights,
    key: HeadWeights,
    slopes: Float[Tensor, " heads"],
    norm_gain: Float[Tensor, " hidden"],
    norm_bias: Float[Tensor, " hidden"] | None = None,
    *,
    epsilon: float = 1e-5,
    scale: float = 1.0,
) -> Float[Tensor, " heads"]:
    """The distance in tokens beyond which each head's attention weights are at most epsilon.

    A head whose scope stays below the buffer loses nothing there; one with a larger scope is to be protected. Gain and
    bias are those of the norm before attention. `scale` is what the model multiplies its scores by; the paper writes
    none.

    Source: "RazorAttention", on ALiBi models: the vision scope.
    """
    if not 0.0 < epsilon < 1.0:
        raise ValueError(f"epsilon must be between 0 and 1, got {epsilon}")
    inputs = norm_gain.double().square().sum()
    if norm_bias is not None:
        inputs = inputs + norm_bias.double().square().sum()
    return (2 * scale * _spectral_norms(query, key) * inputs - math.log(epsilon)).float() / slopes


def _spectral_norms(query: HeadWeights, key: HeadWeights) -> Float[Tensor, " heads"]:
    """The largest singular value of each head's hidden x hidden form, by a QR of the two thin factors."""
    of_query, of_key = (torch.linalg.qr(weight.double().mT, mode="r").R for weight in (query, key))
    return torch.linalg.matrix_norm(of_query @ of_key.mT, ord=2)


def released_windows(
    layers: Sequence[tuple[HeadWeights, HeadWeights]],
    slopes: Float[Tensor, " heads"],
    *,
    theta: float = 1e-5,
    alpha: float = 100.0,
) -> Int64[Tensor, " heads"]:
    """The window of every head, the same in all layers, by the rule that msmodelslim's tool follows.

    It takes the root of the largest entry of the query-key form, over all layers, in place of its norm; the margin
    `alpha` is one of scores, and not of tokens. The tool itself splits a projection into heads by its inputs: for its
    very windows give `weight.unflatten(1, (heads, -1)).permute(1, 2, 0)`.

    Source: observed of the tool's compiled window finder.
    """
    if not 1e-5 <= theta <= 1e-3:
        raise ValueError(f"theta must be from 1e-5 to 1e-3, got {theta}")
    largest = torch.stack([(query.mT @ key).flatten(1).amax(1) for query, key in layers]).amax(0)
    return ((alpha + math.log(theta) + largest.clamp(min=0).sqrt()) / slopes).floor().long()
