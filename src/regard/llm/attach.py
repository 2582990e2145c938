"""Put any attention function into a Hugging Face model, with or without a cache, and take it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from regard.llm.visible import Visible

AttentionFunction = Callable[[nn.Module, Tensor, Any, Any, Visible, float], Tensor]
"""(module, query[batch, heads, queries, dim], key[batch, kv_heads, keys, dim], value, visible, scale) -> out, as query.

Keys and values are what the model's cache returned: tensors, or whatever the cache's `update` handed over.
"""

IGNORED = {
    "cache_position",
    "is_causal",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "return_dict",
    "sliding_window",
    "token_type_ids",
    "use_cache",
}
"""Arguments that transformers passes along and that change nothing here: the visibility rule carries the window."""

_numbers = count()


@contextmanager
def attach(model: PreTrainedModel, attend: AttentionFunction) -> Iterator[PreTrainedModel]:
    """The model, computing its self-attention by `attend` inside the `with` block and as before after it.

    Works on every model that goes through transformers' attention interface (Llama, Mistral, Qwen, Gemma, GPT-NeoX
    and most others), and nests: the innermost attention function counts.

    Raises ValueError where the model is an encoder-decoder, or does not go through the interface, or passes an
    attention argument that `attend` would have to know (a soft cap, attention sinks), or where the caller passes a
    4-D mask.
    """
    require_decoder(model)
    name = f"regard-{next(_numbers)}"
    AttentionInterface.register(name, _as_transformers_calls_it(attend))
    AttentionMaskInterface.register(name, _visible)
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ValueError(f"{type(model).__name__} does not let its attention be replaced (no attention interface)")
        yield model
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def require_decoder(model: PreTrainedModel) -> None:
    """Raises ValueError, in one sentence, where the model is not a decoder-only language model."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only language models are supported"
        )


def _as_transformers_calls_it(attend: AttentionFunction) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module,
        query: Float[Tensor, "batch heads queries dim"],
        key: Any,
        value: Any,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        **extra: Any,
    ) -> tuple[Float[Tensor, "batch queries heads dim"], None]:
        if not isinstance(attention_mask, Visible):
            raise ValueError(f"attention_mask must be 2-D (batch, tokens) or None, got {_described(attention_mask)}")
        unknown = sorted(name for name, given in extra.items() if given is not None and name not in IGNORED)
        if unknown:
            raise ValueError(f"{type(module).__name__} passes {unknown[0]!r}, which replaced attention does not know")
        if dropout:
            raise ValueError(f"dropout must be 0 while attention is replaced, got {dropout}; call model.eval()")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(module, query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None

    return attention


def _described(mask: Any) -> str:
    return f"{mask.ndim}-D" if isinstance(mask, Tensor) else f"{type(mask).__name__}"


def _visible(
    *, q_length: int, q_offset: int, mask_function: Any, attention_mask: Tensor | None, device: Any, **_: Any
) -> Visible:
    """What a model's mask builder hands to every layer, in place of a mask."""
    padding = attention_mask
    if padding is not None:
        padding = padding[:, : q_offset + q_length]
        if padding.shape[1] < q_offset + q_length:
            raise ValueError(
                f"attention_mask must cover all {q_offset + q_length} tokens so far, got {padding.shape[1]}"
            )
        if bool(padding.all()):
            padding = None
    return Visible(mask_function, int(q_offset), q_length, padding, device)
