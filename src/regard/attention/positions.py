"""Where a token is, told to attention: sinusoids added to tokens, rotations of queries and keys, biases on scores.

Every function takes the positions themselves, so chunks, caches with evicted keys and padded batches need no cases.
"""

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn


def sinusoid(positions: Real[Tensor, "*rows"], dim: int, *, base: float = 10000.0) -> Float[Tensor, "*rows dim"]:
    """The sinusoidal code of each position, in fp32: sines in the even channels, cosines in the odd ones.

    Raises ValueError where `dim` is not positive and even.

    Source: "Attention Is All You Need" (Vaswani et al., 2017), section 3.5.
    """
    angles = _angles(positions, dim, base, torch.float32)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def rotary_half(
    x: Float[Tensor, "*lead tokens dim"], positions: Real[Tensor, "*batch tokens"], base: float = 10000.0
) -> Float[Tensor, "*lead tokens dim"]:
    """Queries or keys, each pair of channels (i, i + dim/2) turned by an angle that grows with the position.

    `positions` is (tokens,), the same for all, or (batch, tokens), where batch is the first dimension of `x`. The
    rotation is computed in fp32 or better. Raises ValueError where `dim` is odd or `positions` fits neither shape.

    Source: "RoFormer" (Su et al., 2021), section 3.4, with the channel pairs as in GPT-NeoX and Llama checkpoints.
    """
    cos, sin = _rotation(x, positions, base)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rotary_interleaved(
    x: Float[Tensor, "*lead tokens dim"], positions: Real[Tensor, "*batch tokens"], base: float = 10000.0
) -> Float[Tensor, "*lead tokens dim"]:
    """Queries or keys, each pair of channels (2i, 2i + 1) turned by an angle that grows with the position.

    `positions` is (tokens,), the same for all, or (batch, tokens), where batch is the first dimension of `x`. The
    rotation is computed in fp32 or better. Raises ValueError where `dim` is odd or `positions` fits neither shape.

    Source: "RoFormer" (Su et al., 2021), section 3.4.2, eq. 34.
    """
    cos, sin = _rotation(x, positions, base)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


def alibi_slopes(heads: int) -> Float[Tensor, "heads"]:
    """How fast each head's bias falls with distance: a geometric sequence from 2^(-8/heads) down to 2^-8.

    Where `heads` is no power of two, the slopes of the next lower power, then every other one of the next higher.
    Raises ValueError where `heads` is not positive.

    Source: "Train Short, Test Long" (Press et al., 2022), section 3; other numbers of heads as in its released code.
    """
    if heads < 1:
        raise ValueError(f"heads must be positive, got {heads}")
    lower = 1 << (heads.bit_length() - 1)
    exponents = [8 * (head + 1) / lower for head in range(lower)]
    exponents += [8 * (2 * head + 1) / (2 * lower) for head in range(heads - lower)]
    return 2.0 ** -torch.tensor(exponents)


def alibi(
    slopes: Float[Tensor, "heads"], query_positions: Real[Tensor, "queries"], key_positions: Real[Tensor, "keys"]
) -> Float[Tensor, "heads queries keys"]:
    """The bias that lowers a score in proportion to the distance, at one slope per head.

    The paper's attention is causal; here a key after the query is as far as the same key before it.

    Source: "Train Short, Test Long" (Press et al., 2022), section 3.
    """
    distance = (query_positions[:, None] - key_positions[None, :]).abs()
    return -slopes.to(distance.device)[:, None, None] * distance


class RelativeBias(nn.Module):
    """A learnt bias per head and distance; distances beyond `max_distance` on either side share the last entry.

    Starts at zero. Raises ValueError where `num_heads` is not positive or `max_distance` is negative.

    Source: "Self-Attention with Relative Position Representations" (Shaw et al., 2018), eq. 5 for the clipping, with
    one number per head added to the score as in T5 (Raffel et al., 2020), section 2.1.
    """

    def __init__(self, num_heads: int, max_distance: int) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be positive, got {num_heads}")
        if max_distance < 0:
            raise ValueError(f"max_distance must not be negative, got {max_distance}")
        self.max_distance = max_distance
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * max_distance + 1))

    def forward(
        self, query_positions: Real[Tensor, "queries"], key_positions: Real[Tensor, "keys"]
    ) -> Float[Tensor, "heads queries keys"]:
        """The bias of every query on every key; column `max_distance + d` serves keys d after the query."""
        ahead = key_positions[None, :] - query_positions[:, None]
        column = ahead.clamp(-self.max_distance, self.max_distance) + self.max_distance
        return self.table[:, column.long()]


def _angles(positions: Real[Tensor, "*rows"], dim: int, base: float, dtype: torch.dtype) -> Float[Tensor, "*rows half"]:
    """One angle per position and pair of channels, slowing geometrically from 1 to nearly 1/base a step."""
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be positive and even, got {dim}")
    pair = torch.arange(0, dim, 2, device=positions.device, dtype=dtype)
    return positions.to(dtype)[..., None] * base ** (-pair / dim)


def _rotation(
    x: Float[Tensor, "*lead tokens dim"], positions: Real[Tensor, "*batch tokens"], base: float
) -> tuple[Float[Tensor, "*some tokens half"], Float[Tensor, "*some tokens half"]]:
    """Cosines and sines that broadcast over the dimensions of `x` between the batch and the tokens."""
    shared, per_batch = x.shape[-2:-1], x.shape[:1] + x.shape[-2:-1]
    if positions.shape != shared and (x.ndim < 3 or positions.shape != per_batch):
        raise ValueError(
            f"positions must be (tokens,) or (batch, tokens) of x, got {tuple(positions.shape)} for {tuple(x.shape)}"
        )
    # half precision cannot count past 2048 (fp16) or 256 (bf16)
    angles = _angles(positions, x.shape[-1], base, torch.promote_types(x.dtype, torch.float32))
    if positions.ndim == 2:
        angles = angles.view(x.shape[0], *[1] * (x.ndim - 3), *angles.shape[-2:])
    return angles.cos(), angles.sin()
