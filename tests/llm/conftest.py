"""Small random models of several architectures."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 259
SHARED = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=4096,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
GROUPED = SHARED | dict(num_key_value_heads=2, head_dim=8)
TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=6)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, sliding_window=6, sliding_window_pattern=2)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHARED)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=512,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ),
}


@cache
def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return TINY[name]().eval().requires_grad_(False)


@pytest.fixture(params=TINY)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One model after the other, with and without groups of heads, sliding windows, rotations."""
    return tiny(request.param)


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="session")
def mistral() -> PreTrainedModel:
    """Every layer sees 6 tokens."""
    return tiny("mistral")


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Random tokens, (rows, number)."""

    def draw(rows: int = 1, number: int = 20, seed: int = 0) -> Tensor:
        return torch.randint(3, VOCABULARY, (rows, number), generator=torch.Generator().manual_seed(seed))

    return draw
