"""A2SF: scores of attention received, which forget."""

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

from regard.llm.policy import CachePolicy
from regard.papers.a2sf.cache_policy import A2SF, PUBLISHED
from regard.papers.a2sf.selection import ideal_mask, mask_similarity, simulate

POLICIES = {"a2sf": A2SF}

POLICY_EXAMPLES: dict[str, Callable[[PretrainedConfig], CachePolicy]] = {
    "a2sf": lambda config: A2SF(budget=8, recent=3),
    "a2sf guarded": lambda config: A2SF(budget=8, forgetting=0.3, recent=0, streaming=2),
    "a2sf stepwise": lambda config: A2SF(budget=7, forgetting=0.5, recent=0, streaming=1, prefill="stepwise"),
}

EXAMPLES: dict[str, Callable[[], Any]] = {"A2SF": A2SF}

__all__ = [
    "A2SF",
    "EXAMPLES",
    "POLICIES",
    "POLICY_EXAMPLES",
    "PUBLISHED",
    "ideal_mask",
    "mask_similarity",
    "simulate",
]
