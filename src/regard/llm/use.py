"""Run a pretrained language model under a cache policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from regard.llm.attach import attach, require_decoder
from regard.llm.cache import KVLayer, PolicyCache
from regard.llm.policy import CachePolicy
from regard.llm.visible import Visible


@contextmanager
def use(model: PreTrainedModel, policy: CachePolicy) -> Iterator[PreTrainedModel]:
    """The model, its key-value cache under the policy inside the `with` block and as before after it.

    Both `model(...)` and `model.generate(...)` work, with batches, left padding, beams and `prefill_chunk_size`. Pass a
    cache made by `policy.cache(model)` as `past_key_values` to continue it over several calls; without one, every call
    begins a new cache, returned as `past_key_values`. Gradients are off inside the block: caches are for inference.

    Raises ValueError where the policy does not fit the model, or where the caller passes a cache in use that no policy
    made or that was made for another model.

    >>> from regard.llm import Streaming, load, use
    >>> loaded = load("smollm2")                                                     # doctest: +SKIP
    >>> with use(loaded.model, Streaming(sinks=4, recent=256)) as model:             # doctest: +SKIP
    ...     model.generate(**loaded.tokenizer("Once upon a time", return_tensors="pt"))
    """
    require_decoder(model)
    policy.check(model.config.get_text_config())

    def swap(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs.get("past_key_values")
        if given is None or (not isinstance(given, PolicyCache) and given.get_seq_length() == 0):
            kwargs["past_key_values"] = policy.cache(model)
        else:
            _require_fitting(given, model)
        return args, kwargs

    with attach(model, _step), torch.no_grad():
        # before the hook of an outer block, which then finds this policy's cache
        hook = model.base_model.register_forward_pre_hook(swap, with_kwargs=True, prepend=True)
        try:
            yield model
        finally:
            hook.remove()


def _require_fitting(cache: Cache, model: PreTrainedModel) -> None:
    if not isinstance(cache, PolicyCache):
        raise ValueError(
            f"past_key_values holds {cache.get_seq_length()} tokens of a {type(cache).__name__}; "
            "pass a cache made by policy.cache(model), or none"
        )
    layers = model.config.get_text_config().num_hidden_layers
    if len(cache.layers) != layers:
        raise ValueError(f"past_key_values was made for {len(cache.layers)} layers, the model has {layers}")
    if not cache.fits(model.base_model):
        raise ValueError("past_key_values was made for another model; make one by policy.cache(model)")


def _step(module: nn.Module, query: Tensor, key: Any, value: Any, visible: Visible, scale: float) -> Tensor:
    if not isinstance(key, KVLayer):
        raise ValueError(f"{type(module).__name__} attends to keys that did not go through the cache")
    return key.step(module, query, visible, scale)
