"""Pretrained causal language models: load them, attach any attention, run them under a cache policy."""

from regard.llm.attach import attach
from regard.llm.cache import KVLayer, PolicyCache
from regard.llm.load import Loaded, chat, load
from regard.llm.policies import H2O, Full, Quantised, SnapKV, Streaming
from regard.llm.policy import CachePolicy
from regard.llm.use import use

__all__ = [
    "H2O",
    "CachePolicy",
    "Full",
    "KVLayer",
    "Loaded",
    "PolicyCache",
    "Quantised",
    "SnapKV",
    "Streaming",
    "attach",
    "chat",
    "load",
    "use",
]
