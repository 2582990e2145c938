"""What policies share that choose, for every KV head, which tokens to keep by the attention these receive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from regard.attention.attend import attend
from regard.llm.cache import KVLayer, Store
from regard.llm.visible import Visible

TILE = 128
"""Queries whose attention weights are held at once while attention is summed up."""


class SelectedStore(Store):
    """Tokens that every row and KV head has chosen for itself, with the position of each.

    Buffers grow by whole blocks, up to `most` slots where that is given; `keep` moves what is kept into buffers of its
    own size, so that the rest is truly freed.
    """

    buffers: tuple[str, ...] = ("keys", "values", "positions")
    """The tensors [batch, heads, capacity, ...] that stay aligned."""

    def __init__(self, most: int | None = None, block: int = 256) -> None:
        super().__init__()
        self.most = most
        self.block = block
        self.positions: Tensor | None = None

    def append(
        self, key: Float[Tensor, "batch heads new dim"], value: Float[Tensor, "batch heads new dim_v"], first: int
    ) -> tuple[Float[Tensor, "batch heads used dim"], Float[Tensor, "batch heads used dim_v"]]:
        """Everything held, the new tokens last, of which the first has position `first`.

        Views, where nothing has to be decoded.
        """
        position = torch.arange(first, first + key.shape[2], device=key.device, dtype=torch.int32)
        positions = position.expand(*key.shape[:2], -1)
        key, value = self.encode(key, value)
        return self._append(keys=key, values=value, positions=positions)

    def _append(self, **new: Tensor) -> tuple[Tensor, Tensor]:
        used = self.used + new["keys"].shape[2]
        for name, more in new.items():
            setattr(self, name, self._with_room(getattr(self, name), more, used))
            getattr(self, name)[:, :, self.used : used] = more
        self.used = used
        return self.held("keys"), self.held("values")

    def _with_room(self, buffer: Tensor | None, new: Tensor, used: int) -> Tensor:
        if buffer is not None and buffer.shape[2] >= used:
            return buffer
        capacity = -(-used // self.block) * self.block
        if self.most is not None:
            capacity = max(min(capacity, self.most), used)
        larger = new.new_empty(*new.shape[:2], capacity, *new.shape[3:])
        if buffer is not None:
            larger[:, :, : self.used] = buffer[:, :, : self.used]
        return larger

    def held(self, name: str) -> Tensor:
        """The slots in use of one buffer, (batch, heads, used, ...); keys and values decoded."""
        buffer: Tensor = getattr(self, name)[:, :, : self.used]
        if name not in ("keys", "values"):
            return buffer
        assert self.dtype is not None
        return self.codec.decode(buffer, self.dtype)

    def keep(self, slots: Int[Tensor, "batch heads kept"], spare: int = 0) -> None:
        """Drops all but these slots, which come in the order given; the new buffers have `spare` free slots."""
        kept = slots.shape[-1]
        for name in self.buffers:
            buffer: Tensor = getattr(self, name)
            index = slots if buffer.ndim == 3 else slots[..., None].expand(-1, -1, -1, buffer.shape[-1])
            compact = buffer.new_empty(*buffer.shape[:2], kept + spare, *buffer.shape[3:])
            compact[:, :, :kept] = buffer.gather(2, index)
            setattr(self, name, compact)
        self.used = kept

    def replace_by_last(self, slot: Int[Tensor, "batch heads"]) -> None:
        """Drops the token of one slot per row and head: the last token takes its place."""
        last = self.used - 1
        for name in self.buffers:
            buffer: Tensor = getattr(self, name)
            index = slot[..., None] if buffer.ndim == 3 else slot[..., None, None].expand(-1, -1, 1, buffer.shape[-1])
            buffer.scatter_(2, index, buffer[:, :, last : last + 1].clone())
        self.used = last

    @override
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in self.buffers:
            buffer = getattr(self, name)
            setattr(self, name, None if buffer is None else change(buffer))

    @override
    def reset(self) -> None:
        for name in self.buffers:
            setattr(self, name, None)
        self.used = 0


class ScoredStore(SelectedStore):
    """Chosen tokens with a running score of each, in fp32."""

    buffers = ("keys", "values", "positions", "scores")

    def __init__(self, most: int | None = None, block: int = 256) -> None:
        super().__init__(most, block)
        self.scores: Tensor | None = None

    @override
    def _append(self, **new: Tensor) -> tuple[Tensor, Tensor]:
        return super()._append(**new, scores=new["keys"].new_zeros(new["keys"].shape[:3], dtype=torch.float32))


class SelectedLayer(KVLayer):
    """A layer whose heads choose tokens."""

    def __init__(self, store: SelectedStore) -> None:
        super().__init__()
        self.store = store

    @property
    @override
    def stores(self) -> Sequence[Store]:
        return (self.store,)

    @property
    @override
    def bookkeeping(self) -> Sequence[Tensor]:
        return [self.store.held(name) for name in self.store.buffers[2:]] if self.store.used else []

    def mask(self, visible: Visible, groups: int) -> Bool[Tensor, "rows heads queries keys"] | None:
        """Which held tokens the queries may see; None where all see all. `groups` query heads share a KV head."""
        if visible.plain and visible.queries == 1:
            return None
        mask = visible.at(self.store.held("positions"))
        return mask.repeat_interleave(groups, dim=1) if mask.shape[1] > 1 else mask

    def padded(self, visible: Visible) -> Bool[Tensor, "batch heads used"] | None:
        """True at slots that hold a padding token; None where no row has any."""
        if visible.padding is None:
            return None
        row = torch.arange(len(visible.padding), device=visible.padding.device)[:, None, None]
        return ~visible.padding.bool()[row, self.store.held("positions")]


def some_queries(visible: Visible, start: int, stop: int) -> Visible:
    """The visibility of the queries `start` to `stop - 1` of a forward pass, as if they were its last.

    Its padding goes on to the end of the pass, for the later tokens may be held already.
    """
    return Visible(visible.rule, visible.first + start, stop - start, visible.padding, visible.device)


def received(
    weights: Float[Tensor, "batch heads queries keys"],
    kv_heads: int,
    counts: Float[Tensor, " queries"] | None = None,
) -> Float[Tensor, "batch kv_heads keys"]:
    """The attention that every key receives, summed over queries and over the query heads of its KV head.

    A query counts 1, or what `counts` says.
    """
    grouped = weights.unflatten(1, (kv_heads, -1))
    return grouped.sum((2, 3)) if counts is None else torch.einsum("bhgqk,q->bhk", grouped, counts.to(weights))


def attend_and_sum(
    layer: SelectedLayer,
    query: Float[Tensor, "batch heads queries dim"],
    visible: Visible,
    scale: float,
    counts: Float[Tensor, " queries"] | None = None,
) -> tuple[Float[Tensor, "batch heads queries dim_v"], Float[Tensor, "batch kv_heads keys"]]:
    """The attention over all that the layer holds, the new tokens last, and the attention that every token received.

    Queries go in tiles of 128, so the weights of all queries are never held at once. In the sum a query counts 1, or
    what `counts` says.
    """
    keys, values = layer.store.held("keys"), layer.store.held("values")
    queries, kv_heads = query.shape[2], keys.shape[1]
    held = keys.shape[2] - queries
    outs, total = [], torch.zeros(keys.shape[:3], device=keys.device)
    for start in range(0, queries, TILE):
        stop = min(start + TILE, queries)
        reach = held + stop  # later tokens are in later slots, which these queries do not see
        mask = layer.mask(some_queries(visible, start, stop), query.shape[1] // kv_heads)
        tile = attend(
            query[:, :, start:stop],
            keys[:, :, :reach],
            values[:, :, :reach],
            mask=None if mask is None else mask[..., :reach],
            scale=scale,
            need_weights=True,
        )
        assert tile.weights is not None
        outs.append(tile.out)
        total[:, :, :reach] += received(tile.weights, kv_heads, None if counts is None else counts[start:stop])
    return torch.cat(outs, dim=2), total


def best(worth: Float[Tensor, "batch heads slots"], number: int) -> Int[Tensor, "batch heads number"]:
    """The slots of the highest worth, in their own order; of equals the first, so padding cannot change the choice."""
    return worth.sort(dim=-1, descending=True, stable=True).indices[..., :number].sort(dim=-1).values
