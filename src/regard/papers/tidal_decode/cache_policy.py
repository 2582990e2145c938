"""TidalDecode: everything is kept, two layers choose what this token reads, and the layers above follow the choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import override

from regard.attention.attend import attend
from regard.attention.gathered import gathered_attention
from regard.llm.cache import PolicyCache
from regard.llm.codec import AS_IS
from regard.llm.policies.full import Full, FullLayer
from regard.llm.policy import CachePolicy, require_budget
from regard.llm.visible import Visible
from regard.papers.tidal_decode.correction import correct_every

Per = Literal["query", "kv"]
Reduce = Literal["sum", "max"]
Role = Literal["full", "choose", "follow"]

PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"select": 2, "reselect": 7},
    "longchat-7b": {"select": 2, "reselect": 7},
    "llama-3-8b": {"select": 2, "reselect": 13},
    "llama-3.1-8b": {"select": 2, "reselect": 13},
    "llama-3.2-3b": {"select": 2, "reselect": 12},
    "llama-3-70b": {"select": 2, "reselect": 14},
    "smollm2-135m-instruct": {"select": 2, "reselect": 15},
}
"""The layers that choose, by model: the paper's, and for SmolLM2 what `regard train tidal_decode` finds."""


@dataclass(frozen=True)
class TidalDecode(CachePolicy):
    """Keeps everything; a generated token reads `budget` tokens per head in most layers, the same ones in all of them.

    Layers below `select` read everything. Layers `select` and `reselect` do so, too, and choose for every head the
    tokens of highest score; the other layers read, of their own keys and values, the positions of the latest choice.
    Every token chooses anew, so nothing is lost: memory is that of full attention, reading is not.

    Several tokens that come at once are read with full attention. So a prompt's chunks matter where one of them is a
    single token, which is taken for a step of generation; chunks of two tokens and more all give the same.

    In models with sliding windows a layer reads what of the choice it can see.

    Source: "TidalDecode", section 3 and algorithm 1.
    """

    chunk_invariant: ClassVar[bool] = False

    budget: int = 256
    """Tokens that a head reads in the layers which follow a choice."""
    select: int = 2
    """The first layer that chooses; layers are counted from 0."""
    reselect: int | None = 15
    """The layer that chooses anew; None for none. It depends on the model: 15 is SmolLM2-135M's. Search it for yours
    with `regard train tidal_decode`, or see `TidalDecode.published`."""
    per: Per = "query"
    """Whether every query head chooses, as in the paper, or the query heads that share a KV head choose together."""
    reduce: Reduce = "sum"
    """What query heads that choose together make of their scores."""
    keep_last: bool = False
    """Whether the newest token is always among the chosen ones."""
    correct_every: int | None = None
    """After so many tokens were generated they are read again with full attention, and what the cache holds of them is
    replaced; None for never, as in the paper's evaluation."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {self.budget}")
        if self.select < 0:
            raise ValueError(f"select must be a layer, counted from 0, got {self.select}")
        if self.reselect is not None and self.reselect <= self.select:
            raise ValueError(f"reselect must be a layer after select = {self.select}, got {self.reselect}")
        if self.per not in ("query", "kv"):
            raise ValueError(f"per must be 'query' or 'kv', got {self.per!r}")
        if self.reduce not in ("sum", "max"):
            raise ValueError(f"reduce must be 'sum' or 'max', got {self.reduce!r}")
        if self.correct_every is not None and self.correct_every < 2:
            raise ValueError(f"correct_every must be at least 2 tokens, or None for never, got {self.correct_every}")

    @classmethod
    def published(cls, model: str, **options: Any) -> TidalDecode:
        """The policy with the layers published for a model, by its name in `PUBLISHED`."""
        if model not in PUBLISHED:
            raise ValueError(f"model must be one of {', '.join(PUBLISHED)}, got {model!r}")
        return cls(**{**PUBLISHED[model], **options})

    def role(self, index: int) -> Role:
        """What the layer of that index does in a step of generation."""
        if index in (self.select, self.reselect):
            return "choose"
        return "full" if index < self.select else "follow"

    @override
    def check(self, config: PretrainedConfig) -> None:
        last = self.select if self.reselect is None else self.reselect
        if last >= config.num_hidden_layers:
            name = "select" if self.reselect is None else "reselect"
            raise ValueError(
                f"{name} must be below {config.num_hidden_layers}, the layers of the model, got {last}; "
                "regard train tidal_decode finds the layer for a model"
            )

    @override
    def layer(self, config: PretrainedConfig, index: int) -> TidalLayer:
        return TidalLayer(self, index, Selection())

    @override
    def cache(self, model: PreTrainedModel) -> PolicyCache:
        config = model.config.get_text_config()
        self.check(config)
        selection = Selection()
        layers = [TidalLayer(self, index, selection) for index in range(config.num_hidden_layers)]
        cache = PolicyCache(list(layers), model=model.base_model)
        if self.correct_every is not None:
            correct_every(self.correct_every, model.base_model, cache)
        return cache

    @override
    def promised_bytes(self, config: PretrainedConfig, batch: int, tokens: int, itemsize: int = 4) -> int:
        return Full().promised_bytes(config, batch, tokens, itemsize)

    def entries_read(self, config: PretrainedConfig, tokens: int) -> int:
        """Keys that one query head reads, in all layers together, in the step of generation that makes it `tokens`.

        Source: "TidalDecode", section 3.3.
        """
        follow = sum(self.role(index) == "follow" for index in range(config.num_hidden_layers))
        return (config.num_hidden_layers - follow) * tokens + follow * min(self.budget, tokens)

    @override
    def unlimited(self) -> TidalDecode:
        return replace(self, budget=1 << 40)

    @override
    def with_budget(self, tokens: int, context: int) -> TidalDecode:
        """The policy whose layers read `tokens` where they follow a choice; everything is held all the same."""
        require_budget(tokens, context)
        return replace(self, budget=tokens)

    @override
    def fit(self, model: PreTrainedModel, texts: Sequence[str]) -> TidalDecode:
        """The policy with the `reselect` that is best for this model, for passkeys hidden in the texts.

        The texts are tokenised as the model's folder or id says.
        """
        from transformers import AutoTokenizer

        from regard.llm.longcontext import Haystack
        from regard.papers.tidal_decode.search import Search, find_layer

        haystack = Haystack(AutoTokenizer.from_pretrained(model.name_or_path), "\n\n".join(texts))
        return replace(self, reselect=find_layer(model, haystack, self, Search()).best)


class Choice(NamedTuple):
    """What a layer chose for the newest token."""

    positions: Int[Tensor, "batch groups chosen"]
    """Of every query head, or of every KV head; in no order."""
    ragged: bool
    """Whether some may be -1, where a row sees fewer than are chosen."""


class Selection:
    """The latest choice of this step, which all layers of one cache share. It does not outlive the step."""

    def __init__(self) -> None:
        self.latest: Choice | None = None
        """None where everything is to be read: before the first choice, and while the budget holds all tokens."""


class TidalLayer(FullLayer):
    """All tokens of one layer, and the selection that it has a part in."""

    def __init__(self, policy: TidalDecode, index: int, selection: Selection) -> None:
        super().__init__()
        self.policy = policy
        self.index = index
        self.role = policy.role(index)
        self.selection = selection
        self.uncorrected: Int[Tensor, "batch tokens"] | None = None
        """In the first layer, where the policy corrects the cache: the tokens since the last correction."""

    @override
    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        if self.index == 0:
            self.selection.latest = None
        step = query.shape[2] == 1
        if step and self.role == "follow" and self.selection.latest is not None:
            self.store.append(key, value)
            return self.attend_to(self.selection.latest, query, visible, scale)
        keys, values = self.store.append(key, value)
        if step and self.role == "choose":
            everything = keys.shape[2] <= self.policy.budget
            self.selection.latest = None if everything else choose(query, keys, visible, self.policy)
        return attend(query, keys, values, mask=visible.over(), scale=scale)

    def attend_to(
        self, choice: Choice, query: Float[Tensor, "batch heads 1 dim"], visible: Visible, scale: float
    ) -> Float[Tensor, "batch heads 1 dim_v"]:
        """Attention over this layer's keys and values at the chosen positions, as far as the layer sees them."""
        index, mask = choice.positions, None
        if choice.ragged or not visible.plain:
            index, mask = index.clamp(min=0), visible.at(index)[:, :, 0]
        store = self.store
        assert store.keys is not None and store.values is not None
        if store.codec is AS_IS:
            keys, values = store.keys[:, :, : store.used], store.values[:, :, : store.used]
            return gathered_attention(query, keys, values, index, mask=mask, scale=scale)
        batch, groups, chosen = index.shape
        keys, values = store.chosen(index.view(batch, store.keys.shape[1], -1))
        keys, values = (each.reshape(batch, groups, chosen, -1) for each in (keys, values))
        everyone = torch.arange(chosen, device=index.device).expand_as(index)
        return gathered_attention(query, keys, values, everyone, mask=mask, scale=scale)

    @property
    @override
    def bookkeeping(self) -> Sequence[Tensor]:
        return () if self.uncorrected is None else (self.uncorrected,)

    @override
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_rows(change)
        if self.uncorrected is not None:
            self.uncorrected = change(self.uncorrected)

    @override
    def take_over(self, other: FullLayer) -> None:
        super().take_over(other)
        if isinstance(other, TidalLayer) and other.uncorrected is not None:
            self.uncorrected = other.uncorrected.clone()

    @override
    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.uncorrected is not None:
            left = self.uncorrected.shape[1] - abs(tokens_to_remove)
            self.uncorrected = self.uncorrected[:, :left] if left > 0 else None

    @override
    def reset(self) -> None:
        super().reset()
        self.selection.latest = self.uncorrected = None


def choose(
    query: Float[Tensor, "batch heads 1 dim"],
    keys: Float[Tensor, "batch kv_heads keys dim"],
    visible: Visible,
    policy: TidalDecode,
) -> Choice:
    """The positions of the `budget` highest inner products, of each query head or of each KV head.

    In fp32 or better, where few scores are equal: in half precision many are. Of hidden keys none is chosen.
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(precision).reshape(len(query), keys.shape[1], -1, query.shape[-1])
    scores = grouped @ keys.to(precision).mT
    if policy.per == "query":
        scores = scores.flatten(1, 2)
    else:
        scores = scores.sum(2) if policy.reduce == "sum" else scores.amax(2)
    row = visible.over()
    if isinstance(row, Tensor):
        scores = scores.masked_fill(~row[:, :, 0], -torch.inf)
    if policy.keep_last:
        scores[..., -1] = torch.inf
    highest = scores.topk(policy.budget, sorted=False)
    if not isinstance(row, Tensor):
        return Choice(highest.indices, ragged=False)
    return Choice(highest.indices.masked_fill(highest.values == -torch.inf, -1), ragged=True)
