"""Cache correction: tokens generated with sparse attention are read again with full attention."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from regard.llm.cache import PolicyCache

if TYPE_CHECKING:
    from regard.papers.tidal_decode.cache_policy import TidalLayer


def correct(
    model: PreTrainedModel,
    cache: PolicyCache,
    tokens: Int[Tensor, "batch tokens"],
    *,
    attention_mask: Int[Tensor, "batch seen"] | None = None,
    position_ids: Int[Tensor, "... tokens"] | None = None,
) -> None:
    """Replaces what the cache holds of its last tokens, which these are, by what full attention makes of them.

    They are taken back and read again as one chunk, over the entries before them. Call it where the model runs under
    the cache's policy, with the mask and the positions that the model was given. Raises ValueError for fewer than two
    tokens: a single one would be read as a step of generation.

    Source: "TidalDecode", section 3.2, "KV cache correction".
    """
    number = tokens.shape[1]
    if not 2 <= number <= cache.get_seq_length():
        raise ValueError(
            f"tokens must be the last ones of the cache, from 2 to the {cache.get_seq_length()} that it has seen, "
            f"got {number}"
        )
    cache.crop(-number)
    model.base_model(
        input_ids=tokens,
        past_key_values=cache,
        use_cache=True,
        attention_mask=attention_mask,
        position_ids=position_ids,
    )


def correct_every(number: int, model: PreTrainedModel, cache: PolicyCache) -> None:
    """From now on corrects the cache whenever `number` tokens have come since it was correct.

    Attention sees no token ids, so a hook on the model, which lives as long as the cache, keeps them in the cache's
    first layer, from the first generated token on. Several tokens at once which follow it, a user's turn, count as
    well, for they were read over entries that were not correct.
    """
    followed: weakref.ref[PolicyCache] = weakref.ref(cache)

    def after(model: PreTrainedModel, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = followed()
        is_used = kwargs.get("past_key_values") is cache
        if cache is None or not is_used:
            return
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            raise ValueError("correct_every needs token ids, got inputs_embeds")
        first = cast("TidalLayer", cache.layers[0])
        if first.uncorrected is None and tokens.shape[1] > 1:
            return
        waiting = tokens if first.uncorrected is None else torch.cat([first.uncorrected, tokens], dim=1)
        first.uncorrected = waiting
        if waiting.shape[1] >= number:
            positions = kwargs.get("position_ids")
            if positions is not None:
                positions = positions[..., -1:] + torch.arange(1 - waiting.shape[1], 1, device=positions.device)
            mask = kwargs.get("attention_mask")
            correct(model, cache, waiting, attention_mask=mask, position_ids=positions)

    handle = model.register_forward_hook(after, with_kwargs=True)
    weakref.finalize(cache, handle.remove)
