"""Which query may attend to which key: one rule per mask, combined by `&`, `|` and `~`.

A rule speaks of absolute positions, so that one mask serves a whole sequence, a chunk of it, one decoded token and a
cache with evicted keys. From the rule come a boolean tensor, a table of blocks, and FlexAttention's block mask.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query position, key position), all integers, all broadcasting -> may the query attend to the key?"""

T = TypeVar("T")
QueryPositions = Int[Tensor, "#batch #heads queries"] | Int[Tensor, "#batch queries"] | Int[Tensor, " queries"]
KeyPositions = Int[Tensor, "#batch #heads keys"] | Int[Tensor, "#batch keys"] | Int[Tensor, " keys"]

BLOCK = 128
"""Tokens on a side of a block: FlexAttention's default."""


class BlockTable(NamedTuple):
    """What a mask does to each block of queries and keys; blocks at the end may be short."""

    some: Bool[Tensor, "#batch #heads query_blocks key_blocks"]
    """At least one query of the block attends to at least one key of it."""
    every: Bool[Tensor, "#batch #heads query_blocks key_blocks"]
    """The block is of full size, and every query of it attends to every key of it."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A rule for who attends to whom, with what it needs to know about sizes."""

    rule: Rule
    """The signature of FlexAttention's `mask_mod`, over absolute positions."""
    batch: int | None = None
    """The batch size that the rule is for; None: any."""
    heads: int | None = None
    """The number of query heads that the rule is for; None: any."""
    query_tokens: int | None = None
    """How many query positions the rule knows; None: all."""
    key_tokens: int | None = None
    """How many key positions the rule knows; None: all."""
    _made: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict, init=False, repr=False)

    def __and__(self, other: Mask) -> Mask:
        """Allowed by both."""
        return self._with(other, lambda *where: self.rule(*where) & other.rule(*where))

    def __or__(self, other: Mask) -> Mask:
        """Allowed by either."""
        return self._with(other, lambda *where: self.rule(*where) | other.rule(*where))

    def __invert__(self) -> Mask:
        """Allowed where this one forbids."""
        return self._with(self, lambda *where: ~self.rule(*where))

    def tensor(
        self,
        queries: int,
        keys: int,
        *,
        offset: int | None = None,
        batch: int | None = None,
        heads: int | None = None,
        device: torch.device | str | None = None,
    ) -> Bool[Tensor, "#batch #heads queries keys"]:
        """True where query `offset + i` may attend to key `j`; batch and heads are 1 where the rule ignores them.

        `offset` is the position of the first query; by default the queries are the last ones, as in decoding. Raises
        ValueError where a size is negative or does not fit the mask.
        """
        offset = self._check(queries, keys, offset)
        positions = torch.arange(max(keys, offset + queries, 0), device=device)
        return self._at(positions[offset : offset + queries], positions[:keys], batch, heads)

    def tensor_at(
        self,
        query_positions: QueryPositions,
        key_positions: KeyPositions,
        *,
        batch: int | None = None,
        heads: int | None = None,
    ) -> Bool[Tensor, "#batch #heads queries keys"]:
        """True where the query at one position may attend to the key at another.

        Positions are (tokens,), (batch, tokens) or (batch, heads, tokens): a cache that evicts keys per row or per head
        says which it still holds. They must be positions that the rule knows; looking would cost a host sync.
        """
        return self._at(query_positions, key_positions, batch, heads)

    def block_table(
        self,
        queries: int,
        keys: int,
        *,
        offset: int | None = None,
        batch: int | None = None,
        heads: int | None = None,
        device: torch.device | str | None = None,
    ) -> BlockTable:
        """What the mask does to each block of 128 queries by 128 keys. Kept for the next call with the same sizes."""
        offset = self._check(queries, keys, offset)
        device = torch.device(device or "cpu")

        def make() -> BlockTable:
            some, every = [], []
            for start in range(0, queries, BLOCK):  # a row of blocks at a time, to spare memory at long lengths
                rows = min(BLOCK, queries - start)
                row = self.tensor(rows, keys, offset=offset + start, batch=batch, heads=heads, device=device)
                row = F.pad(row, (0, -keys % BLOCK)).unflatten(-1, (-1, BLOCK))
                some.append(row.any(-1).any(-2))
                every.append(row.all(-1).all(-2) & (rows == BLOCK))
            if not keys or not queries:
                none = torch.zeros(1, 1, -(-queries // BLOCK), -(-keys // BLOCK), dtype=torch.bool, device=device)
                return BlockTable(none, none)
            return BlockTable(torch.stack(some, -2), torch.stack(every, -2))

        return self.remember(("table", queries, keys, offset, batch, heads, device), make)

    def block_mask(
        self,
        queries: int,
        keys: int,
        *,
        offset: int | None = None,
        batch: int | None = None,
        heads: int | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The same mask for `torch.nn.attention.flex_attention`. Kept for the next call with the same sizes.

        Raises ValueError where a size is not positive or does not fit the mask.
        """
        if queries < 1 or keys < 1:
            raise ValueError(f"a block mask needs queries and keys, got {queries} queries and {keys} keys")
        offset = self._check(queries, keys, offset)
        device = torch.device(device or "cpu")

        def make() -> BlockMask:
            from torch.nn.attention.flex_attention import BlockMask

            table = self.block_table(queries, keys, offset=offset, batch=batch, heads=heads, device=device)
            # a tensor, so that one compiled kernel serves every offset
            first = torch.tensor(offset, device=device)
            return BlockMask.from_kv_blocks(
                *_ordered(table.some & ~table.every),
                *_ordered(table.every),
                BLOCK_SIZE=BLOCK,
                mask_mod=lambda batch, head, query, key: self.rule(batch, head, query + first, key),
                seq_lengths=(queries, keys),
            )

        return self.remember(("block mask", queries, keys, offset, batch, heads, device), make)

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave for this key, from the last few keys asked for: layers share what is made from a mask."""
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        made = make()
        self._made[key] = made
        while len(self._made) > 6:
            self._made.popitem(last=False)
        return made

    def _at(
        self, query_positions: Tensor, key_positions: Tensor, batch: int | None, heads: int | None
    ) -> Bool[Tensor, "#batch #heads queries keys"]:
        query, key = _of_four(query_positions)[..., :, None], _of_four(key_positions)[..., None, :]
        batch, heads = _agreed("batch", self.batch, batch), _agreed("heads", self.heads, heads)
        rows = torch.arange(max(query.shape[0], key.shape[0]) if batch is None else batch, device=query.device)
        columns = torch.arange(max(query.shape[1], key.shape[1]) if heads is None else heads, device=query.device)
        allowed = self.rule(rows[:, None, None, None], columns[:, None, None], query, key)
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            kind = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
            raise TypeError(f"the rule of a mask must return a boolean tensor, got {kind}")
        while allowed.ndim < 4:
            allowed = allowed[None]
        return allowed.expand(*allowed.shape[:2], query.shape[-2], key.shape[-1])

    def _check(self, queries: int, keys: int, offset: int | None) -> int:
        """The offset, by default that of the last queries."""
        if queries < 0 or keys < 0:
            raise ValueError(f"queries and keys must not be negative, got {queries} queries and {keys} keys")
        if offset is None:
            if queries > keys:
                raise ValueError(f"{queries} queries cannot be the last of {keys} keys: give the offset")
            offset = keys - queries
        if offset < 0:
            raise ValueError(f"offset must not be negative, got {offset}")
        if self.query_tokens is not None and queries and offset + queries > self.query_tokens:
            raise ValueError(f"the mask is for {self.query_tokens} query positions, got {offset + queries}")
        if self.key_tokens is not None and keys > self.key_tokens:
            raise ValueError(f"the mask is for {self.key_tokens} key positions, got {keys}")
        return offset

    def _with(self, other: Mask, rule: Rule) -> Mask:
        return Mask(
            rule,
            batch=_agreed("batch", self.batch, other.batch),
            heads=_agreed("heads", self.heads, other.heads),
            query_tokens=_smaller(self.query_tokens, other.query_tokens),
            key_tokens=_smaller(self.key_tokens, other.key_tokens),
        )


@lru_cache(maxsize=1)
def causal() -> Mask:
    """Every key up to the query itself."""
    return Mask(lambda batch, head, query, key: key <= query)


@lru_cache(maxsize=64)
def window(n: int) -> Mask:
    """The last `n` keys up to the query itself, which counts: distances 0 to n - 1."""
    if n < 1:
        raise ValueError(f"window must be positive, got {n}")
    return Mask(lambda batch, head, query, key: (key <= query) & (query - key < n))


@lru_cache(maxsize=64)
def prefix(n: int) -> Mask:
    """The first `n` keys, for every query, also an earlier one: `prefix(n) | causal()` is a prefix language model's."""
    if n < 0:
        raise ValueError(f"prefix must not be negative, got {n}")
    return Mask(lambda batch, head, query, key: key < n)


@lru_cache(maxsize=64)
def sinks_and_window(sinks: int, recent: int) -> Mask:
    """The first `sinks` keys and the last `recent` ones, of those up to the query itself.

    Source: "Efficient Streaming Language Models with Attention Sinks" (Xiao et al., 2024), section 3.2.
    """
    if sinks < 0:
        raise ValueError(f"sinks must not be negative, got {sinks}")
    if recent < 1:
        raise ValueError(f"recent must be positive, got {recent}")
    return causal() & (prefix(sinks) | window(recent))


def document(ids: Int[Tensor, "batch tokens"] | Int[Tensor, " tokens"]) -> Mask:
    """The keys of the query's own document; `ids` names each token's document, per batch row or for all rows.

    `ids` may cover more tokens than a call has, so that one mask serves every chunk of a sequence. Raises ValueError
    where `ids` has other dimensions.
    """
    if ids.ndim not in (1, 2):
        raise ValueError(f"ids must be (tokens,) or (batch, tokens), got {tuple(ids.shape)}")

    tokens = ids.shape[-1]
    if ids.ndim == 1:
        return Mask(
            lambda batch, head, query, key: ids.to(query.device)[query] == ids.to(key.device)[key],
            query_tokens=tokens,
            key_tokens=tokens,
        )
    return Mask(
        lambda batch, head, query, key: ids.to(query.device)[batch, query] == ids.to(key.device)[batch, key],
        batch=ids.shape[0],
        query_tokens=tokens,
        key_tokens=tokens,
    )


def block(table: Bool[Tensor, "query_blocks key_blocks"], size: int) -> Mask:
    """The keys in the blocks that the table allows to the query's block; blocks are `size` tokens long.

    Raises ValueError where the table is not a boolean matrix or `size` is not positive.
    """
    if table.ndim != 2 or table.dtype != torch.bool:
        raise ValueError(f"table must be a boolean matrix, got {table.dtype} of shape {tuple(table.shape)}")
    if size < 1:
        raise ValueError(f"size must be positive, got {size}")
    return Mask(
        lambda batch, head, query, key: table.to(query.device)[query // size, key // size],
        query_tokens=table.shape[0] * size,
        key_tokens=table.shape[1] * size,
    )


def _of_four(positions: Tensor) -> Int[Tensor, "#batch #heads tokens"]:
    if positions.ndim not in (1, 2, 3):
        raise ValueError(
            f"positions must be (tokens,), (batch, tokens) or (batch, heads, tokens), got {tuple(positions.shape)}"
        )
    return positions[:, None] if positions.ndim == 2 else positions.view(*[1] * (3 - positions.ndim), *positions.shape)


def _ordered(
    blocks: Bool[Tensor, "#batch #heads query_blocks key_blocks"],
) -> tuple[Int[Tensor, "#batch #heads query_blocks"], Int[Tensor, "#batch #heads query_blocks key_blocks"]]:
    """FlexAttention's form of a table: how many key blocks each query block has, and their indices, those first."""
    first = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), first.to(torch.int32)


def _agreed(name: str, one: int | None, other: int | None) -> int | None:
    if one is not None and other is not None and one != other:
        raise ValueError(f"the mask is for {name} of {one}, got {other}")
    return other if one is None else one


def _smaller(one: int | None, other: int | None) -> int | None:
    return one if other is None else other if one is None else min(one, other)
