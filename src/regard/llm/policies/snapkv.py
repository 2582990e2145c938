"""SnapKV: the end of the prompt tells which of its tokens the answer will need."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, max_pool1d
from transformers import PretrainedConfig
from typing_extensions import override

from regard.attention.attend import attend
from regard.llm.policies.selected import SelectedLayer, SelectedStore, best, received, some_queries
from regard.llm.policy import CachePolicy, bytes_per_token, kv_heads, require_budget
from regard.llm.visible import Visible


@dataclass(frozen=True)
class SnapKV(CachePolicy):
    """Cuts a prompt, for every KV head, to `budget` tokens; what is generated afterwards is kept in full.

    The last `window` tokens of the prompt are kept and vote, by their attention, for the tokens before them; pooling
    over `kernel` neighbours keeps the surroundings of what they look at. Several tokens that come at once are taken
    for a prompt, so in a conversation every turn is cut together with what is left of the earlier ones. Where query
    heads share a KV head, their votes are added up, for the paper's models have no groups.

    Source: "SnapKV: LLM Knows What You are Looking for Before Generation", section 4 and listing 1; window and kernel
    as in its LongBench experiments.
    """

    chunk_invariant: ClassVar[bool] = False

    budget: int = 256
    """Tokens of the prompt that every KV head keeps, the window included."""
    window: int = 32
    """Last tokens of the prompt, which vote and are kept."""
    kernel: int = 7
    """Neighbours pooled together; an odd number."""
    pooling: Literal["max", "average"] = "max"
    """How they are pooled."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {self.budget}")
        if not 1 <= self.window <= self.budget:
            raise ValueError(f"window must be from 1 to the budget of {self.budget} tokens, got {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd number of tokens, got {self.kernel}")
        if self.pooling not in ("max", "average"):
            raise ValueError(f"pooling must be 'max' or 'average', got {self.pooling!r}")

    @override
    def layer(self, config: PretrainedConfig, index: int) -> SnapKVLayer:
        return SnapKVLayer(self)

    @override
    def promised_bytes(
        self, config: PretrainedConfig, batch: int, tokens: int, itemsize: int = 4, *, prompt: int | None = None
    ) -> int:
        """The most bytes after `tokens` tokens, of which the first `prompt` came at once: without it, none did."""
        cut = 0 if prompt is None else max(min(prompt, tokens) - self.budget, 0)
        return batch * kv_heads(config) * (tokens - cut) * bytes_per_token(config, itemsize)

    @override
    def with_budget(self, tokens: int, context: int) -> SnapKV:
        require_budget(tokens, context)
        return replace(self, budget=tokens, window=min(self.window, tokens))

    @override
    def unlimited(self) -> SnapKV:
        return replace(self, budget=1 << 40)


class SnapKVLayer(SelectedLayer):
    """The tokens of one layer that the end of the prompt voted for, and all tokens generated since."""

    def __init__(self, policy: SnapKV) -> None:
        super().__init__(SelectedStore())
        self.policy = policy

    @override
    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        whole = self.seen == 0
        keys, values = self.store.append(key, value, self.seen)
        groups = query.shape[1] // key.shape[1]
        mask = visible.over() if whole else self.mask(visible, groups)
        out = attend(query, keys, values, mask=mask, scale=scale)
        if query.shape[2] > 1 and self.store.used > self.policy.budget:
            self._cut(query, visible, scale)
        return out

    def _cut(self, query: Tensor, visible: Visible, scale: float) -> None:
        store, window = self.store, self.policy.window
        keys, values = store.held("keys"), store.held("values")
        voters = query[:, :, -window:]
        last = some_queries(visible, visible.queries - voters.shape[2], visible.queries)
        mask = self.mask(last, query.shape[1] // keys.shape[1])
        attended = attend(voters, keys, values, mask=mask, scale=scale, need_weights=True)
        assert attended.weights is not None
        kept = store.held("positions") >= visible.seen - window
        votes = self._pooled(received(attended.weights, keys.shape[1]).masked_fill(kept, 0.0))
        votes = votes.masked_fill(kept, math.inf)
        padded = self.padded(visible)
        if padded is not None:
            votes = votes.masked_fill(padded, -math.inf)
        store.keep(best(votes, self.policy.budget))

    def _pooled(self, votes: Float[Tensor, "batch heads keys"]) -> Float[Tensor, "batch heads keys"]:
        pool = max_pool1d if self.policy.pooling == "max" else avg_pool1d
        return pool(votes, self.policy.kernel, stride=1, padding=self.policy.kernel // 2)
