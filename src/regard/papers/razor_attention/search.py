"""Which heads retrieve: those that, in random tokens that repeat, look at what stood there before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from regard.llm.heads import capture
from regard.llm.policy import kv_heads
from regard.papers.razor_attention.heads import Heads

Steps = Callable[[Sequence[Tensor]], Iterator[Tensor]]


@dataclass(frozen=True)
class Probe:
    """Random tokens, repeated, behind a start token.

    Source: "RazorAttention", on RoPE models; the paper's sizes are `Probe.published["razor_attention"]`.
    """

    block: int = 256
    """Different random tokens that are repeated."""
    repeats: int = 4
    """Times that they come."""
    first_id: int | None = None
    """The lowest token id to draw from; the middle half of the vocabulary where neither bound is given, since special
    tokens are at its ends."""
    last_id: int | None = None
    """The highest token id to draw from."""
    tile: int = 256
    """Tokens that go through the model at once: the memory in use is that of one layer's attention weights from them
    to all tokens, about 3 x 4 x heads x tile x length bytes, beside the KV cache."""

    published: ClassVar[dict[str, Probe]]

    def __post_init__(self) -> None:
        if self.block < 2:
            raise ValueError(f"block must be at least 2 tokens, got {self.block}")
        if self.repeats < 2:
            raise ValueError(f"repeats must be at least 2, got {self.repeats}")
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1 token, got {self.tile}")
        if (self.first_id is None) != (self.last_id is None):
            raise ValueError("first_id and last_id must be given together")

    def tokens(self, vocabulary: int, seed: int, start: int | None = None) -> Int64[Tensor, " length"]:
        """The start token (id 0 where the model has none) and the repeated block.

        Raises ValueError where the range of ids is not in the vocabulary or has fewer ids than the block.
        """
        first = vocabulary // 4 if self.first_id is None else self.first_id
        last = vocabulary - vocabulary // 4 - 1 if self.last_id is None else self.last_id
        if not 0 <= first <= last < vocabulary:
            raise ValueError(f"first_id and last_id must be a range within 0..{vocabulary - 1}, got {first}..{last}")
        if last - first + 1 < self.block:
            raise ValueError(f"block must be at most the {last - first + 1} ids of {first}..{last}, got {self.block}")
        order = torch.randperm(last - first + 1, generator=torch.Generator().manual_seed(seed))
        repeated = (first + order[: self.block]).repeat(self.repeats)
        return torch.cat([torch.tensor([start or 0]), repeated])


Probe.published = {"razor_attention": Probe(block=2500, repeats=4, first_id=10_000, last_id=12_500)}


class Scores(NamedTuple):
    """Per KV head, the share of attention that its best query head gives to what the repetition points at."""

    induction: Float[Tensor, "layers kv_heads"]
    """To the tokens that followed the earlier copies of the current one."""
    echo: Float[Tensor, "layers kv_heads"]
    """To the earlier copies of the current token."""


@torch.no_grad()
def head_scores(model: PreTrainedModel, probe: Probe, seed: int, *, steps: Steps = iter) -> Scores:
    """The scores of all KV heads, means over all tokens that have come before.

    The probe goes through the model in tiles, with a KV cache, and every layer's weights are reduced to two sums per
    head before the next layer runs. `steps` may show progress.

    Source: "RazorAttention", on RoPE models; of query heads that share a KV head the maximum, as in the released tools.
    """
    config = model.config.get_text_config()
    tokens = probe.tokens(config.vocab_size, seed, config.bos_token_id).to(model.device)
    with capture(model, "weights", reduce=lambda _, weights: looks_back(weights, probe.block)) as captured:
        cache = DynamicCache()
        for tile in steps(tokens[None].split(probe.tile, dim=1)):
            model.base_model(tile, past_key_values=cache, use_cache=True)
    sums = torch.stack([torch.stack(tiles).sum(0) for _, tiles in sorted(captured.calls["weights"].items())])
    means = sums / (probe.block * (probe.repeats - 1))
    best = means.unflatten(2, (kv_heads(config), -1)).amax(3).cpu()
    return Scores(induction=best[:, 0], echo=best[:, 1])


def looks_back(weights: Float[Tensor, "1 heads queries keys"], block: int) -> Float[Tensor, "2 heads"]:
    """The attention to what followed the earlier copies, and to these themselves, summed over the queries.

    Key 0 is the start token and the queries are the last of the keys, whose tokens repeat every `block`.
    """
    queries, keys = weights.shape[2:]
    query = torch.arange(keys - queries, keys, device=weights.device)
    totals = weights.new_zeros(2, weights.shape[1])
    for distance in range(block, keys, block):
        copies = query[query - distance >= 1] - distance
        if len(copies):
            of_queries = weights[0, :, -len(copies) :]
            for kind, place in enumerate((copies + 1, copies)):
                totals[kind] += of_queries.gather(2, place.expand(len(of_queries), -1)[..., None]).sum((1, 2))
    return totals


def choose(scores: Scores, induction: float = 0.14, echo: float = 0.01) -> Heads:
    """The heads to protect: those shares of all heads with the highest scores, ranked over all layers together.

    Of equal scores the earlier layer's counts more, so the shares are never exceeded. Heads are in the order of the
    larger of their two scores. Raises ValueError where a share is not from 0 to 1.

    Source: "RazorAttention", on RoPE models: 14% induction heads, 1% echo heads.
    """
    chosen = torch.zeros(scores.induction.numel(), dtype=torch.bool)
    for name, share, of_heads in (("induction", induction, scores.induction), ("echo", echo, scores.echo)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} must be a share of the heads from 0 to 1, got {share}")
        best = of_heads.flatten().sort(descending=True, stable=True).indices
        chosen[best[: round(share * len(best))]] = True
    rank = torch.maximum(*scores).flatten().masked_fill(~chosen, -1.0).sort(descending=True, stable=True).indices
    layers, heads = scores.induction.shape
    places = tuple((place // heads, place % heads) for place in rank[: int(chosen.sum())].tolist())
    return Heads(places, (layers, heads), {"induction": induction, "echo": echo})


def find(
    model: PreTrainedModel,
    probe: Probe | None = None,
    *,
    seed: int = 0,
    induction: float = 0.14,
    echo: float = 0.01,
    steps: Steps = iter,
) -> Heads:
    """The model's heads to protect, found with one pass of random tokens."""
    probe = probe or Probe()
    heads = choose(head_scores(model, probe, seed, steps=steps), induction, echo)
    about = {"block": probe.block, "repeats": probe.repeats, "seed": seed}
    return dataclasses.replace(heads, settings={**heads.settings, **about})
