"""The Based language model: many short convolutions, some Taylor linear attention, some small windows of softmax.

No `from __future__ import annotations` here: the hub mixin reads the type of `config` off the constructor.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from regard.blocks.feedforward import SwiGLU, round_up
from regard.blocks.language_model import LanguageModel, LanguageModelConfig
from regard.blocks.saving import Saved
from regard.papers.based.mixer import BaseConv, SlidingWindowAttention, TaylorLinearAttention

__all__ = ["Based", "BasedConfig", "initialise"]


@dataclass(frozen=True)
class BasedConfig(LanguageModelConfig):
    """The sizes of a Based model. Its layout names the mixers `conv`, `linear` and `window`."""

    num_heads: int = 16
    """Heads of the linear and of the window attention."""
    feature_dim: int = 16
    """Numbers per query and key of linear attention: the dial of its memory, which grows with their square."""
    window: int = 64
    """How many tokens before itself a token sees in window attention."""
    kernel: int = 3
    """Tokens that a short convolution sees."""
    conv_bias: bool = False
    """Whether the convolutions have biases, as those trained with the authors' CUDA kernel do."""
    chunk: int = 128
    """Tokens that linear attention takes at once; changes speed and rounding only."""
    eps: float = 1e-12
    """Added to the denominator of linear attention."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.layers) - {"conv", "linear", "window"})
        if unknown:
            raise ValueError(f"layout must be made of conv, linear and window, got {unknown[0]!r}")
        for name in ("num_heads", "feature_dim", "window", "kernel", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eps", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got dim {self.dim} and num_heads {self.num_heads}")

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layers: twice `dim`, rounded up to a multiple of 256."""
        return round_up(2 * self.dim, 256)


class Based(LanguageModel, Saved, library_name="regard"):
    """A pre-norm decoder of gated short convolutions, Taylor linear attention and sliding-window attention.

    Token ids (batch, tokens) give logits (batch, tokens, vocab) and a state of the same bytes after any number of
    tokens. `model(prompt)` is the chunked form, parallel where `config.chunk` covers the prompt; `step` and `generate`
    go on from the state, token by token.

    Source: section 3 and appendix E; initialisation as in the released code.
    """

    published: ClassVar[Mapping[str, BasedConfig]]
    """The released configurations and a tiny one, by name."""

    def __init__(self, config: BasedConfig) -> None:
        heads = config.num_heads
        super().__init__(
            config,
            mixers={
                "conv": partial(BaseConv, kernel=config.kernel, conv_bias=config.conv_bias),
                "linear": partial(
                    TaylorLinearAttention,
                    num_heads=heads,
                    feature_dim=config.feature_dim,
                    chunk=config.chunk,
                    eps=config.eps,
                ),
                "window": partial(SlidingWindowAttention, num_heads=heads, window=config.window),
            },
            norm=partial(nn.RMSNorm, eps=config.norm_eps),
            feedforward=partial(SwiGLU, hidden=config.hidden),
        )
        initialise(self.layers, config.init_std)

    @classmethod
    def from_official(
        cls, source: os.PathLike[str] | str | Mapping[str, Tensor], config: BasedConfig | None = None
    ) -> "Based":
        """The model with the authors' weights.

        `source` is a folder with `model.safetensors` or `pytorch_model.bin` (and the `config.json` beside it), such a
        file, or the state dict itself. Without `config` the sizes come from `config.json`, or else from the published
        configuration of that width and depth. Raises ValueError where weights and sizes do not fit.
        """
        from regard.papers.based.weights import check_fit, read_official

        weights, config = read_official(source, config, cls.published)
        model = cls(config)
        check_fit(weights, model.state_dict())
        model.load_state_dict(weights)
        return model


def initialise(layers: nn.ModuleList, std: float) -> None:
    """Draws every linear layer; those that write to the residual stream smaller, by how many of them there are.

    Source: GPT-2 (Radford et al., 2019), section 2.3, with two writes a layer.
    """
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear):
            writes = name.endswith(("out_proj", "fc2"))
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * len(layers)) if writes else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


_LAYERS_27 = "(conv linear window conv conv)*5 conv conv"
_LAYERS_36 = "(conv linear window conv conv)*5 conv conv linear window conv*4 linear window conv"
_GPT2_TOKENS = 50257

Based.published = {
    "based-360m": BasedConfig(_GPT2_TOKENS, 1024, _LAYERS_27, window=128, eps=1e-6),
    "based-1b": BasedConfig(_GPT2_TOKENS, 1792, _LAYERS_36, window=128),
    "based-1b-50b": BasedConfig(_GPT2_TOKENS, 1792, _LAYERS_36, window=128, eps=1e-6),
    "example-360m": BasedConfig(_GPT2_TOKENS, 1024, _LAYERS_27, window=64),
    "tiny": BasedConfig(256, 64, "conv linear conv window", num_heads=2, feature_dim=8, window=16),
}
