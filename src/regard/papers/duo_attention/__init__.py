"""DuoAttention: full caches for retrieval heads, sinks and recent tokens for streaming heads."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from regard.llm.policy import CachePolicy, kv_heads
from regard.papers.duo_attention.cache_policy import DuoAttention, find_gates
from regard.papers.duo_attention.gates import Gates, binarise, load_gates, random_gates, save_gates

POLICIES = {"duo_attention": DuoAttention}


def _mixed_heads(config: PretrainedConfig, **options: Any) -> DuoAttention:
    retrieval = torch.arange(config.num_hidden_layers * kv_heads(config)) % 3 != 1
    return DuoAttention.of_heads(retrieval.view(config.num_hidden_layers, -1), sinks=2, recent=5, **options)


POLICY_EXAMPLES: dict[str, Callable[[PretrainedConfig], CachePolicy]] = {
    "duo_attention": _mixed_heads,
    "duo_attention streaming": partial(_mixed_heads, prefill="streaming"),
}

EXAMPLES: dict[str, Callable[[], Any]] = {
    "DuoAttention": lambda: DuoAttention.of_heads(torch.tensor([[True, False], [False, True]])),
    "Gates": lambda: Gates(torch.tensor([[1.0, 0.2], [0.0, 0.7]])),
}

__all__ = [
    "EXAMPLES",
    "POLICIES",
    "POLICY_EXAMPLES",
    "DuoAttention",
    "Gates",
    "binarise",
    "find_gates",
    "load_gates",
    "random_gates",
    "save_gates",
]
