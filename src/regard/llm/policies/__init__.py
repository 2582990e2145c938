"""Baseline cache policies, which every comparison needs: everything, sinks and recent tokens, H2O, SnapKV."""

from collections.abc import Callable

from transformers import PretrainedConfig

from regard.llm.policies.full import Full
from regard.llm.policies.h2o import H2O
from regard.llm.policies.quantised import Quantised
from regard.llm.policies.snapkv import SnapKV
from regard.llm.policies.streaming import Streaming
from regard.llm.policy import CachePolicy

__all__ = ["H2O", "POLICIES", "POLICY_EXAMPLES", "Full", "Quantised", "SnapKV", "Streaming"]

POLICIES: dict[str, type[CachePolicy]] = {"full": Full, "streaming": Streaming, "h2o": H2O, "snapkv": SnapKV}
"""The baselines by the names that `regard generate --policy` takes."""

POLICY_EXAMPLES: dict[str, Callable[[PretrainedConfig], CachePolicy]] = {
    "full": lambda config: Full(),
    "streaming": lambda config: Streaming(sinks=2, recent=6),
    "h2o": lambda config: H2O(budget=8, recent=3),
    "snapkv": lambda config: SnapKV(budget=8, window=3, kernel=3),
}
"""Small policies for a model of any shape, with budgets that a sentence exceeds: the laws hold for every one."""
