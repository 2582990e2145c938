"""A causal stack in two mechanisms of one configuration: Aaren, and the Transformer that it takes the place of."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from regard.attention.positions import sinusoid
from regard.attention.scan import Running
from regard.attention.tree import tree_leaves
from regard.blocks.saving import Saved
from regard.blocks.sequence_mixer import SequenceMixer, State
from regard.blocks.softmax_attention import KeyValues
from regard.papers.aaren.mixer import Aaren, Projections, learnt_query, no_tokens


@dataclass(frozen=True)
class StackConfig:
    """The sizes of a causal stack, the same for Aaren and for its host Transformer."""

    dim: int = 64
    """Channels of a token."""
    num_layers: int = 2
    """Layers of attention and feed-forward."""
    num_heads: int = 4
    """Heads of attention, each over dim / num_heads channels."""
    feedforward: int = 128
    """Hidden channels of the feed-forward part of a layer."""
    dropout: float = 0.1
    """Share of activations dropped in training."""
    norm: Literal["pre", "post"] = "pre"
    """LayerNorm before each part of a layer, or after its residual sum."""
    positions: Literal["none", "learned", "sinusoid"] = "none"
    """What is added to the tokens before the first layer."""
    max_tokens: int = 1024
    """How many learned positions there are; the other kinds of position have no limit."""

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "feedforward", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim {self.dim} and num_heads {self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {self.norm!r}")
        if self.positions not in ("none", "learned", "sinusoid"):
            raise ValueError(f"positions must be 'none', 'learned' or 'sinusoid', got {self.positions!r}")


class Seen(NamedTuple):
    """What causal self-attention keeps of the tokens so far: it grows with every token."""

    cache: KeyValues
    visible: Bool[Tensor, "batch held"] | None
    """False on padding; None where there was none."""


class CausalAttention(Projections):
    """Causal multi-head self-attention with a KV cache: the mechanism of the host Transformer."""

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], state: Seen, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], Seen]:
        """What every token reads from the tokens up to itself, and the keys and values so far.

        A token where `mask` is False is padding, and read by no token.
        """
        tokens, before = x.shape[1], state.cache.keys.shape[2]
        if tokens == 0:
            return x, state
        q, k, v = self.heads(self.q_proj(x)), self.heads(self.k_proj(x)), self.heads(self.v_proj(x))
        cache, visible = state.cache.append(k, v), state.visible
        if mask is not None or visible is not None:
            past = x.new_ones(x.shape[0], before, dtype=torch.bool) if visible is None else visible
            visible = torch.cat([past, x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask], 1)
        if before == 0 and visible is None:
            read = scaled_dot_product_attention(q, cache.keys, cache.values, is_causal=True)
        else:
            allowed = None if visible is None else visible[:, None, None]  # (batch, heads, queries, keys)
            if tokens > 1:
                causal = x.new_ones(tokens, before + tokens, dtype=torch.bool).tril(before)
                allowed = causal if allowed is None else causal & allowed
            read = scaled_dot_product_attention(q, cache.keys, cache.values, attn_mask=allowed)
        return self.out_proj(read.transpose(1, 2).flatten(2)), Seen(cache, visible)


class HostLayer(nn.Module, ABC):
    """A layer of the stack around some way to mix tokens: `x + mix(LN x)`, then `x + FFN(LN x)`, or post-norm."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.norm_attn, self.norm_ff = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.drop = nn.Dropout(config.dropout)
        self.ff = nn.Sequential(
            nn.Linear(config.dim, config.feedforward),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.feedforward, config.dim),
        )

    @abstractmethod
    def initial(self, batch: int, device: torch.device | None, dtype: torch.dtype | None) -> State:
        """The state of the layer before any token."""

    @abstractmethod
    def mix(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
        """The tokens mixed along the sequence, and the state after the last of them."""

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], state: State, mask: Bool[Tensor, "batch tokens"] | None
    ) -> tuple[Float[Tensor, "batch tokens dim"], State]:
        """The tokens after this layer, and the state of its attention."""
        mixed, state = self.mix(self.norm_attn(x) if self.pre else x, state, mask)
        x = x + self.drop(mixed)
        x = x if self.pre else self.norm_attn(x)
        x = x + self.drop(self.ff(self.norm_ff(x) if self.pre else x))
        return x if self.pre else self.norm_ff(x), state


