"""Retrieval heads first: a permutation of a model's KV heads that changes no output and makes every split a slice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.llm.policy import head_dim, kv_heads
from regard.papers.duo_attention.cache_policy import DuoAttention


def retrieval_first(retrieval: Bool[Tensor, "layers kv_heads"]) -> Int[Tensor, "layers kv_heads"]:
    """The heads of every layer in a new order: retrieval heads, then streaming heads, each in their old order."""
    return (~retrieval).long().argsort(dim=1, stable=True)


def permute_heads(model: PreTrainedModel, order: Int[Tensor, "layers kv_heads"]) -> None:
    """Puts KV head `order[layer, i]`, with the query heads of its group, in place i of its layer; in place.

    Rows of the query, key and value projections and their biases move, and columns of the output projection; its bias
    stays. The model computes what it did. `permute_heads(model, order.argsort(1))` undoes it.

    Raises ValueError where the order does not fit the model, or where its attention is not made of four linear layers
    `q_proj, k_proj, v_proj, o_proj`; nothing has moved then.

    Source: section 2.4 ("we pre-process the model by reordering the output channels of the Query, Key and Value").
    """
    config = model.config.get_text_config()
    groups = config.num_attention_heads // kv_heads(config)
    expected = (config.num_hidden_layers, kv_heads(config))
    every = torch.arange(expected[1]).expand(expected)
    if tuple(order.shape) != expected or not torch.equal(order.sort(dim=1).values.cpu(), every):
        raise ValueError(
            f"order must permute {expected[1]} KV heads in each of {expected[0]} layers, got {order.tolist()}"
        )
    layers = _attentions(model, expected[0])
    with torch.no_grad():
        for attention, heads in zip(layers, order, strict=True):
            for name, width in (("q_proj", groups), ("k_proj", 1), ("v_proj", 1)):
                linear = getattr(attention, name)
                rows = _channels(heads, width * head_dim(config), linear.weight.device)
                linear.weight.copy_(linear.weight[rows])
                if linear.bias is not None:
                    linear.bias.copy_(linear.bias[rows])
            weight = attention.o_proj.weight
            weight.copy_(weight[:, _channels(heads, groups * head_dim(config), weight.device)])


@contextmanager
def reordered(model: PreTrainedModel, policy: DuoAttention) -> Iterator[DuoAttention]:
    """The policy for the model as it is inside the `with` block, its retrieval heads first; as before after it."""
    order = retrieval_first(policy.retrieval)
    gates = dataclasses.replace(policy.gates, values=policy.retrieval.float().gather(1, order))
    permute_heads(model, order)
    try:
        yield dataclasses.replace(policy, gates=gates, sparsity=1.0 - policy.retrieval.double().mean().item())
    finally:
        permute_heads(model, order.argsort(dim=1))


def _channels(heads: Int[Tensor, " kv_heads"], width: int, device: torch.device) -> Int[Tensor, " channels"]:
    return (heads[:, None].to(device) * width + torch.arange(width, device=device)).flatten()


def _attentions(model: PreTrainedModel, layers: int) -> list[Any]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    found = [
        part for part in model.modules() if all(isinstance(getattr(part, name, None), nn.Linear) for name in names)
    ]
    if len(found) != layers:
        raise ValueError(
            f"heads can be reordered where every layer has linear {', '.join(names)}; "
            f"{type(model).__name__} has them in {len(found)} of {layers} layers"
        )
    return sorted(found, key=lambda part: part.layer_idx)
