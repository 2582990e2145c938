"""The policy that drops nothing: the yardstick of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import override

from regard.attention.attend import attend
from regard.llm.cache import GrowingStore, KVLayer, Store
from regard.llm.policy import CachePolicy, bytes_per_token, kv_heads
from regard.llm.visible import Visible


@dataclass(frozen=True)
class Full(CachePolicy):
    """Keeps every token of every head, as the untouched model does."""

    @override
    def layer(self, config: PretrainedConfig, index: int) -> FullLayer:
        return FullLayer()

    @override
    def promised_bytes(self, config: PretrainedConfig, batch: int, tokens: int, itemsize: int = 4) -> int:
        return batch * kv_heads(config) * tokens * bytes_per_token(config, itemsize)

    @override
    def unlimited(self) -> Full:
        return self


class FullLayer(KVLayer):
    """All tokens of one layer."""

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.store = GrowingStore()

    @property
    @override
    def stores(self) -> Sequence[Store]:
        return (self.store,)

    @override
    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        keys, values = self.store.append(key, value)
        return attend(query, keys, values, mask=visible.over(), scale=scale)

    @override
    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        removed = min(-tokens_to_remove, self.seen)
        self.store.crop(removed)
        self.seen -= removed
