"""A2SF: the tokens that have lately received most attention stay, old attention counting less with every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import override

from regard.llm.policies.selected import TILE, ScoredStore, SelectedLayer, attend_and_sum, best, some_queries
from regard.llm.policy import CachePolicy, bytes_per_token, kv_heads, require_budget
from regard.llm.visible import Visible
from regard.papers.a2sf.selection import Eviction, discounts, grouped_logits

Prefill = Literal["whole", "stepwise"]
PUBLISHED: dict[str, dict[str, Any]] = {
    "original": {"share": 0.2, "forgetting": 0.2, "recent": 0},
    "repository": {"budget": 256, "forgetting": 0.95, "recent": 16},
}
"""The authors' settings: the first release, whose budget is a share of the prompt, and their repository since then."""


@dataclass(frozen=True)
class A2SF(CachePolicy):
    """Keeps, for every KV head, the `budget` tokens with the highest score: attention received, discounted by its age.

    With every query that comes, all scores are multiplied by the forgetting factor and then grow by the attention that
    the query gives. A plain sum (factor 1, the score of H2O) favours old tokens, which more queries could see. Where
    query heads share a KV head, their attention is added up. Keys keep their positions.

    Source: "A2SF: Accumulative Attention Scoring with Forgetting Factor", section 3.
    """

    budget: int = 256
    """Tokens that every KV head keeps."""
    forgetting: float = 0.95
    """What is left of a score after one more query: 1 sums up all attention, 0 counts the last query's only."""
    recent: int = 16
    """How many of the tokens kept are the last ones, whatever their score; the newest stays even at 0."""
    streaming: int = 0
    """How many are the first ones of the text: a guard for small factors, as a model that loses them breaks down."""
    prefill: Prefill = "whole"
    """whole: a chunk of a prompt is read with full attention, and then the cache is cut to the budget. stepwise: every
    token of it is a step of decoding, after which one token leaves; slower, in constant memory between chunks, and the
    same however the prompt is cut into chunks."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {self.budget}")
        if not 0.0 <= self.forgetting <= 1.0:
            raise ValueError(f"forgetting must be from 0 (last query only) to 1 (plain sum), got {self.forgetting}")
        if not 0 <= self.recent <= self.budget:
            raise ValueError(f"recent must be from 0 to the budget of {self.budget} tokens, got {self.recent}")
        room = self.budget - max(self.recent, 1)
        if not 0 <= self.streaming <= room:
            raise ValueError(f"streaming must be from 0 to the {room} tokens that are not recent, got {self.streaming}")
        if self.prefill not in ("whole", "stepwise"):
            raise ValueError(f"prefill must be 'whole' or 'stepwise', got {self.prefill!r}")

    @classmethod
    def of_share(cls, prompt: int, share: float, **options: Any) -> A2SF:
        """The policy that keeps a share, above 0 and up to 1, of a prompt of so many tokens, all of it chosen by score.

        Other options come as usual; without them none of the tokens kept is there for being recent.
        """
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        if prompt < 1:
            raise ValueError(f"prompt must be at least 1 token, got {prompt}")
        return cls(**{"budget": max(math.floor(share * prompt + 0.5), 1), "recent": 0, **options})

    @classmethod
    def published(cls, name: str, prompt: int) -> A2SF:
        """A setting of the authors', by its name in `PUBLISHED`, for a prompt of so many tokens."""
        if name not in PUBLISHED:
            raise ValueError(f"name must be one of {', '.join(PUBLISHED)}, got {name!r}")
        setting = PUBLISHED[name]
        return cls.of_share(prompt, **setting) if "share" in setting else cls(**setting)

    @property
    def chunk_invariant(self) -> bool:  # type: ignore[override]
        """Whether the chunks of a prompt change nothing; a whole prefill cuts after each of them."""
        return self.prefill == "stepwise"

    @override
    def layer(self, config: PretrainedConfig, index: int) -> A2SFLayer:
        return A2SFLayer(self)

    @override
    def promised_bytes(self, config: PretrainedConfig, batch: int, tokens: int, itemsize: int = 4) -> int:
        return batch * kv_heads(config) * min(tokens, self.budget) * bytes_per_token(config, itemsize)

    @override
    def with_budget(self, tokens: int, context: int) -> A2SF:
        """The policy that keeps so many tokens; recent ones, and then the first ones, are reduced to what fits."""
        require_budget(tokens, context)
        recent = min(self.recent, tokens)
        return replace(self, budget=tokens, recent=recent, streaming=min(self.streaming, tokens - max(recent, 1)))

    @override
    def unlimited(self) -> A2SF:
        return replace(self, budget=1 << 40)


