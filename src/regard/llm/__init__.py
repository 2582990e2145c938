"""Pretrained causal language models: load them, attach any attention, run them under a cache policy."""

from regard.llm.attach import attach
from regard.llm.cache import KVLayer, PolicyCache
from regard.llm.policy import CachePolicy
from regard.llm.use import use

__all__ = ["CachePolicy", "KVLayer", "PolicyCache", "attach", "use"]
