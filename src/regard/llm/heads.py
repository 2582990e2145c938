"""The attention heads of a pretrained language model: look at what they do, put something else in, or silence them.

Everything here wraps the attention that the model computes anyway, so it works in training and in generation, with any
cache, inside and outside of `attach` and of `use(model, policy)`, and all of it at once. Heads are query heads, named
by `(layer, head)`, both from 0; where heads share keys, query head h reads key head h // (heads / kv_heads).

    with capture(model, "weights") as seen, ablate(model, [(4, 7)]):
        model(tokens)
    seen.weights[5][0, 2]                  # who looks at whom in head 2 of layer 5, in the first row
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attention.recorder import record
from regard.llm.attach import AttentionFunction, wrap
from regard.llm.visible import Visible

__all__ = ["Captured", "Head", "ablate", "capture", "mean_outputs", "override"]

Head = tuple[int, int]
"""(layer, query head), both from 0."""
Kind = Literal["weights", "queries", "keys", "values", "outputs"]
Replacement = Tensor | Callable[[Tensor], Tensor]
"""What a head is to give, broadcastable to (batch, queries, dim), or a function from what it gives to that."""


class Captured:
    """What attention took in and gave, by kind and layer; a kind's attribute holds each layer's last pass.

    The shapes are those of whole tensors; a capture with `reduce` holds what that returned.
    """

    def __init__(self) -> None:
        self.calls: dict[Kind, dict[int, list[Tensor]]] = {}
        """What was kept of every pass, in order."""

    def clear(self) -> None:
        """Forgets everything captured so far."""
        self.calls.clear()

    @property
    def weights(self) -> dict[int, Tensor]:
        """The attention weights, (batch, heads, queries, keys), over the keys that the cache still holds."""
        return self._last("weights")

    @property
    def queries(self) -> dict[int, Tensor]:
        """The queries, (batch, heads, queries, dim), rotated to their positions where the model does that."""
        return self._last("queries")

    @property
    def keys(self) -> dict[int, Tensor]:
        """The keys, (batch, kv_heads, keys, dim), those from the cache included."""
        return self._last("keys")

    @property
    def values(self) -> dict[int, Tensor]:
        """The values, (batch, kv_heads, keys, dim), those from the cache included."""
        return self._last("values")

    @property
    def outputs(self) -> dict[int, Tensor]:
        """What every head gave, (batch, heads, queries, dim), before the layer mixes the heads."""
        return self._last("outputs")

    def _last(self, kind: Kind) -> dict[int, Tensor]:
        return {layer: passes[-1] for layer, passes in self.calls.get(kind, {}).items()}


@contextmanager
def capture(
    model: PreTrainedModel,
    *what: Kind,
    layers: Collection[int] | None = None,
    reduce: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[Captured]:
    """What the attention of the layers (all, if not given) takes in and gives, filled by every pass in the block.

    `reduce` gets the layer and each tensor and returns what to keep of it: a head, a mean, a copy on another device.
    Weights of all heads take memory and time that grow with queries times keys. Tensors keep their gradients; run
    the model under `torch.no_grad()` where none are wanted. A head that is overridden gives what it was overridden
    with if `capture` was entered after `override`, and its own output otherwise.

    Raises ValueError where a layer or a kind does not exist. In the block, it is raised by the model where weights
    are asked of an attention function that does not call `regard.attention.attend` once a layer, or keys and values
    of a cache policy, which hands over none.
    """
    unknown = [kind for kind in what if kind not in get_args(Kind)]
    if unknown or not what:
        given = repr(unknown[0]) if unknown else "nothing"
        raise ValueError(f"what to capture must be out of {', '.join(get_args(Kind))}, got {given}")
    chosen = range(_layers(model)) if layers is None else layers
    for layer in chosen:
        _require_layer(model, layer)
    captured = Captured()

    def keep(kind: Kind, layer: int, tensor: Tensor) -> None:
        kept = tensor if reduce is None else reduce(layer, tensor)
        captured.calls.setdefault(kind, {}).setdefault(layer, []).append(kept)

    def wrapper(inner: AttentionFunction) -> AttentionFunction:
        def attention(module: nn.Module, query: Tensor, key: Any, value: Any, visible: Visible, scale: float) -> Tensor:
            layer = _layer_of(module)
            if layer not in chosen:
                return inner(module, query, key, value, visible, scale)
            if "weights" in what:
                with record() as recording:
                    out = inner(module, query, key, value, visible, scale)
                calls = recording.calls.get("attend", [])
                if len(calls) != 1:
                    raise ValueError(
                        f"weights can be captured where a layer's attention is one call of attend(), got {len(calls)}"
                    )
                keep("weights", layer, calls[0])
            else:
                out = inner(module, query, key, value, visible, scale)
            taken: dict[Kind, Any] = {"queries": query, "keys": key, "values": value, "outputs": out}
            for kind, tensor in taken.items():
                if kind not in what:
                    continue
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"{kind} cannot be captured under a cache policy, which keeps them to itself")
                keep(kind, layer, tensor)
            return out

        return attention

    with wrap(model, wrapper):
        yield captured


@contextmanager
def override(model: PreTrainedModel, heads: Mapping[Head, Replacement]) -> Iterator[PreTrainedModel]:
    """The model, in which these heads give something else, before their layer mixes the heads.

    A function gets what the head gives, (batch, queries, dim), and returns what it is to give, of that shape or one
    that broadcasts to it; a tensor takes its place. In generation every new token is a pass of one query.

    Raises ValueError where there is no such head; in the block, where a shape does not fit.
    """
    require_heads(model, heads)
    by_layer: dict[int, dict[int, Replacement]] = {}
    for (layer, head), replacement in heads.items():
        by_layer.setdefault(layer, {})[head] = replacement

    def wrapper(inner: AttentionFunction) -> AttentionFunction:
        def attention(module: nn.Module, query: Tensor, key: Any, value: Any, visible: Visible, scale: float) -> Tensor:
            out = inner(module, query, key, value, visible, scale)
            layer = _layer_of(module)
            if layer not in by_layer:
                return out
            changed = out.clone()
            for head, replacement in by_layer[layer].items():
                own = out[:, head]
                new = replacement(own) if callable(replacement) else replacement
                changed[:, head] = _fitted(new.to(own), own, (layer, head))
            return changed

        return attention

    with wrap(model, wrapper):
        yield model


@contextmanager
def ablate(
    model: PreTrainedModel, heads: Iterable[Head], how: Literal["zero", "uniform"] = "zero"
) -> Iterator[PreTrainedModel]:
    """The model without these heads.

    zero: they give zeros. uniform: they still read, but look at all visible tokens alike, whatever these are, which
    keeps the scale of what the layer gives. For a head's mean: `override(model, mean_outputs(model, heads, tokens))`.

    Raises ValueError where there is no such head.
    """
    heads = list(heads)
    if how not in ("zero", "uniform"):
        raise ValueError(f"how must be 'zero' or 'uniform', got {how!r}")
    if how == "zero":
        with override(model, dict.fromkeys(heads, torch.zeros_like)):
            yield model
        return
    require_heads(model, heads)
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def wrapper(inner: AttentionFunction) -> AttentionFunction:
        def attention(module: nn.Module, query: Tensor, key: Any, value: Any, visible: Visible, scale: float) -> Tensor:
            chosen = by_layer.get(_layer_of(module), [])
            if chosen:  # a query of zeros scores all keys alike
                query = query.index_fill(1, torch.tensor(chosen, device=query.device), 0.0)
            return inner(module, query, key, value, visible, scale)

        return attention

    with wrap(model, wrapper):
        yield model


@torch.no_grad()
def mean_outputs(
    model: PreTrainedModel, heads: Iterable[Head], tokens: Int64[Tensor, "batch tokens"]
) -> dict[Head, Float[Tensor, " dim"]]:
    """What each head gives on average over all tokens of a batch without padding: what `override` takes.

    Raises ValueError where there is no such head.
    """
    heads = list(heads)
    require_heads(model, heads)
    layers = {layer for layer, _ in heads}
    if not layers:
        return {}
    with capture(model, "outputs", layers=layers, reduce=lambda _, out: out.mean(dim=(0, 2))) as captured:
        model.base_model(tokens.to(model.device), use_cache=False)
    means = {layer: passes[-1] for layer, passes in captured.calls["outputs"].items()}
    return {(layer, head): means[layer][head] for layer, head in heads}


def require_heads(model: PreTrainedModel, heads: Iterable[Head]) -> None:
    """Raises ValueError, in one sentence, where the model does not have one of the heads."""
    number = model.config.get_text_config().num_attention_heads
    for layer, head in heads:
        _require_layer(model, layer)
        if not 0 <= head < number:
            raise ValueError(f"head must be from 0 to {number - 1}, got {head} (layer {layer})")


def _require_layer(model: PreTrainedModel, layer: int) -> None:
    if not 0 <= layer < _layers(model):
        raise ValueError(f"layer must be from 0 to {_layers(model) - 1}, got {layer}")


def _layers(model: PreTrainedModel) -> int:
    return model.config.get_text_config().num_hidden_layers


def _layer_of(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ValueError(f"{type(module).__name__} does not know which layer it is in (no layer_idx)")
    return layer


def _fitted(new: Tensor, own: Tensor, head: Head) -> Tensor:
    try:
        return new.expand_as(own)
    except RuntimeError:
        raise ValueError(
            f"the output of head {head} must fit (batch, queries, dim) = {_sizes(own.shape)}, got {_sizes(new.shape)}"
        ) from None


def _sizes(shape: Sequence[int]) -> str:
    return str(tuple(shape))
