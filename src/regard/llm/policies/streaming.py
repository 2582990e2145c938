"""StreamingLLM's cache: the first tokens and the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import override

from regard.attention.attend import attend
from regard.llm.cache import KVLayer, SinksAndRecentStore, Store
from regard.llm.policies.selected import some_queries
from regard.llm.policy import CachePolicy, bytes_per_token, kv_heads, require_budget
from regard.llm.visible import Visible


@dataclass(frozen=True)
class Streaming(CachePolicy):
    """Keeps the first `sinks` and the last `recent` tokens, in all heads alike.

    Keys keep the positions that they came with, as in DuoAttention; StreamingLLM itself numbers the tokens anew by
    their place in the cache, which lets it run beyond the model's context. A padded row's sinks are its first tokens
    after the padding.

    Source: "Efficient Streaming Language Models with Attention Sinks", section 3.2.
    """

    sinks: int = 4
    """Leading tokens that are never dropped."""
    recent: int = 256
    """Last tokens, the newest included."""

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")
        if self.recent < 1:
            raise ValueError(f"recent must be at least 1, the token itself, got {self.recent}")

    @override
    def layer(self, config: PretrainedConfig, index: int) -> StreamingLayer:
        return StreamingLayer(self.sinks, self.recent)

    @override
    def promised_bytes(self, config: PretrainedConfig, batch: int, tokens: int, itemsize: int = 4) -> int:
        held = min(tokens, self.sinks + self.recent)
        return batch * kv_heads(config) * held * bytes_per_token(config, itemsize)

    @override
    def with_budget(self, tokens: int, context: int) -> Streaming:
        require_budget(tokens, context)
        sinks = min(self.sinks, tokens - 1)
        return replace(self, sinks=sinks, recent=tokens - sinks)

    @override
    def unlimited(self) -> Streaming:
        return replace(self, recent=1 << 40)


class GrowingRing(SinksAndRecentStore):
    """Sinks and recent tokens in buffers that grow by whole blocks: for windows that are longer than most texts."""

    block = 256

    @override
    def write(
        self, key: Float[Tensor, "batch heads new dim"], value: Float[Tensor, "batch heads new dim_v"]
    ) -> tuple[Float[Tensor, "batch heads used dim"], Float[Tensor, "batch heads used dim_v"]]:
        needed = min(self.seen + key.shape[2], self.size)
        coded_key, coded_value = self.encode(key[:, :, :0], value[:, :, :0])  # what a buffer's rows look like
        self.keys = self._with_room(self.keys, coded_key, needed)
        self.values = self._with_room(self.values, coded_value, needed)
        return super().write(key, value)

    def _with_room(self, buffer: Tensor | None, new: Tensor, needed: int) -> Tensor:
        if buffer is not None and buffer.shape[2] >= needed:
            return buffer
        capacity = min(-(-needed // self.block) * self.block, self.size)
        larger = new.new_zeros(*new.shape[:2], capacity, new.shape[3])  # padded rows read slots not written yet
        if buffer is not None:
            larger[:, :, : self.used] = buffer[:, :, : self.used]
        return larger


class StreamingLayer(KVLayer):
    """Sinks and recent tokens of one layer.

    A long chunk goes through in blocks, so time and memory grow with its length and not with its square; the block is
    as long as the window, which makes the masked part of every block's keys at most half of them.
    """

    def __init__(self, sinks: int, recent: int) -> None:
        super().__init__()
        self.store = GrowingRing(sinks, recent)
        self.block = min(max(recent, 64), 512)

    @property
    @override
    def stores(self) -> Sequence[Store]:
        return (self.store,)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the last tokens can be taken back: as long as none has been dropped."""
        return self.store.seen <= self.store.size

    @override
    def crop(self, tokens_to_remove: int) -> None:
        removed = min(abs(tokens_to_remove), self.seen)
        if removed:
            self.store.crop(removed)
        self.seen -= removed

    @override
    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        self.store.begin(visible)
        if query.shape[2] == 1:
            keys, values = self.store.write(key, value)
            mask = None if visible.plain else self._mask(visible, self.store.positions(query.device))
            return attend(query, keys, values, mask=mask, scale=scale)
        outs = []
        for start in range(0, query.shape[2], self.block):
            stop = min(start + self.block, query.shape[2])
            outs.append(
                self._attend_block(
                    query[:, :, start:stop],
                    key[:, :, start:stop],
                    value[:, :, start:stop],
                    some_queries(visible, start, stop),
                    scale,
                )
            )
        return torch.cat(outs, dim=2)

    def _attend_block(self, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float) -> Tensor:
        store = self.store
        positions = torch.arange(visible.first, visible.seen, device=query.device)
        keys, values = key, value
        if store.keys is not None:
            held = store.positions(query.device)
            positions = torch.cat([held, positions.expand(*held.shape[:-1], -1)], dim=-1)
            held_keys, held_values = store.everything()
            keys, values = torch.cat([held_keys, key], dim=2), torch.cat([held_values, value], dim=2)
        out = attend(query, keys, values, mask=self._mask(visible, positions), scale=scale)
        store.write(key, value)
        return out

    def _mask(
        self, visible: Visible, positions: Int[Tensor, " keys"] | Int[Tensor, "rows 1 keys"]
    ) -> Bool[Tensor, "rows 1 queries keys"]:
        key = positions[..., None, :]
        query = torch.arange(visible.first, visible.seen, device=positions.device)[:, None]
        begin = 0 if self.store.padding is None else self.store.padding[:, None, None, None]
        return visible.at(positions) & ((key - begin < self.store.sinks) | (query - key < self.store.recent))