class A2SFLayer(SelectedLayer):
    """The tokens of one layer and their scores. One slot above the budget is for the token that arrives."""

    def __init__(self, policy: A2SF) -> None:
        super().__init__(ScoredStore(most=policy.budget + 1))
        self.policy = policy

    @override
    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        queries = query.shape[2]
        free = max(self.policy.budget - self.store.used, 0)
        if self.policy.prefill == "whole" or queries == 1 or queries <= free:
            return self._at_once(query, key, value, visible, scale)
        outs = []
        if free:  # as long as nothing has to leave, steps do not depend on each other
            q, k, v = (part[:, :, :free] for part in (query, key, value))
            outs.append(self._at_once(q, k, v, some_queries(visible, 0, free), scale))
        q, k, v = (part[:, :, free:] for part in (query, key, value))
        outs.append(self._one_by_one(q, k, v, some_queries(visible, free, queries), scale))
        return torch.cat(outs, dim=2)

    def _at_once(self, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float) -> Tensor:
        """All queries see all that is held; then what is above the budget leaves."""
        store, forgetting, queries = self.store, self.policy.forgetting, query.shape[2]
        store.append(key, value, visible.first)
        out, total = attend_and_sum(self, query, visible, scale, discounts(forgetting, queries, query.device))
        store.held("scores").mul_(forgetting**queries).add_(total)
        if store.used > self.policy.budget:
            self._evict(visible)
        return out

    def _evict(self, visible: Visible) -> None:
        store, policy = self.store, self.policy
        sinks, padded = self._sinks(visible), self.padded(visible)
        recent = store.held("positions") >= visible.seen - max(policy.recent, 1)
        worth = store.held("scores").masked_fill(recent, math.inf)
        if sinks is not None:
            worth = worth.masked_fill(sinks, math.inf)
        if padded is not None:
            worth = worth.masked_fill(padded, -math.inf)
        if store.used == policy.budget + 1:
            store.replace_by_last(worth.argmin(-1))
        else:
            store.keep(best(worth, policy.budget), spare=1)

    def _one_by_one(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Float[Tensor, "batch heads queries dim_v"]:
        """Every query sees what the steps before it have left; the budget is full when the first one comes."""
        store, policy, queries = self.store, self.policy, query.shape[2]
        keys, values = store.append(key, value, visible.first)
        positions = store.held("positions")
        eviction = Eviction(
            store.held("scores"),
            positions,
            forgetting=policy.forgetting,
            recent=policy.recent,
            sinks=self._sinks(visible),
            padded=self.padded(visible),
        )
        outs = []
        for start in range(0, queries, TILE):
            stop = min(start + TILE, queries)
            tile, reach = some_queries(visible, start, stop), policy.budget + stop
            logits = grouped_logits(query[:, :, start:stop], keys[:, :, :reach], scale)
            logits = logits.masked_fill(~tile.at(positions[..., :reach])[:, :, None], -math.inf)
            weights = torch.zeros_like(logits)
            for step in range(stop - start):
                own = policy.budget + start + step + 1
                weights[..., step, :own] = eviction.step(logits[..., step, :own], seen=tile.first + step + 1)
            outs.append(torch.einsum("bhgqk,bhkd->bhgqd", weights, values[:, :, :reach].float()).flatten(1, 2))
        store.keep(best(eviction.held.float(), policy.budget), spare=1)
        return torch.cat(outs, dim=2).to(query.dtype)

    def _sinks(self, visible: Visible) -> Bool[Tensor, "batch kv_heads used"] | None:
        """True at slots that hold one of the first tokens of their row; None where none is to be kept for that."""
        if not self.policy.streaming:
            return None
        place = self.store.held("positions")
        padding = visible.left_padding()
        if padding is not None:
            place = place - padding[:, None, None]
        return (place >= 0) & (place < self.policy.streaming)
