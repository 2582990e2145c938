"""Put any attention function into a Hugging Face model, with or without a cache, and take it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from regard.attention.attend import attend as attend_to
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

Wrapper = Callable[[AttentionFunction], AttentionFunction]
"""An attention function made of another one, which it calls: to look at what goes in and out, or to change it."""

PREFIX = "regard-"
_numbers = count()
_wrappers: WeakKeyDictionary[nn.Module, list[Wrapper]] = WeakKeyDictionary()
"""By the model without its head, so that it does not matter which of the two was given."""


@contextmanager
def attach(model: PreTrainedModel, attend: AttentionFunction) -> Iterator[PreTrainedModel]:
    """The model, computing its self-attention by `attend` inside the `with` block and as before after it.

    Works on every model that goes through transformers' attention interface (Llama, Mistral, Qwen, Gemma, GPT-NeoX
    and most others; of a model that also reads images, the language model's), and nests: the innermost attention
    function counts. Weights are not returned (`output_attentions`); `regard.llm.heads.capture` shows them.

    Raises ValueError where the model is an encoder-decoder, or does not go through the interface, or passes an
    attention argument that `attend` would have to know (a soft cap, attention sinks), or where the caller passes a
    4-D mask or a static cache.
    """
    require_decoder(model)
    name = f"{PREFIX}{next(_numbers)}"
    AttentionInterface.register(name, _as_transformers_calls_it(model.base_model, attend))
    AttentionMaskInterface.register(name, _visible)
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        text = model.config.get_text_config()
        of_text = {key: name for key in model.config.sub_configs if getattr(model.config, key) is text}
        model.set_attn_implementation(of_text or name)  # towers that read images keep their own attention
        if text._attn_implementation != name:
            raise ValueError(f"{type(model).__name__} does not let its attention be replaced (no attention interface)")
        yield model
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


@contextmanager
def wrap(model: PreTrainedModel, wrapper: Wrapper) -> Iterator[PreTrainedModel]:
    """The model, whatever its attention is computed by going through the wrapper inside the `with` block.

    What is wrapped is the attention attached outside of the block or inside it, cache policies included, and the
    model's own softmax attention where none is attached. Several wrappers all apply, the first one innermost.

    Raises ValueError where `attach` does.
    """
    wrappers = _wrappers.setdefault(model.base_model, [])
    with nullcontext() if _is_attached(model) else attach(model, softmax_attention):
        wrappers.append(wrapper)
        try:
            yield model
        finally:
            wrappers.remove(wrapper)


def softmax_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys dim_v"],
    visible: Visible,
    scale: float,
) -> Float[Tensor, "batch heads queries dim_v"]:
    """What the model computes by itself, without a cache or with one of transformers'."""
    mask = visible.over(visible.seen - key.shape[2])  # the cache of a sliding window holds the last keys only
    return attend_to(query, key, value, mask=mask, scale=scale)


def require_decoder(model: PreTrainedModel) -> None:
    """Raises ValueError, in one sentence, where the model is not a decoder-only language model."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only language models are supported"
        )


def _is_attached(model: PreTrainedModel) -> bool:
    return str(model.config.get_text_config()._attn_implementation).startswith(PREFIX)


def _as_transformers_calls_it(base: nn.Module, attend: AttentionFunction) -> Callable[..., tuple[Tensor, None]]:
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
        wrapped = reduce(lambda inner, wrapper: wrapper(inner), _wrappers.get(base, ()), attend)
        return wrapped(module, query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None

    return attention


def _described(mask: Any) -> str:
    return f"{mask.ndim}-D" if isinstance(mask, Tensor) else f"{type(mask).__name__}"


def _visible(
    *,
    q_length: int,
    q_offset: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: Tensor | None,
    device: Any,
    **_: Any,
) -> Visible:
    """What a model's mask builder hands to every layer, in place of a mask."""
    if kv_length > q_offset + q_length:
        raise ValueError(
            f"keys must end at the last token, the {q_offset + q_length}th, got {kv_length}: static caches, and masks "
            "longer than the tokens, do not go with replaced attention"
        )
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
