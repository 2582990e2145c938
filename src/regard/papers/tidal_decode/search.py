"""Which layer should choose anew: by the loss on hidden passkeys, and by how far other layers agree with its choice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from regard.data.files import write_atomically
from regard.llm import Full, PolicyCache, use
from regard.llm.heads import capture
from regard.llm.longcontext import Haystack, Prompt, passages, passkeys, recite_tails
from regard.llm.policies.full import forked
from regard.papers.tidal_decode.cache_policy import TidalDecode

Progress = Callable[[Sequence[str]], Iterator[str]]


@dataclass(frozen=True)
class Search:
    """What the layers are tried on. The text of the training split alone is used."""

    prompts: int = 8
    """Prompts that hide a passkey of eight words."""
    context: int = 1000
    """Tokens of each before the question."""
    budget: int = 128
    """Tokens that a head reads where it follows a choice."""
    candidates: tuple[int, ...] | None = None
    """Layers to try; all after the first choice where not given."""
    passages: int = 4
    """Pieces of plain text in which the agreement of layers is measured."""
    seed: int = 100
    """Of the passkeys, and of the places in the text."""

    def __post_init__(self) -> None:
        for name in ("prompts", "context", "budget", "passages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.candidates is not None and not self.candidates:
            raise ValueError("candidates must name at least one layer, or be left out to try all")

    def layers(self, policy: TidalDecode, layers: int) -> tuple[int, ...]:
        """The candidates, in a model of so many layers. Raises ValueError where one is no layer after the first."""
        if layers < policy.select + 3:
            raise ValueError(f"there must be two layers after select = {policy.select}, the model has {layers}")
        chosen = tuple(range(policy.select + 1, layers)) if self.candidates is None else self.candidates
        for layer in chosen:
            if not policy.select < layer < layers:
                raise ValueError(f"candidates must be from {policy.select + 1} to {layers - 1}, got {layer}")
        return chosen


class Found(NamedTuple):
    """How well each layer does that may choose anew."""

    losses: dict[int, float]
    """Nats per passkey token, by the layer that chooses anew."""
    recall: dict[int, float]
    """Share that the choice in force has of the own top of the layers which follow one, in plain text."""
    alone: float
    """Nats per passkey token where only the first layer chooses."""
    full: float
    """Nats per passkey token of full attention."""

    @property
    def best(self) -> int:
        """The layer of the lowest loss."""
        return min(self.losses, key=self.losses.__getitem__)

    def save(self, folder: Path, policy: TidalDecode) -> None:
        """Writes the policy with the best layer to `policy.json`, which it loads, and all numbers to `search.json`."""
        dataclasses.replace(policy, reselect=self.best).save(folder)
        write_atomically(folder / "search.json", json.dumps({**self._asdict(), "best": self.best}, indent=1) + "\n")


def find_layer(
    model: PreTrainedModel,
    haystack: Haystack,
    policy: TidalDecode,
    search: Search,
    *,
    progress: Progress = iter,
) -> Found:
    """The loss with each candidate as `reselect`, all other options as the policy has them but the budget.

    All share one reading of the contexts. The loss decides, and not the recall that the paper goes by.

    Raises ValueError where a candidate is no layer of the model after the policy's first.
    """
    candidates = search.layers(policy, model.config.get_text_config().num_hidden_layers)
    hidden = passkeys(haystack, search.prompts, context=search.context, count=1, seed=search.seed, split="train")
    texts = passages(haystack, search.passages, context=search.context, continuation=1, seed=search.seed, split="train")
    tried = dataclasses.replace(policy, budget=search.budget, reselect=None, correct_every=None)
    policies = {str(layer): dataclasses.replace(tried, reselect=layer) for layer in candidates}
    told = recite(model, hidden, {"full": tried.unlimited(), "alone": tried, **policies}, progress=progress)
    losses = {name: scores.losses.mean().item() for name, scores in told.items()}
    agreed = agreement(model, torch.stack([text.context for text in texts]), search.budget)
    recall = {layer: recall_in_force(agreed, policies[str(layer)], policy.select) for layer in candidates}
    return Found({layer: losses[str(layer)] for layer in candidates}, recall, losses["alone"], losses["full"])


class Scores(NamedTuple):
    """Of the answer tokens of all prompts, one after the other."""

    losses: Float[Tensor, " answers"]
    """Nats, teacher-forced."""
    hits: Bool[Tensor, " answers"]
    """Whether it was the most likely token."""


def read_contexts(model: PreTrainedModel, contexts: Int64[Tensor, "batch context"]) -> PolicyCache:
    """The cache of full attention after the contexts."""
    cache = Full().cache(model)
    with use(model, Full()):
        model.base_model(contexts.to(model.device), past_key_values=cache, use_cache=True)
    return cache


def recite(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    policies: Mapping[str, TidalDecode],
    *,
    progress: Progress = iter,
) -> dict[str, Scores]:
    """Each policy's scores on the prompts, whose contexts have one length: one prefill, then token by token."""
    read = read_contexts(model, torch.stack([prompt.context for prompt in prompts]))
    scores = {}
    for name in progress(list(policies)):
        losses, hits = recite_tails(model, prompts, policies[name], forked(read, policies[name], model))
        scores[name] = Scores(torch.cat(losses), torch.cat(hits))
    return scores


