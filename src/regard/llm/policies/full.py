"""The policy that drops nothing: the yardstick of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import override

from regard.attention.attend import attend
from regard.llm.cache import GrowingStore, KVLayer, PolicyCache, Store
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
    """All tokens of one layer. Policies that hold everything and read a part of it build on it."""

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

    def take_over(self, other: FullLayer) -> None:
        """Holds a copy of what the other layer holds, and goes on from there."""
        keys, values = other.store.everything()
        self.reset()
        self.lazy_initialization(keys, values)
        self.store.append(keys, values)
        self.seen = other.seen

    @override
    def crop(self, tokens_to_remove: int) -> None:
        removed = min(abs(tokens_to_remove), self.seen)
        self.store.crop(removed)
        self.seen -= removed


def forked(cache: PolicyCache, policy: CachePolicy, model: PreTrainedModel) -> PolicyCache:
    """A cache of a policy that holds everything, going on from a copy of what `cache` holds, which stays as it is.

    So several policies can share one reading of a prompt. Raises ValueError where either of the two does not hold every
    token in one store.
    """
    fork = policy.cache(model)
    for ours, theirs in zip(fork.layers, cache.layers, strict=True):
        if not isinstance(ours, FullLayer) or not isinstance(theirs, FullLayer):
            raise ValueError(
                f"only caches that hold everything can be forked, got layers of {type(theirs).__name__} "
                f"for {type(policy).__name__}"
            )
        ours.take_over(theirs)
    return fork
