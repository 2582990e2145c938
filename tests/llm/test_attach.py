"""Attention can be replaced and put back, and what it cannot honour is refused."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from regard.llm import attach

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))


def softmax_attention(module, query, key, value, visible, scale):
    mask = visible.at(torch.arange(key.shape[2]))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


@torch.no_grad()
def test_the_models_own_attention_put_in_changes_nothing(llama, tokens):
    before = llama(tokens).logits
    with attach(llama, softmax_attention):
        torch.testing.assert_close(llama(tokens).logits, before)
        torch.testing.assert_close(llama(tokens, use_cache=False).logits, before)


@torch.no_grad()
def test_another_attention_changes_the_output_and_leaves_no_trace(llama, tokens):
    registered, before = set(ALL_ATTENTION_FUNCTIONS._global_mapping), llama(tokens).logits
    implementation = llama.config._attn_implementation
    with attach(llama, lambda module, query, key, value, visible, scale: torch.zeros_like(query)):
        assert (llama(tokens).logits - before).abs().max() > 1e-3
    assert torch.equal(llama(tokens).logits, before)
    assert llama.config._attn_implementation == implementation
    assert set(ALL_ATTENTION_FUNCTIONS._global_mapping) == registered


def test_the_model_is_put_back_after_an_exception(llama):
    implementation = llama.config._attn_implementation
    with pytest.raises(KeyError), attach(llama, softmax_attention):
        raise KeyError
    assert llama.config._attn_implementation == implementation


def test_the_innermost_attention_counts(llama, tokens):
    seen = []

    def note(name):
        def attend(module, query, *rest):
            seen.append(name)
            return torch.zeros_like(query)

        return attend

    with attach(llama, note("outer")):
        with attach(llama, note("inner")):
            llama(tokens)
        llama(tokens)
    assert seen == ["inner", "inner", "outer", "outer"]


def test_gradients_flow_through_attached_attention(llama, tokens):
    embedded = llama.get_input_embeddings()(tokens).detach().requires_grad_()
    with attach(llama, softmax_attention):
        llama(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0


def test_a_prepared_mask_is_refused(llama, tokens):
    with attach(llama, softmax_attention), pytest.raises(ValueError, match=r"must be 2-D .* got 4-D"):
        llama(tokens, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))


def test_a_mask_that_forgets_the_past_is_refused(llama, tokens):
    with torch.no_grad(), attach(llama, softmax_attention):
        cache = llama(tokens, past_key_values=DynamicCache(config=llama.config)).past_key_values
        with pytest.raises(ValueError, match=r"must cover all 10 tokens so far, got 1"):
            llama(tokens[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_a_soft_cap_is_refused_rather_than_swallowed(tokens):
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8)).eval()
    with attach(model, softmax_attention), pytest.raises(ValueError, match=r"passes 'softcap'"):
        model(tokens)


def test_an_encoder_decoder_is_refused():
    model = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4))
    with pytest.raises(ValueError, match="is an encoder-decoder"), attach(model, softmax_attention):
        pass


def test_dropout_is_refused(tokens):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1)).train()
    with attach(model, softmax_attention), pytest.raises(ValueError, match=r"dropout must be 0"):
        model(tokens)
