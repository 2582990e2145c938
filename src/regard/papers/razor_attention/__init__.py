"""RazorAttention: full caches for retrieval heads; sinks, recent tokens and one mean token for all others."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from regard.llm.policy import CachePolicy, kv_heads
from regard.papers.razor_attention.alibi import alibi_slopes, released_windows, vision_scope
from regard.papers.razor_attention.cache_policy import RazorAttention
from regard.papers.razor_attention.heads import Heads, find_heads, load_heads, save_heads
from regard.papers.razor_attention.search import Probe, Scores, choose, find, head_scores

POLICIES = {"razor_attention": RazorAttention}


def _one_head(config: PretrainedConfig, **options: Any) -> RazorAttention:
    protected = torch.arange(config.num_hidden_layers * kv_heads(config)) == 1
    options = {"recent": 4, "compression": 4.0, "sinks": 2, "trim_every": 3} | options
    return RazorAttention.of_heads(protected.view(config.num_hidden_layers, -1), **options)


POLICY_EXAMPLES: dict[str, Callable[[PretrainedConfig], CachePolicy]] = {
    "razor_attention": _one_head,
    "razor_attention mean": partial(_one_head, compensation="mean", trim_every=1, sinks=0),
    "razor_attention none": partial(_one_head, compensation="none", compression=float("inf")),
}

EXAMPLES: dict[str, Callable[[], Any]] = {
    "RazorAttention": lambda: RazorAttention.of_heads(torch.tensor([[True, False], [False, True]])),
    "Heads": lambda: Heads(((1, 0), (0, 1)), shape=(2, 2)),
    "Probe": lambda: Probe(block=8, repeats=3),
}

__all__ = [
    "EXAMPLES",
    "POLICIES",
    "POLICY_EXAMPLES",
    "Heads",
    "Probe",
    "RazorAttention",
    "Scores",
    "alibi_slopes",
    "choose",
    "find",
    "find_heads",
    "head_scores",
    "load_heads",
    "released_windows",
    "save_heads",
    "vision_scope",
]
