"""Recycled attention: all tokens are kept, most steps read the few that the last full step found, and none is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, max_pool1d
from transformers import PretrainedConfig
from typing_extensions import override

from regard.attention.attend import attend
from regard.attention.gathered import gathered_attention
from regard.llm.policies.full import Full, FullLayer
from regard.llm.policy import CachePolicy, head_dim, require_budget
from regard.llm.visible import Visible

Group = Literal["max", "mean", "first"]
ROTARY = ("gemma", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""Model types whose heads are turned as a whole, one half of the channels being the partners of the other."""
PUBLISHED: dict[str, dict[str, Any]] = {
    "recycled-attention": {"stride": 10},
    "llama-3.1-8b-qc5": {"check_every": 5, "similarity": 0.85},
    "llama-3.1-8b-qc10": {"check_every": 10, "similarity": 0.85},
    "qwen2-7b-qc5": {"check_every": 5, "similarity": 0.95},
    "qwen2-7b-qc10": {"check_every": 10, "similarity": 0.95},
}
"""The authors' settings: the fixed stride of the first version, then RefreshKV's models and intervals of checking."""


@dataclass(frozen=True)
class RecycledAttention(CachePolicy):
    """Keeps everything; most steps read `budget` tokens per KV head, those that the last full step looked at most.

    A full step attends to all tokens and chooses anew, so what one choice left out can come back: memory is that of
    full attention, reading is not. Between full steps each new token takes the place of the lowest of the chosen ones.
    Several tokens that come at once are read with full attention, the last of them chooses; so a prompt's chunks
    matter only where the last of them is one token, which is taken for a step of generation.

    Layers and rows of a batch decide each for itself whether a step is full.

    Source: "Recycled Attention", section 3; "RefreshKV" (its revision), section 3, for the schedule by similarity.
    """

    chunk_invariant: ClassVar[bool] = False

    budget: int = 256
    """Tokens that every KV head reads in a partial step, besides the new one."""
    stride: int = 10
    """Every so many steps one is full."""
    check_every: int | None = None
    """Takes the place of `stride`: after so many steps the queries are compared with those of the last full step, and
    again after as many more, until they differ and the step is full."""
    similarity: float = 0.85
    """Cosine of the two queries, each the mean over a layer's heads, below which a checked step is full."""
    kernel: int = 7
    """Neighbours whose scores are pooled, by their maximum, before the choice; an odd number."""
    group: Group = "max"
    """What query heads that share a KV head make of their scores: the maximum, the mean, or the first head's."""
    rotated: bool = True
    """Whether queries are compared as attention sees them, each turned to its position, or turned back."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {self.budget}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1 step, got {self.stride}")
        if self.check_every is not None and self.check_every < 1:
            raise ValueError(f"check_every must be at least 1 step, or None for a fixed stride, got {self.check_every}")
        if not -1.0 <= self.similarity <= 1.0:
            raise ValueError(f"similarity must be a cosine, from -1 to 1, got {self.similarity}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd number of tokens, got {self.kernel}")
        if self.group not in ("max", "mean", "first"):
            raise ValueError(f"group must be 'max', 'mean' or 'first', got {self.group!r}")

    @classmethod
    def published(cls, name: str, context: int) -> RecycledAttention:
        """A setting of the authors', by its name in `PUBLISHED`: its budget is an eighth of the context."""
        if name not in PUBLISHED:
            raise ValueError(f"name must be one of {', '.join(PUBLISHED)}, got {name!r}")
        if context < 1:
            raise ValueError(f"context must be at least 1 token, got {context}")
        return cls(budget=max(context // 8, 1), **PUBLISHED[name])

    @override
    def check(self, config: PretrainedConfig) -> None:
        if not self.rotated and self.check_every is not None:
            frequencies(config)

    @override
    def layer(self, config: PretrainedConfig, index: int) -> RecycledLayer:
        turned_back = not self.rotated and self.check_every is not None
        return RecycledLayer(self, frequencies(config) if turned_back else None)

    @override
    def promised_bytes(self, config: PretrainedConfig, batch: int, tokens: int, itemsize: int = 4) -> int:
        return Full().promised_bytes(config, batch, tokens, itemsize)

    @override
    def unlimited(self) -> RecycledAttention:
        return replace(self, budget=1 << 40)

    @override
    def with_budget(self, tokens: int, context: int) -> RecycledAttention:
        """The policy whose partial steps read `tokens`; everything is held all the same."""
        require_budget(tokens, context)
        return replace(self, budget=tokens)


class Choice(NamedTuple):
    """What each row's last full step chose, and what has happened since."""

    small: Int[Tensor, "batch kv_heads budget"]
    """The chosen positions by ascending score; -1 where a row sees fewer."""
    since: Int[Tensor, " batch"]
    """Tokens since the full step."""
    query: Float[Tensor, "batch dim"]
    """The query of the full step, the mean over heads."""

    def positions(self, seen: int) -> Int[Tensor, "batch kv_heads chosen"]:
        """What a partial step reads after `seen` tokens: the tokens since replace the lowest; the new one is last."""
        slot = torch.arange(self.small.shape[-1], device=self.small.device)
        since = self.since.clamp(max=len(slot))[:, None, None]
        index = torch.where(slot < since, seen - since + slot, self.small)
        return torch.cat([index, torch.full_like(index[..., :1], seen)], dim=-1)

    def replaced(self, rows: Bool[Tensor, " batch"], newer: Choice) -> Choice:
        """The choice in which these rows have the newer one."""
        pairs = zip(newer, self, strict=True)
        return Choice(*(torch.where(rows.view(-1, *[1] * (new.ndim - 1)), new, old) for new, old in pairs))


class RecycledLayer(FullLayer):
    """All tokens of one layer, and which of them the last full step chose.

    The small cache is a list of indices, so that tokens of partial steps need no copying: they are in the store anyway.
    """

    def __init__(self, policy: RecycledAttention, frequencies: Float[Tensor, " half"] | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.frequencies = frequencies
        """By which queries are turned back before they are compared; None where they are compared as they are."""
        self.choice: Choice | None = None
        """None as long as the budget holds everything, or where the next step must be full."""

    @override
    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        keys, values = self.store.append(key, value)
        choice = self.choice if query.shape[2] == 1 else None
        if choice is None or bool((full := self.full_rows(choice, query, visible)).all()):
            self.choice = self.choose(query, keys, visible, scale)
            return attend(query, keys, values, mask=visible.over(), scale=scale)
        self.choice = choice._replace(since=choice.since + 1)
        index = choice.positions(self.seen)
        allowed = None if visible.plain else visible.at(index)[:, :, 0]
        out = gathered_attention(query, keys, values, index.clamp(min=0), mask=allowed, scale=scale)
        if not full.any():
            return out
        newer = self.choose(query, keys, visible, scale)
        assert newer is not None  # a row that reads a choice holds more than the budget
        self.choice = self.choice.replaced(full, newer)
        everything = attend(query, keys, values, mask=visible.over(), scale=scale)
        return torch.where(full[:, None, None, None], everything, out)

    def full_rows(
        self, choice: Choice, query: Float[Tensor, "batch heads 1 dim"], visible: Visible
    ) -> Bool[Tensor, " batch"]:
        """The rows for which this step is full.

        Besides the schedule's, a step is full while the budget holds all that the new token sees, and when nothing
        that was chosen is left.
        """
        row = last_row(visible)
        seen = visible.seen if row is None else row.sum(-1)[:, 0, 0]
        return (seen <= self.policy.budget) | (choice.since >= self.policy.budget) | self.due(choice, query)

    def due(self, choice: Choice, query: Float[Tensor, "batch heads 1 dim"]) -> Bool[Tensor, " batch"]:
        """The rows for which the schedule wants a full step now."""
        steps = choice.since + 1
        if self.policy.check_every is None:
            return steps >= self.policy.stride
        mean = mean_query(query)
        if self.frequencies is not None:
            mean = turned_back(mean, steps, self.frequencies.to(mean.device))
        apart = cosine_similarity(mean, choice.query, dim=-1) < self.policy.similarity
        return (steps % self.policy.check_every == 0) & apart

    def choose(
        self,
        query: Float[Tensor, "batch heads queries dim"],
        keys: Float[Tensor, "batch kv_heads keys dim"],
        visible: Visible,
        scale: float,
    ) -> Choice | None:
        """What the last query chooses; None as long as the budget holds everything."""
        policy = self.policy
        if keys.shape[2] < policy.budget:
            return None
        row = last_row(visible)
        scores = pooled_scores(query[:, :, -1:], keys, row, scale, policy.kernel, policy.group)
        small = highest(scores, row, policy.budget)
        return Choice(small, small.new_zeros(len(small)), mean_query(query))

    @property
    @override
    def bookkeeping(self) -> Sequence[Tensor]:
        return () if self.choice is None else self.choice

    @override
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_rows(change)
        if self.choice is not None:
            self.choice = Choice(*map(change, self.choice))

    @override
    def take_over(self, other: FullLayer) -> None:
        """Holds a copy of what the other layer holds, and of its choice, where both choose alike.

        The choice of a smaller budget is the end of that of a larger one. Where there is none, the next step is full.
        """
        super().take_over(other)
        if not isinstance(other, RecycledLayer) or other.choice is None:
            return
        ours, theirs = self.policy, other.policy
        if (ours.kernel, ours.group) == (theirs.kernel, theirs.group) and ours.budget <= theirs.budget:
            small, since, query = other.choice
            self.choice = Choice(small[..., -ours.budget :].clone(), since.clone(), query.clone())

    @override
    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back; the next step is full, for the choice may have come from one of them."""
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.choice = None

    @override
    def reset(self) -> None:
        super().reset()
        self.choice = None


def mean_query(query: Float[Tensor, "batch heads queries dim"]) -> Float[Tensor, "batch dim"]:
    """The last query, the mean over heads."""
    return query[:, :, -1].float().mean(1)


def last_row(visible: Visible) -> Bool[Tensor, "rows heads 1 keys"] | None:
    """What the last query may see; None where that is everything."""
    mask = visible.over()
    return mask[..., -1:, :] if isinstance(mask, Tensor) else None


def pooled_scores(
    query: Float[Tensor, "batch heads 1 dim"],
    keys: Float[Tensor, "batch kv_heads keys dim"],
    row: Bool[Tensor, "rows row_heads 1 keys"] | None,
    scale: float,
    kernel: int,
    group: Group,
) -> Float[Tensor, "batch kv_heads keys"]:
    """One query's attention to every position, over each KV head's query heads and then over neighbours the maximum.

    Source: "RefreshKV", section 3; the pooling is SnapKV's.
    """
    grouped = query.float().reshape(len(query), keys.shape[1], -1, query.shape[-1])
    scores = grouped @ keys.float().mT * scale
    if row is not None:
        scores = scores.masked_fill(~row, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # a row of padding sees nothing
    of_group = weights[:, :, 0] if group == "first" else weights.amax(2) if group == "max" else weights.mean(2)
    return max_pool1d(of_group, kernel, stride=1, padding=kernel // 2)


def highest(
    scores: Float[Tensor, "batch kv_heads keys"], row: Bool[Tensor, "rows row_heads 1 keys"] | None, number: int
) -> Int[Tensor, "batch kv_heads number"]:
    """The positions of the highest scores, ascending; of equals the later is higher; -1 where too few are visible."""
    if row is not None:
        scores = scores.masked_fill(~row[:, :, 0], -torch.inf)
    ordered = scores.sort(dim=-1, stable=True)
    best = ordered.indices[..., -number:]
    return best.masked_fill(ordered.values[..., -number:] == -torch.inf, -1)


def turned_back(
    query: Float[Tensor, "batch dim"], steps: Int[Tensor, " batch"], frequencies: Float[Tensor, " half"]
) -> Float[Tensor, "batch dim"]:
    """Rotated queries, turned back by `steps` positions.

    Two queries `steps` apart have then the cosine of the unrotated ones: turning both by as much more changes nothing.
    """
    angle = steps[:, None] * frequencies
    first, second = query.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() + second * angle.sin(), second * angle.cos() - first * angle.sin()], dim=-1)


def frequencies(config: PretrainedConfig) -> Float[Tensor, " half"]:
    """How far each pair of channels turns from one position to the next.

    Raises ValueError, in one sentence, where the model's heads are not turned as a whole by the default rotation.
    """
    rotation = getattr(config, "rope_parameters", None) or {}
    kind, share = rotation.get("rope_type"), rotation.get("partial_rotary_factor", 1.0)
    if config.model_type not in ROTARY or kind != "default" or share != 1.0:
        raise ValueError(
            f"rotated=False needs a model with the default rotation ({', '.join(ROTARY)}), got {config.model_type!r} "
            f"with rotation {kind!r}"
        )
    dim = head_dim(config)
    return rotation["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
