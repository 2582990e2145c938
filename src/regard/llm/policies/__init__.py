"""Baseline cache policies, which every comparison needs: everything, sinks and recent tokens, H2O, SnapKV."""

from regard.llm.policies.full import Full
from regard.llm.policies.h2o import H2O
from regard.llm.policies.snapkv import SnapKV
from regard.llm.policies.streaming import Streaming
from regard.llm.policy import CachePolicy

__all__ = ["H2O", "POLICIES", "Full", "SnapKV", "Streaming"]

POLICIES: dict[str, type[CachePolicy]] = {"full": Full, "streaming": Streaming, "h2o": H2O, "snapkv": SnapKV}
"""The baselines by the names that `regard generate --policy` takes."""
