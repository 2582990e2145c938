"""Recycled attention: everything is kept, and most steps read what the last full step found."""

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

from regard.llm.policy import CachePolicy
from regard.papers.recycled_attention.cache_policy import PUBLISHED, RecycledAttention
from regard.papers.recycled_attention.chains import Chains
from regard.papers.recycled_attention.training import ContinuedTraining

POLICIES = {"recycled_attention": RecycledAttention}

POLICY_EXAMPLES: dict[str, Callable[[PretrainedConfig], CachePolicy]] = {
    "recycled_attention": lambda config: RecycledAttention(budget=6, stride=4, kernel=3),
    "recycled_attention by similarity": lambda config: RecycledAttention(
        budget=6, check_every=2, similarity=0.5, group="mean"
    ),
}

EXAMPLES: dict[str, Callable[[], Any]] = {
    "Chains": Chains,
    "ContinuedTraining": ContinuedTraining,
    "RecycledAttention": RecycledAttention,
}

__all__ = [
    "EXAMPLES",
    "POLICIES",
    "POLICY_EXAMPLES",
    "PUBLISHED",
    "Chains",
    "ContinuedTraining",
    "RecycledAttention",
]
