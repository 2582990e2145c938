"""A decoder language model that takes any sequence mixer, layer by layer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from regard.attention.tree import tree_bytes
from regard.blocks.feedforward import SwiGLU, round_up
from regard.blocks.layout import parse_layout
from regard.blocks.sequence_mixer import SequenceMixer, State


@dataclass(frozen=True)
class LanguageModelConfig:
    """The sizes of a decoder language model and the order of its mixers."""

    vocab_size: int
    """How many tokens there are."""
    dim: int
    """Numbers per token in the residual stream."""
    layout: str
    """The mixer of each layer by name, e.g. "(conv linear)*3 window"."""
    vocab_multiple: int = 8
    """Embedding and head are padded to a multiple of this; the padding never shows in the logits."""
    tied: bool = True
    """Whether the head's weights are the embedding's."""
    init_std: float = 0.02
    """Standard deviation of the embedding (and of the head) at the start."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.init_std > 0:
            raise ValueError(f"init_std must be positive, got {self.init_std}")
        parse_layout(self.layout)

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of each layer's mixer, first to last."""
        return parse_layout(self.layout)


class DecoderBlock(nn.Module):
    """One layer: a mixer, then a feed-forward net where there is one, each reading the normed residual stream."""

    def __init__(self, dim: int, mixer: SequenceMixer, norm: Callable[[int], nn.Module], feedforward: nn.Module | None):
        super().__init__()
        self.mixer_norm, self.mixer = norm(dim), mixer
        self.feedforward_norm = None if feedforward is None else norm(dim)
        self.feedforward = feedforward

    def forward(
        self, stream: Float[Tensor, "batch tokens dim"], state: State | None, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "batch tokens dim"], State]:
        """The stream with what this layer adds to it, and the mixer's state. The parts work in `dtype`."""
        mixed, state = self.mixer(self.mixer_norm(stream.to(dtype)), state)
        stream = stream + mixed
        if self.feedforward is not None and self.feedforward_norm is not None:
            stream = stream + self.feedforward(self.feedforward_norm(stream.to(dtype)))
        return stream, state


class LanguageModel(nn.Module):
    """A pre-norm decoder whose layers mix tokens by any causal `SequenceMixer`.

    `mixers` makes the mixer of a given dim for each name in the config's layout; `norm` and `feedforward` make those
    parts likewise (`feedforward=None` leaves it out). The model is itself a sequence mixer of token ids: its state is
    the tuple of its layers' states, and any chunking of a sequence gives the same logits. The residual stream is held
    in fp32 whatever the weights are. Positions are the mixers' business.

    Raises ValueError where the layout names a mixer that `mixers` does not have.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        mixers: Mapping[str, Callable[[int], SequenceMixer]],
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        feedforward: Callable[[int], nn.Module] | None = SwiGLU,
    ):
        super().__init__()
        unknown = sorted(set(config.layers) - set(mixers))
        if unknown:
            raise ValueError(f"layout names the mixer {unknown[0]!r}, which is not among {', '.join(sorted(mixers))}")
        self.config, dim = config, config.dim
        padded = round_up(config.vocab_size, config.vocab_multiple)
        self.embedding = nn.Embedding(padded, dim)
        self.layers = nn.ModuleList(
            DecoderBlock(dim, mixers[name](dim), norm, None if feedforward is None else feedforward(dim))
            for name in config.layers
        )
        self.norm = norm(dim)
        self.head = nn.Linear(dim, padded, bias=False)
        for part in (self.embedding, self.head):
            nn.init.normal_(part.weight, std=config.init_std)
        if config.tied:
            self.head.weight = self.embedding.weight

    def initial(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[State, ...]:
        """The state before any token: that of each layer."""
        where = (device or self.embedding.weight.device, dtype or self.embedding.weight.dtype)
        return tuple(layer.mixer.initial(batch, *where) for layer in cast(Iterable[DecoderBlock], self.layers))

    def forward(
        self, tokens: Int64[Tensor, "batch tokens"], state: tuple[State, ...] | None = None
    ) -> tuple[Float[Tensor, "batch tokens vocab"], tuple[State, ...]]:
        """The logits of the token after each token, and the state after the last of them."""
        dtype = self.embedding.weight.dtype
        stream = self.embedding(tokens).to(torch.promote_types(dtype, torch.float32))
        states = []
        for layer, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            stream, after = layer(stream, before, dtype)
            states.append(after)
        logits = self.head(self.norm(stream.to(dtype)))
        return logits[..., : self.config.vocab_size], tuple(states)

    def step(
        self, token: Int64[Tensor, "batch"], state: tuple[State, ...]
    ) -> tuple[Float[Tensor, "batch vocab"], tuple[State, ...]]:
        """The logits of the next token after one more token, and the state after it."""
        logits, state = self(token[:, None], state)
        return logits[:, 0], state

    def generate(
        self,
        prompt: Int64[Tensor, "batch tokens"],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Int64[Tensor, "batch"]]:
        """The new tokens, one position of the whole batch at a time, as they are made.

        Reads the prompt once and goes on from its state. `temperature` 0 takes the likeliest token; otherwise a token
        is drawn, by `generator`, out of the `top_k` likeliest, and of these out of the likeliest whose probabilities
        reach `top_p`. Whoever iterates decides when a text has ended. Raises ValueError on options out of range and on
        a prompt without tokens or with unknown ones.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or positive, got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if prompt.numel() == 0:
            raise ValueError(f"prompt must hold at least one token, got {tuple(prompt.shape)}")
        if prompt.min() < 0 or prompt.max() >= self.config.vocab_size:
            least, most = int(prompt.min()), int(prompt.max())
            raise ValueError(f"prompt must hold tokens in [0, {self.config.vocab_size}), got [{least}, {most}]")
        return self._generate(prompt, max_new_tokens, temperature, top_p, top_k, generator)

    @torch.no_grad()
    def _generate(
        self,
        prompt: Tensor,
        new: int,
        temperature: float,
        top_p: float,
        top_k: int | None,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        logits, state = self(prompt)
        logits = logits[:, -1]
        for left in reversed(range(new)):
            token = sample(logits, temperature, top_p, generator, top_k)
            yield token
            if left:
                logits, state = self.step(token, state)

    def state_bytes(self, state: tuple[State, ...] | None = None) -> int:
        """The bytes of a state as it is stored; of one sequence's initial state where none is given."""
        return tree_bytes(self.initial(1) if state is None else state)


def sample(
    logits: Float[Tensor, "batch vocab"],
    temperature: float,
    top_p: float,
    generator: torch.Generator | None = None,
    top_k: int | None = None,
) -> Int64[Tensor, "batch"]:
    """A token for each row: the likeliest at temperature 0, otherwise drawn from the nucleus of `top_p`.

    With `top_k`, the nucleus is of the distribution over so many likeliest tokens.

    Source: "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2020), section 3.1.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    scores, order = (logits.float() / temperature).sort(dim=-1, descending=True)
    probability = scores[:, :top_k].softmax(dim=-1)
    reached = probability.cumsum(dim=-1) - probability  # by the likelier tokens; 0 for the first, which always stays
    probability = probability.masked_fill(reached >= top_p, 0.0) if top_p < 1 else probability
    return order.gather(-1, probability.multinomial(1, generator=generator)).squeeze(-1)
