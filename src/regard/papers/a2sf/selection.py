"""Scores with forgetting, and which keys every query of a sequence still sees where the lowest score leaves."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

Logits = Float[Tensor, "batch kv_heads group queries keys"]
"""Scaled scores before the softmax, the query heads that share a KV head in one group."""


def discounts(forgetting: float, queries: int, device: torch.device | None = None) -> Float[Tensor, " queries"]:
    """The weight of each query in the scores: 1 for the last, less by the factor for every step back.

    Source: A2SF, section 3: a^(n - q). From whole exponents, so that old queries go to 0 without accumulated rounding.
    """
    return torch.pow(forgetting, torch.arange(queries - 1, -1, -1, device=device))


class Eviction:
    """The slots of a layer that are still held, while queries come one after the other and each evicts one slot.

    Every KV head decides for itself. Among equals the first slot leaves.
    """

    def __init__(
        self,
        scores: Float[Tensor, "batch kv_heads keys"],
        positions: Int[Tensor, "batch kv_heads keys"],
        *,
        forgetting: float,
        recent: int,
        sinks: Bool[Tensor, "batch kv_heads keys"] | None = None,
        padded: Bool[Tensor, "batch kv_heads keys"] | None = None,
    ) -> None:
        self.scores = scores
        """What each slot has received so far, 0 for those that are to come; updated in place."""
        self.forgetting = forgetting
        self.recent = max(recent, 1)  # a token is never evicted in the step in which it arrives
        self.has_padding = padded is not None
        self.positions = positions
        self.hidden = torch.zeros_like(scores)
        """-inf where a slot has been evicted, else 0."""
        self.handicap = torch.zeros_like(scores)
        """Added to the scores before the lowest is found: inf where a slot is gone or must stay, -inf for padding."""
        if sinks is not None:
            self.handicap.masked_fill_(sinks, math.inf)
        if padded is not None:
            self.handicap.masked_fill_(padded, -math.inf)
            self.positions = positions.masked_fill(padded, -1)  # padding is never recent

    @property
    def held(self) -> Bool[Tensor, "batch kv_heads keys"]:
        """True at slots that have not been evicted."""
        return self.hidden == 0

    def step(
        self, logits: Float[Tensor, "batch kv_heads group reach"], seen: int
    ) -> Float[Tensor, "batch kv_heads group reach"]:
        """The weights of the query at position `seen - 1` over the slots up to its own, after which one slot leaves.

        Weights sum to 1 over the slots that are held: what was evicted takes no part in the scores either.
        """
        reach = logits.shape[-1]
        weights = (logits + self.hidden[:, :, None, :reach]).softmax(-1)
        if self.has_padding:
            weights = weights.nan_to_num(0.0)  # a query that is padding itself sees nothing
        scores = self.scores[..., :reach].mul_(self.forgetting).add_(weights.sum(2))
        recent = self.positions[..., :reach] >= seen - self.recent
        worth = (scores + self.handicap[..., :reach]).masked_fill(recent, math.inf)
        evicted = worth.argmin(-1, keepdim=True)
        self.hidden.scatter_(-1, evicted, -math.inf)
        self.handicap.scatter_(-1, evicted, math.inf)
        return weights


def simulate(
    logits: Logits, *, budget: int, forgetting: float, recent: int = 0, streaming: int = 0
) -> Bool[Tensor, "batch kv_heads queries keys"]:
    """True where a query sees a key, if the sequence is decoded from its first token on with `budget` tokens held.

    A query sees what is held and itself, so up to `budget + 1` keys. The logits are those of a whole sequence; they are
    masked causally here.

    Raises ValueError where there are not as many queries as keys.

    Source: A2SF, section 4: the simulation behind the accuracy tables.
    """
    batch, kv_heads, _, queries, keys = logits.shape
    if queries != keys:
        raise ValueError(f"logits must be those of a whole sequence, got {queries} queries and {keys} keys")
    free = min(budget, queries)
    mask = logits.new_ones(queries, keys, dtype=torch.bool).tril().expand(batch, kv_heads, -1, -1).clone()
    logits = logits.masked_fill(~mask[:, :, None], -math.inf)
    weights = logits[..., :free, :].softmax(-1)
    scores = torch.einsum("bhgqk,q->bhk", weights, discounts(forgetting, free, logits.device).to(weights))
    positions = torch.arange(keys, device=logits.device).expand(batch, kv_heads, -1)
    eviction = Eviction(scores, positions, forgetting=forgetting, recent=recent, sinks=positions < streaming)
    for query in range(free, queries):
        reach = query + 1
        mask[:, :, query, :reach] = eviction.held[..., :reach]
        eviction.step(logits[..., query, :reach], seen=reach)
    return mask


def ideal_mask(logits: Logits, number: int) -> Bool[Tensor, "batch kv_heads queries keys"]:
    """True at the `number` keys to which each query gives most attention, nothing having been evicted before.

    No cache of that size can have it: what one query does not look at may be what the next one needs.
    """
    queries, keys = logits.shape[-2:]
    causal = logits.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    weights = logits.masked_fill(~causal, -math.inf).softmax(-1).sum(2)
    top = weights.topk(min(number, keys), dim=-1).indices
    chosen = torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, top, True)
    all_fit = causal.sum(-1, keepdim=True) <= number
    return (chosen | all_fit) & causal


def mask_similarity(
    mask: Bool[Tensor, "batch kv_heads queries keys"], ideal: Bool[Tensor, "batch kv_heads queries keys"]
) -> Float[Tensor, "batch kv_heads"]:
    """The cosine of two masks as vectors of zeros and ones: where both choose equally many, the share in common."""
    return cosine_similarity(mask.flatten(2).float(), ideal.flatten(2).float(), dim=-1)


def grouped_logits(
    query: Float[Tensor, "batch heads queries dim"], key: Float[Tensor, "batch kv_heads keys dim"], scale: float
) -> Logits:
    """The scaled products of queries and keys, in fp32."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    return torch.einsum("bhgqd,bhkd->bhgqk", grouped, key.float()) * scale