@torch.no_grad()
def tops(
    model: PreTrainedModel, tokens: Int64[Tensor, "batch tokens"], budget: int, queries: int = 16
) -> Iterable[Bool[Tensor, "layers heads queries tokens"]]:
    """For each row and its last queries, the tokens of every layer's and query head's highest scores, as a mask.

    Scores are those of full attention; a query sees itself and what came before it.
    """
    if tokens.shape[1] <= queries:
        raise ValueError(f"the text must be longer than the {queries} queries, got {tokens.shape[1]} tokens")
    with capture(model, "queries", "keys") as captured:
        model.base_model(tokens.to(model.device), use_cache=False)
    hidden = torch.ones(queries, tokens.shape[1], dtype=torch.bool).triu(tokens.shape[1] - queries + 1)
    for row in range(len(tokens)):
        masks = []
        for layer in sorted(captured.keys):
            query, key = captured.queries[layer][row, :, -queries:], captured.keys[layer][row]
            scores = query.float().reshape(len(key), -1, query.shape[-1]) @ key.float().mT
            scores = scores.view(len(query), queries, -1).masked_fill(hidden.to(key.device), -torch.inf)
            chosen = scores.topk(min(budget, tokens.shape[1])).indices
            masks.append(torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True))
        yield torch.stack(masks)


def agreement(
    model: PreTrainedModel, tokens: Int64[Tensor, "batch tokens"], budget: int, queries: int = 16
) -> Float[Tensor, "layers layers"]:
    """How much of the tokens that the second layer's heads score highest is among the first's: 1 where they are equal.

    The mean over query heads, of which each is compared with the one of its number, and over the last queries of every
    row.

    Source: "TidalDecode", section 3.2 and figure 3: the recall by which the layer is found that chooses anew.
    """
    rows = []
    for top in tops(model, tokens, budget, queries):
        flat = top.flatten(1, 2).float().transpose(0, 1)
        rows.append((flat @ flat.mT).mean(0) / min(budget, tokens.shape[1]))
    return torch.stack(rows).mean(0).cpu()


def recall_in_force(agreed: Float[Tensor, "layers layers"], policy: TidalDecode, above: int) -> float:
    """The mean share that the choice in force has of the own top of each following layer above that one.

    Raises ValueError where no layer above it follows.
    """
    shares, latest = [], policy.select
    for layer in range(len(agreed)):
        if policy.role(layer) == "choose":
            latest = layer
        elif layer > above:
            shares.append(agreed[latest, layer].item())
    if not shares:
        raise ValueError(f"there must be a layer above {above} that follows a choice, the model has {len(agreed)}")
    return sum(shares) / len(shares)
