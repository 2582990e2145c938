"""A policy works through every way in which a model is called, and the wrong cache is refused."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)
from transformers.masking_utils import causal_mask_function

import regard.llm
from regard.llm import Full, PolicyCache, SnapKV, Streaming, attach, use
from regard.llm.visible import Visible

CLOSE = dict(rtol=1e-4, atol=1e-4)
SMALL = Streaming(sinks=1, recent=4)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=str)
def test_a_call_without_a_cache_begins_one(llama, tokens, options):
    ids = tokens()
    with use(llama, SMALL):
        first, second = llama(ids, **options), llama(ids, **options)
    assert torch.equal(first.logits, second.logits)
    assert (first.logits - llama(ids).logits).abs().max() > 1e-2
    if not options:
        assert first.past_key_values is not second.past_key_values
        assert first.past_key_values.layers[0].store.sinks == SMALL.sinks


def test_a_cache_goes_on_over_several_calls(any_model, tokens):
    ids = tokens(2)
    with use(any_model, Full()):
        cache = Full().cache(any_model)
        parts = [any_model(part, past_key_values=cache).logits for part in ids.split([7, 1, 1, 11], dim=1)]
        assert cache.get_seq_length() == 20
    torch.testing.assert_close(torch.cat(parts, dim=1), any_model(ids).logits, **CLOSE)


def test_the_inner_of_two_policies_counts(llama, tokens):
    ids = tokens()
    with use(llama, SMALL):
        alone = llama(ids).logits
        with use(llama, Full()):
            inner = llama(ids)
        after = llama(ids).logits
    assert torch.equal(alone, after)
    torch.testing.assert_close(inner.logits, llama(ids).logits, **CLOSE)


def test_an_empty_cache_of_transformers_is_replaced(llama, tokens):
    with use(llama, Full()):
        for empty in (DynamicCache(config=llama.config), StaticCache(config=llama.config, max_cache_len=30)):
            assert isinstance(llama(tokens(), past_key_values=empty).past_key_values, PolicyCache)


def test_a_cache_in_use_that_no_policy_made_is_refused(llama, tokens):
    foreign = llama(tokens(number=3), use_cache=True).past_key_values
    with use(llama, Full()), pytest.raises(ValueError, match="holds 3 tokens of a DynamicCache; pass a cache made by"):
        llama(tokens(number=1), past_key_values=foreign)


def test_a_static_cache_is_refused_in_one_sentence(llama, tokens):
    with use(llama, Full()), pytest.raises(ValueError, match="static caches"):
        llama.generate(tokens(), max_new_tokens=2, cache_implementation="static")


def test_keys_that_did_not_go_through_the_cache_are_refused(llama):
    first = llama.model.layers[0].self_attn
    token, visible = torch.zeros(1, 1, 32), Visible(causal_mask_function, 0, 1, None, "cpu")
    angles = llama.model.rotary_emb(token, torch.zeros(1, 1, dtype=torch.long))
    with use(llama, Full()), pytest.raises(ValueError, match="did not go through the cache"):
        first(token, position_embeddings=angles, attention_mask=visible)


def test_gradients_are_off_inside_and_on_after(llama, tokens):
    embedded = llama.get_input_embeddings()(tokens()).requires_grad_()
    with use(llama, Full()):
        assert not llama(inputs_embeds=embedded).logits.requires_grad
    assert llama(inputs_embeds=embedded).logits.requires_grad


def test_prompt_lookup_takes_tokens_back(llama, tokens):
    """It proposes what followed earlier in the prompt, and crops the cache by what the model did not accept."""
    ids = tokens(number=6).repeat(1, 4)
    expected = llama.generate(ids, max_new_tokens=12, do_sample=False)
    cropped = []

    class Watched(PolicyCache):
        def crop(self, tokens_to_remove):
            cropped.append(tokens_to_remove)
            super().crop(tokens_to_remove)

    with use(llama, Full()):
        cache = Watched(Full().cache(llama).layers)
        written = llama.generate(
            ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3, past_key_values=cache
        )
    assert torch.equal(written, expected)
    assert min(cropped) < 0


def test_prompt_lookup_is_refused_by_a_policy_that_evicts(llama, tokens):
    ids = tokens(number=6).repeat(1, 4)
    with use(llama, SnapKV(budget=8, window=4)), pytest.raises(ValueError, match="cannot be taken back"):
        llama.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)


def test_a_model_that_reads_images_keeps_its_eyes(tokens):
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=60, vision_feature_layer=-1)
    ).eval()
    given = dict(input_ids=torch.tensor([[1, 60, 60, 60, 60, 5, 6]]), pixel_values=torch.randn(1, 3, 8, 8))
    with torch.no_grad():
        untouched = model(**given).logits
    with use(model, Full()):
        out = model(**given)
    torch.testing.assert_close(out.logits, untouched, **CLOSE)
    assert isinstance(out.past_key_values, PolicyCache)


def test_functions_and_their_modules_share_a_name():
    from regard.llm.attach import attach as of_module
    from regard.llm.load import load

    assert regard.llm.load is load and attach is of_module and callable(regard.llm.use)
    assert set(regard.llm.__all__) <= set(vars(regard.llm))
