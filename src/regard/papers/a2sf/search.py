"""The search for a forgetting factor: the loss of text that is read with the cache at its budget all the time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from regard.llm import CachePolicy, use
from regard.llm.longcontext import Haystack, Split, passages
from regard.papers.a2sf.cache_policy import A2SF

FACTORS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
"""The factors to try."""
BATCH = 8
"""Passages that are read together; their logits are the largest thing in memory."""


def draw_passages(
    haystack: Haystack, number: int, length: int, seed: int, split: Split
) -> Int64[Tensor, "passages tokens"]:
    """Passages of plain text, all of one length."""
    half = length // 2
    drawn = passages(haystack, number, context=half, continuation=length - half, seed=seed, split=split)
    return torch.stack([passage.tokens for passage in drawn])


@torch.no_grad()
def later_losses(model: PreTrainedModel, passages: Int64[Tensor, "passages tokens"]) -> Float[Tensor, "passages later"]:
    """Nats of every token in the second half of the passages, each read in one forward pass."""
    later = passages.shape[1] // 2
    losses = []
    for some in passages.to(model.device).split(BATCH):
        logits = model(some, logits_to_keep=later + 1).logits[:, :-1].float()
        for row, following in zip(logits, some[:, -later:], strict=True):
            losses.append(cross_entropy(row, following, reduction="none").cpu())
    return torch.stack(losses)


def losses_under(
    model: PreTrainedModel, policy: CachePolicy, passages: Int64[Tensor, "passages tokens"]
) -> Float[Tensor, "passages later"]:
    """The same under a policy. Stepwise from the first token on, this is exactly decoding token by token."""
    with use(model, policy):
        return later_losses(model, passages)


def sweep(
    model: PreTrainedModel,
    passages: Int64[Tensor, "passages tokens"],
    policy: A2SF,
    factors: Sequence[float] = FACTORS,
    steps: Callable[[Sequence[float]], Iterable[float]] = iter,
) -> dict[float, float]:
    """The mean loss of the passages' second halves by forgetting factor, every token a step with eviction.

    Everything else is the policy's. `steps` may show progress.
    """

    def loss(factor: float) -> float:
        return losses_under(model, replace(policy, forgetting=factor, prefill="stepwise"), passages).mean().item()

    return {factor: loss(factor) for factor in steps(factors)}


def best_factor(losses: dict[float, float]) -> float:
    """The factor of the lowest loss; of equals the highest, which remembers more."""
    return min(losses, key=lambda factor: (losses[factor], -factor))
