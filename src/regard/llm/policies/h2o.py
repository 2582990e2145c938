"""H2O: keep the tokens that have received most attention so far, and the recent ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import override

from regard.llm.policies.selected import ScoredStore, SelectedLayer, attend_and_sum, best
from regard.llm.policy import CachePolicy, bytes_per_token, kv_heads, require_budget
from regard.llm.visible import Visible


@dataclass(frozen=True)
class H2O(CachePolicy):
    """Keeps, for every KV head, `budget` tokens: the `recent` last ones and the heavy hitters among the others.

    A token's score is the sum of the attention it has received from all queries so far. A prompt is read with full
    attention, and then cut to the budget; in generation one token leaves for every one that comes. Where query heads
    share a KV head, their attention is added up, for the paper's models have no groups. Keys keep their positions.

    Source: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference", section 4 and algorithm 1.
    """

    chunk_invariant: ClassVar[bool] = False

    budget: int = 256
    """Tokens that every KV head keeps."""
    recent: int | None = None
    """How many of them are the last ones; half of the budget where not given, as in the paper."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {self.budget}")
        if self.recent is not None and not 1 <= self.recent <= self.budget:
            raise ValueError(f"recent must be from 1 to the budget of {self.budget} tokens, got {self.recent}")

    @override
    def layer(self, config: PretrainedConfig, index: int) -> H2OLayer:
        recent = max(self.budget // 2, 1) if self.recent is None else self.recent
        return H2OLayer(self.budget, recent)

    @override
    def promised_bytes(self, config: PretrainedConfig, batch: int, tokens: int, itemsize: int = 4) -> int:
        return batch * kv_heads(config) * min(tokens, self.budget) * bytes_per_token(config, itemsize)

    @override
    def with_budget(self, tokens: int, context: int) -> H2O:
        require_budget(tokens, context)
        return replace(self, budget=tokens, recent=None if self.recent is None else min(self.recent, tokens))

    @override
    def unlimited(self) -> H2O:
        return replace(self, budget=1 << 40)


class H2OLayer(SelectedLayer):
    """Heavy hitters and recent tokens of one layer. One slot above the budget is for the token that arrives."""

    def __init__(self, budget: int, recent: int) -> None:
        super().__init__(ScoredStore(most=budget + 1))
        self.budget = budget
        self.recent = recent

    @override
    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        store = self.store
        store.append(key, value, self.seen)
        out, total = attend_and_sum(self, query, visible, scale)
        store.held("scores").add_(total)
        if store.used > self.budget:
            self._evict(visible)
        return out

    def _evict(self, visible: Visible) -> None:
        store, padded = self.store, self.padded(visible)
        recent = store.held("positions") >= visible.seen - self.recent
        worth = store.held("scores").masked_fill(recent, math.inf)
        if padded is not None:
            worth = worth.masked_fill(padded, -math.inf)
        if store.used == self.budget + 1:
            store.replace_by_last(worth.argmin(-1))
        else:
            store.keep(best(worth, self.budget), spare=1)
