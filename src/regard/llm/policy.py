"""What a cache policy is: the options of one method, which build the caches that keep its promise."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from transformers import PretrainedConfig, PreTrainedModel

from regard.data.files import write_atomically
from regard.llm.cache import KVLayer, PolicyCache

P = TypeVar("P", bound="CachePolicy")


@dataclass(frozen=True)
class CachePolicy(ABC):
    """The options of a key-value cache policy; `regard.llm.use` puts it to work.

    The laws, held by `tests/laws/test_policies.py`: `unlimited()` equals the untouched model; the bytes held never
    exceed `promised_bytes`; where `chunk_invariant`, feeding the prompt in any chunks gives the same; a batch of two
    equals two batches of one; left padding, beams, several turns on one cache, and reset all work.
    """

    chunk_invariant: ClassVar[bool] = True
    """False where the method looks at whole prompts, so that the chunks a prompt comes in change what is kept."""

    @abstractmethod
    def layer(self, config: PretrainedConfig, index: int) -> KVLayer:
        """An empty cache for the model layer of that index."""

    @abstractmethod
    def promised_bytes(self, config: PretrainedConfig, batch: int, tokens: int, itemsize: int = 4) -> int:
        """The most bytes of keys and values that the cache may hold after `tokens`, at `itemsize` bytes a number."""

    @abstractmethod
    def unlimited(self: P) -> P:
        """The same policy with the options under which it must equal full attention."""

    def with_budget(self: P, tokens: int, context: int) -> P:
        """The same policy, set to hold about `tokens` of a context's tokens, the mean over its KV heads.

        A policy that holds all of them is set to read so many in most steps, and one without a budget stays as it is:
        so that all can be compared at one budget. Raises ValueError where the budget or the context is below 1.
        """
        return self

    def check(self, config: PretrainedConfig) -> None:  # noqa: B027 - most options fit every model
        """Raises ValueError, in one sentence, where the options do not fit the model."""

    def cache(self, model: PreTrainedModel) -> PolicyCache:
        """An empty cache for the model."""
        config = model.config.get_text_config()
        self.check(config)
        layers = [self.layer(config, index) for index in range(config.num_hidden_layers)]
        return PolicyCache(layers, model=model.base_model)

    def fit(self: P, model: PreTrainedModel, texts: Sequence[str]) -> P:
        """The policy after its search or training on the model; itself where it needs none."""
        return self

    def save(self, folder: str | PathLike[str]) -> None:
        """Writes the options to `policy.json` in the folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        options = {"policy": type(self).__name__, **dataclasses.asdict(self)}
        write_atomically(path / "policy.json", json.dumps(options, indent=1) + "\n")

    @classmethod
    def load(cls: type[P], folder: str | PathLike[str]) -> P:
        """The policy whose options `save` wrote.

        Raises FileNotFoundError where there is no such file, ValueError where it is damaged, or of another policy, or
        has options that this one does not know.
        """
        return cls(**cls.read_options(folder))

    @classmethod
    def read_options(cls, folder: str | PathLike[str]) -> dict[str, Any]:
        """What `save` wrote, by the names of the options; raises what `load` raises."""
        path = Path(folder) / "policy.json"
        try:
            options: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not the file of a policy: {error}") from None
        if (name := options.pop("policy", None)) != cls.__name__:
            raise ValueError(f"{path} holds the policy {name!r}, expected {cls.__name__!r}")
        unknown = sorted(set(options) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{path} has the option {unknown[0]!r}, which {cls.__name__} does not know")
        return options


def require_budget(tokens: int, context: int) -> None:
    """Raises ValueError, in one sentence, where a budget or the context it is for is below 1 token."""
    if tokens < 1 or context < 1:
        name, given = ("budget", tokens) if tokens < 1 else ("context", context)
        raise ValueError(f"{name} must be at least 1 token, got {given}")


def bytes_per_token(config: PretrainedConfig, itemsize: int = 4) -> int:
    """Bytes of keys and values that one token of one KV head takes, all layers together."""
    return 2 * head_dim(config) * itemsize * config.num_hidden_layers


def head_dim(config: PretrainedConfig) -> int:
    """Channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config: PretrainedConfig) -> int:
    """Key-value heads of one layer: as many as query heads where the model does not group them."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
