"""Softmax attention whose query is learnt and constant, so that every prefix has an O(1) update."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.attention.merge import Partial, merge, partial_attention
from regard.attention.scan import Running, prefix_attention
from regard.blocks.sequence_mixer import SequenceMixer


class Projections(nn.Module):
    """The four maps of multi-head attention, under the names that Aaren and its host Transformer share."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a positive multiple of num_heads, got dim {dim} and num_heads {num_heads}")
        self.dim, self.num_heads = dim, num_heads
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def heads(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch heads tokens head_dim"]:
        """The channels of each head apart."""
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.dim // self.num_heads).transpose(1, 2)


class Aaren(Projections):
    """Aaren(q, h): the attention of one query, the same for every input, over every prefix of the tokens."""

    def forward(
        self,
        query: Float[Tensor, "dim"],
        x: Float[Tensor, "batch tokens dim"],
        state: Running | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Running]:
        """What the query reads from every prefix, and the running attention after the last token.

        A token where `mask` is False is padding, and read by no prefix.

        Source: "Attention as an RNN", section 3.3; scores are scaled by 1 / sqrt(head_dim) as in the Transformer that
        Aaren takes the place of, where the paper's formula has no scale.
        """
        read, state = prefix_attention(self.scores(query, x, mask), self.heads(self.v_proj(x)), state)
        return self.out_proj(read.transpose(1, 2).flatten(2)), state

    def scores(
        self,
        query: Float[Tensor, "dim"],
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens"]:
        """How well each token meets the query, -inf for padding."""
        q, k = self.heads(self.q_proj(query).view(1, 1, -1)), self.heads(self.k_proj(x))
        scores = (k * q).sum(-1) * q.shape[-1] ** -0.5
        return scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)


class AarenAttention(SequenceMixer):
    """Aaren with a learnt query of its own: a drop-in for causal self-attention whose state has a constant size.

    The state is dim + 2 * num_heads numbers per stream, in fp32.
    """

    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__()
        self.query = learnt_query(dim)
        self.attn = Aaren(dim, num_heads)

    def initial(self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Running:
        """Attention over no tokens; `dtype` below fp32 is raised to it."""
        return no_tokens(self.attn, batch, device, dtype)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        state: Running | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Running]:
        """What the learnt query reads from every prefix, and the state; `mask` is False on padding."""
        return self.attn(self.query, x, state, mask)


def learnt_query(dim: int) -> nn.Parameter:
    """A query token that training shapes; it is projected by W_q like any token."""
    return nn.Parameter(torch.randn(dim) * 0.02)


def no_tokens(attn: Aaren, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Running:
    """The state of Aaren before any token."""
    precision = torch.promote_types(dtype or torch.float32, torch.float32)
    device = attn.v_proj.weight.device if device is None else device
    return Running.empty(batch, attn.num_heads, attn.dim // attn.num_heads, device=device, dtype=precision)


def read_in_blocks(
    query: Float[Tensor, "batch heads queries dim"],
    blocks: Iterable[tuple[Float[Tensor, "batch heads keys dim"], Float[Tensor, "batch heads keys value_dim"]]],
) -> Partial:
    """Attention over all keys of all blocks, holding one block at a time: O(block) memory for any number of tokens.

    This is attention as a many-to-one recurrent network; the blocks (keys, values) may come from a generator, and
    have any lengths. Raises ValueError where there is no block.

    Source: "Attention as an RNN", section 3.1, the block-by-block form.
    """
    read: Partial | None = None
    for keys, values in blocks:
        part = partial_attention(query, keys, values)
        read = part if read is None else merge(read, part)
    if read is None:
        raise ValueError("blocks must hold at least one pair of keys and values, got none")
    return read
