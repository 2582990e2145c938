"""DuoAttention: full caches for retrieval heads, sinks and recent tokens for streaming heads."""

from regard.papers.duo_attention.cache_policy import DuoAttention, find_gates
from regard.papers.duo_attention.gates import Gates, binarise, load_gates, random_gates, save_gates

POLICIES = {"duo_attention": DuoAttention}

__all__ = ["POLICIES", "DuoAttention", "Gates", "binarise", "find_gates", "load_gates", "random_gates", "save_gates"]
