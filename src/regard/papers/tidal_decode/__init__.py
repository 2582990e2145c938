"""TidalDecode: everything is kept; two layers choose what a generated token reads, and the others follow."""

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

from regard.llm.policy import CachePolicy
from regard.papers.tidal_decode.cache_policy import PUBLISHED, TidalDecode
from regard.papers.tidal_decode.correction import correct
from regard.papers.tidal_decode.search import Search

POLICIES = {"tidal_decode": TidalDecode}


def _choosing_at_once(config: PretrainedConfig, **options: Any) -> TidalDecode:
    """The first of two layers chooses, the second follows."""
    return TidalDecode(budget=5, select=0, reselect=None, **options)


POLICY_EXAMPLES: dict[str, Callable[[PretrainedConfig], CachePolicy]] = {
    "tidal_decode": _choosing_at_once,
    "tidal_decode per KV head": lambda config: _choosing_at_once(config, per="kv", reduce="max", keep_last=True),
    "tidal_decode corrected": lambda config: _choosing_at_once(config, correct_every=3),
}

EXAMPLES: dict[str, Callable[[], Any]] = {"Search": Search, "TidalDecode": TidalDecode}

__all__ = ["EXAMPLES", "POLICIES", "POLICY_EXAMPLES", "PUBLISHED", "Search", "TidalDecode", "correct"]