class AarenLayer(HostLayer):
    """A layer that reads every prefix with its own learnt query. The state has a constant size."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self.query = learnt_query(config.dim)
        self.attn = Aaren(config.dim, config.num_heads)

    def initial(self, batch: int, device: torch.device | None, dtype: torch.dtype | None) -> Running:
        """Attention over no tokens."""
        return no_tokens(self.attn, batch, device, dtype)

    def mix(self, x: Tensor, state: Running, mask: Tensor | None) -> tuple[Tensor, Running]:
        """Aaren(query, x)."""
        return self.attn(self.query, x, state, mask)


class TransformerLayer(HostLayer):
    """A layer whose queries are the tokens themselves. The state is a KV cache."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self.attn = CausalAttention(config.dim, config.num_heads)

    def initial(self, batch: int, device: torch.device | None, dtype: torch.dtype | None) -> Seen:
        """An empty KV cache."""
        weight = self.attn.k_proj.weight
        shape = (batch, self.attn.num_heads, 0, self.attn.dim // self.attn.num_heads)
        none = torch.empty(shape, device=device or weight.device, dtype=dtype or weight.dtype)
        return Seen(KeyValues(none, none.clone()), None)

    def mix(self, x: Tensor, state: Seen, mask: Tensor | None) -> tuple[Tensor, Seen]:
        """Causal self-attention."""
        return self.attn(x, state, mask)


class StackState(NamedTuple):
    """The states of all layers, and how many tokens went by, which positions need."""

    layers: tuple[Any, ...]
    seen: Int[Tensor, "batch"]


class CausalStack(SequenceMixer):
    """A causal stack of layers of one kind: tokens in, tokens out, chunk by chunk or token by token."""

    layer: ClassVar[type[HostLayer]]
    layers: nn.ModuleList

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.positions: nn.Embedding | None = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_tokens, config.dim)
        self.drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(self.layer(config) for _ in range(config.num_layers))

    def initial(self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> StackState:
        """The state before any token."""
        layers = tuple(layer.initial(batch, device, dtype) for layer in cast(Iterable[HostLayer], self.layers))
        return StackState(layers, torch.zeros(batch, dtype=torch.int64, device=tree_leaves(layers)[0].device))

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        state: StackState | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], StackState]:
        """The tokens after the last layer, and the state to continue with; `mask` is False on padding.

        Raises ValueError where learned positions run out.
        """
        state = self.initial(x.shape[0], x.device, x.dtype) if state is None else state
        x = self.drop(x + self.position(state.seen, x)) if self.config.positions != "none" else x
        after = []
        for layer, before in zip(self.layers, state.layers, strict=True):
            x, reached = layer(x, before, mask)
            after.append(reached)
        return x, StackState(tuple(after), state.seen + x.shape[1])

    def position(self, seen: Int[Tensor, "batch"], x: Float[Tensor, "batch tokens dim"]) -> Tensor:
        """What is added to each token for its place in the sequence."""
        place = seen[:, None] + torch.arange(x.shape[1], device=x.device)
        if self.positions is None:
            return sinusoid(place, self.config.dim).to(x.dtype)
        limit = self.positions.num_embeddings
        if place.numel() and int(place.max()) >= limit:
            raise ValueError(f"max_tokens of the learned positions is {limit}, got token {int(place.max()) + 1}")
        return self.positions(place)


class AarenStack(CausalStack, Saved, library_name="regard"):
    """Layers of Aaren: O(tokens) to train, O(1) time and memory per token to stream."""

    layer = AarenLayer

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)

    @torch.no_grad()
    def weights(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "layers batch heads tokens"]:
        """The weight of every token in what each layer's query reads after the last of them; a picture of the model.

        The weights of a shorter prefix are these, divided by their sum over it.
        """
        seen: list[Tensor] = []
        layers = cast(Iterable[AarenLayer], self.layers)
        hooks = [
            layer.attn.register_forward_pre_hook(lambda attn, given: seen.append(attn.scores(*given[:2], mask)))
            for layer in layers
        ]
        try:
            self(x, mask=mask)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(seen).softmax(-1)


class TransformerStack(CausalStack, Saved, library_name="regard"):
    """The host: a causal Transformer of the same sizes and parameter names, `layers.N.query` apart."""

    layer = TransformerLayer

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)


STACKS: dict[str, type[CausalStack]] = {"aaren": AarenStack, "transformer": TransformerStack}

published = {
    "rl": StackConfig(dim=128, num_layers=3, num_heads=1, feedforward=512),
    "time_series": StackConfig(dim=512, num_layers=2, num_heads=8, feedforward=2048),
    "parameter_count": StackConfig(dim=512, num_layers=1, num_heads=8, feedforward=2048, dropout=0.0),
    "tiny": StackConfig(dim=32, num_layers=2, num_heads=4, feedforward=64, dropout=0.0),
}
"""Published sizes by name: Decision Transformer, time-series library, the paper's parameter count; and a tiny one."""
