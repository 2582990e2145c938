"""Heads are seen, replaced and silenced, whatever else is attached, and the model is as before."""

import math

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from regard.attention.attend import attend
from regard.llm import H2O, Full, Streaming, attach, use
from regard.llm.heads import ablate, capture, mean_outputs, override

CLOSE = dict(rtol=1e-4, atol=1e-5)
LAYERS, HEADS, KV_HEADS, DIM = 3, 4, 2, 8


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# capture


def test_weights_are_those_that_the_model_would_show(any_model, tokens):
    ids, before = tokens(2), any_model.config._attn_implementation
    any_model.set_attn_implementation("eager")
    expected = any_model(ids, output_attentions=True).attentions
    any_model.set_attn_implementation(before)
    with capture(any_model, "weights") as seen:
        any_model(ids)
    assert sorted(seen.weights) == [0, 1, 2]
    for layer, weights in seen.weights.items():
        torch.testing.assert_close(weights, expected[layer], **CLOSE)


def test_all_kinds_fit_together(llama, tokens):
    """The outputs are the weights' means of the values; the weights the softmax of queries and keys."""
    with capture(llama, "weights", "queries", "keys", "values", "outputs", layers=[1]) as seen:
        llama(tokens(2))
    assert all(list(of_kind) == [1] for of_kind in seen.calls.values()) and len(seen.calls) == 5
    key, value = (part[1].repeat_interleave(HEADS // KV_HEADS, 1) for part in (seen.keys, seen.values))
    scores = seen.queries[1] @ key.mT / math.sqrt(DIM)
    future = torch.ones(20, 20, dtype=torch.bool).triu(1)
    torch.testing.assert_close(seen.weights[1], scores.masked_fill(future, -math.inf).softmax(-1), **CLOSE)
    torch.testing.assert_close(seen.outputs[1], seen.weights[1] @ value, **CLOSE)


def test_looking_changes_nothing(any_model, tokens):
    ids, before = tokens(2), any_model.config._attn_implementation
    mask = (torch.arange(20) >= torch.tensor([[0], [6]])).long()
    untouched = any_model(ids, attention_mask=mask).logits
    with capture(any_model, "weights", "outputs"):
        looked_at = any_model(ids, attention_mask=mask).logits
    torch.testing.assert_close(looked_at[mask.bool()], untouched[mask.bool()], rtol=1e-4, atol=1e-4)
    assert torch.equal(any_model(ids, attention_mask=mask).logits, untouched)
    assert any_model.config._attn_implementation == before


def test_every_pass_of_generation_is_kept(mistral, tokens):
    ids = tokens()
    expected = mistral.generate(ids, max_new_tokens=4, do_sample=False)
    with capture(mistral, "weights", layers=[2]) as seen:
        assert torch.equal(mistral.generate(ids, max_new_tokens=4, do_sample=False), expected)
    shapes = [tuple(weights.shape) for weights in seen.calls["weights"][2]]
    assert shapes == [(1, 4, 20, 20)] + [(1, 4, 1, 6)] * 3, "the cache of a sliding window of 6 holds no more"
    for weights in seen.calls["weights"][2]:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    seen.clear()
    assert seen.weights == {}


def test_reduce_says_what_is_kept(llama, tokens):
    ids = tokens(number=10).repeat(1, 2)
    with capture(llama, "weights", reduce=lambda layer, weights: weights[0].diagonal(-9, -2, -1).mean(-1)) as seen:
        llama(ids)
    with capture(llama, "weights") as whole:
        llama(ids)
    for layer in range(LAYERS):  # how much each head looks at what followed the last time
        expected = torch.stack([whole.weights[layer][0, :, q, q - 9] for q in range(9, 20)]).mean(0)
        torch.testing.assert_close(seen.weights[layer], expected)


def test_weights_under_a_policy_are_over_what_it_holds(llama, tokens):
    ids = tokens(2)
    for enter_policy_first in (True, False):
        policy = Streaming(sinks=1, recent=4)
        outer, inner = use(llama, policy), capture(llama, "weights", "outputs")
        with outer if enter_policy_first else inner as first, inner if enter_policy_first else outer as second:
            seen = second if enter_policy_first else first
            llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        assert [w.shape[-1] for w in seen.calls["weights"][0]] == [20, 5, 5]


def test_weights_of_another_attention_are_its_own(llama, tokens):
    def sharper(module, query, key, value, visible, scale):
        return attend(query, key, value, mask=visible.over(), scale=9 * scale)

    with capture(llama, "weights", layers=[0]) as usual:
        llama(tokens())
    with attach(llama, sharper), capture(llama, "weights", layers=[0]) as seen:
        llama(tokens())
    assert seen.weights[0].amax(-1).mean() > usual.weights[0].amax(-1).mean() + 0.1


def test_what_cannot_be_seen_is_refused(llama, tokens):
    def silent(module, query, *rest):
        return torch.zeros_like(query)

    with attach(llama, silent), capture(llama, "weights"), pytest.raises(ValueError, match=r"one call .* got 0"):
        llama(tokens())
    with use(llama, Full()), capture(llama, "keys"), pytest.raises(ValueError, match="keys cannot be captured under a"):
        llama(tokens())
    with use(llama, H2O(8)), capture(llama, "weights"), pytest.raises(ValueError, match=r"one call .* got 2"):
        llama(tokens(number=200))  # read in two tiles
    llama(tokens())


def test_gradients_flow_to_what_is_captured(llama, tokens):
    with torch.enable_grad(), capture(llama, "outputs", layers=[1]) as seen:
        embedded = llama.get_input_embeddings()(tokens()).requires_grad_()
        out = llama(inputs_embeds=embedded).logits[0, -1].sum()
        (gradient,) = torch.autograd.grad(out, seen.outputs[1])
    assert gradient.shape == (1, HEADS, 20, DIM) and gradient.abs().sum() > 0


# override and ablate


def test_a_head_put_back_changes_nothing_and_another_does(any_model, tokens):
    ids = tokens(2)
    untouched = any_model(ids).logits
    with override(any_model, {(1, 2): lambda own: own}):
        torch.testing.assert_close(any_model(ids).logits, untouched, rtol=1e-4, atol=1e-4)
    with override(any_model, {(1, 2): lambda own: own.roll(1, dims=1)}):
        assert (any_model(ids).logits - untouched).abs().max() > 1e-3
    assert torch.equal(any_model(ids).logits, untouched)


def test_only_the_named_head_is_replaced(llama, tokens):
    new = torch.arange(DIM, dtype=torch.float32)
    with capture(llama, "outputs") as own:
        llama(tokens())
    with override(llama, {(1, 2): new, (0, 3): lambda out: -out}), capture(llama, "outputs") as seen:
        llama(tokens())
    assert torch.equal(seen.outputs[1][:, 2], new.expand(1, 20, DIM))
    torch.testing.assert_close(seen.outputs[0][:, :3], own.outputs[0][:, :3])
    torch.testing.assert_close(seen.outputs[0][:, 3], -own.outputs[0][:, 3])


def test_zero_is_the_model_without_the_heads_columns(llama, tokens):
    """What a head gives reaches the model by its own columns of the output projection alone."""
    columns = llama.model.layers[1].self_attn.o_proj.weight[:, 2 * DIM : 3 * DIM]
    before = columns.clone()
    with ablate(llama, [(1, 2)]):
        silenced = llama(tokens()).logits
    try:
        columns.zero_()
        expected = llama(tokens()).logits
    finally:
        columns.copy_(before)
    torch.testing.assert_close(silenced, expected, rtol=1e-4, atol=1e-4)


def test_uniform_looks_at_all_visible_tokens_alike(mistral, tokens):
    with ablate(mistral, [(0, 1), (0, 2)], how="uniform"), capture(mistral, "weights", layers=[0]) as seen:
        mistral(tokens())
    query, key = torch.arange(20)[:, None], torch.arange(20)
    visible = ((key <= query) & (query - key < 6)).float()
    even = visible / visible.sum(-1, keepdim=True)
    torch.testing.assert_close(seen.weights[0][:, 1:3], even.expand(1, 2, 20, 20), **CLOSE)
    assert (seen.weights[0][:, 0] - even).abs().max() > 1e-2


def test_the_mean_takes_a_heads_place(llama, tokens):
    many = tokens(4, 30, seed=3)
    with capture(llama, "outputs") as seen:
        llama(many)
    means = mean_outputs(llama, [(0, 1), (2, 3)], many)
    assert set(means) == {(0, 1), (2, 3)}
    torch.testing.assert_close(means[2, 3], seen.outputs[2][:, 3].flatten(0, 1).mean(0), **CLOSE)
    with override(llama, means), capture(llama, "outputs") as replaced:
        llama(tokens())
    assert torch.equal(replaced.outputs[0][0, 1], means[0, 1].expand(20, DIM))


def test_heads_are_silenced_in_generation_under_any_policy(llama, tokens):
    """Whichever of the two blocks is the outer one: an evaluation enters its policy inside."""
    ids, heads = tokens(), [(layer, 0) for layer in range(LAYERS)]
    with ablate(llama, heads):
        expected = llama.generate(ids, max_new_tokens=8, do_sample=False)
        with use(llama, Full()):
            assert torch.equal(llama.generate(ids, max_new_tokens=8, do_sample=False), expected)
    with use(llama, Full()), ablate(llama, heads):
        assert torch.equal(llama.generate(ids, max_new_tokens=8, do_sample=False), expected)
    assert not torch.equal(llama.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_several_add_up(llama, tokens):
    both = [(0, 1), (2, 3)]
    with ablate(llama, both):
        expected = llama(tokens()).logits
    with ablate(llama, both[:1]), ablate(llama, both[1:]):
        assert torch.equal(llama(tokens()).logits, expected)
    untouched = llama(tokens()).logits
    with ablate(llama, []):
        torch.testing.assert_close(llama(tokens()).logits, untouched, rtol=1e-4, atol=1e-4)


def test_the_model_with_and_without_its_head_are_one(llama, tokens):
    with ablate(llama.model, [(1, 0)]):
        silenced = llama(tokens()).logits
    with ablate(llama, [(1, 0)]):
        assert torch.equal(llama(tokens()).logits, silenced)
    assert (llama(tokens()).logits - silenced).abs().max() > 1e-3


def test_two_models_do_not_mix(llama, mistral, tokens):
    untouched = mistral(tokens()).logits
    with ablate(llama, [(0, 0)]):
        assert torch.equal(mistral(tokens()).logits, untouched)
        with capture(mistral, "outputs") as seen:
            llama(tokens())
    assert seen.calls == {}


def test_the_model_is_put_back_after_an_exception(llama, tokens):
    untouched, before = llama(tokens()).logits, llama.config._attn_implementation
    for block in (capture(llama, "weights"), override(llama, {(0, 0): torch.zeros(1)}), ablate(llama, [(1, 1)])):
        with pytest.raises(KeyError), block:
            raise KeyError
        assert torch.equal(llama(tokens()).logits, untouched)
        assert llama.config._attn_implementation == before


def test_a_cache_from_before_goes_on(llama, tokens):
    ids, cache = tokens(2), DynamicCache(config=llama.config)
    llama(ids[:, :12], past_key_values=cache)
    with capture(llama, "weights", "keys", layers=[0]) as seen:
        llama(ids[:, 12:], past_key_values=cache)
    assert seen.weights[0].shape == (2, HEADS, 8, 20) and seen.keys[0].shape == (2, KV_HEADS, 20, DIM)


@pytest.mark.parametrize(
    ("enter", "message"),
    [
        (lambda m: capture(m, "weights", layers=[0, 3]), "layer must be from 0 to 2, got 3"),
        (lambda m: capture(m), "must be out of weights, queries, keys, values, outputs, got nothing"),
        (lambda m: override(m, {(-1, 0): torch.zeros(8)}), "layer must be from 0 to 2, got -1"),
        (lambda m: override(m, {(0, 4): torch.zeros(8)}), r"head must be from 0 to 3, got 4 \(layer 0\)"),
        (lambda m: ablate(m, [(1, 7)]), "head must be from 0 to 3, got 7"),
        (lambda m: ablate(m, [(1, 7)], how="uniform"), "head must be from 0 to 3, got 7"),
    ],
)
def test_heads_that_do_not_exist_are_named(llama, enter, message):
    with pytest.raises(ValueError, match=message), enter(llama):
        pass


def test_an_output_that_does_not_fit_is_named(llama, tokens):
    with (
        override(llama, {(1, 2): torch.zeros(7)}),
        pytest.raises(ValueError, match=r"output of head \(1, 2\) must fit .* = \(1, 20, 8\), got \(7,\)"),
    ):
        llama(tokens())


def test_mean_outputs_of_no_such_head_are_refused(llama, tokens):
    with pytest.raises(ValueError, match="layer must be from 0 to 2, got 9"):
        mean_outputs(llama, [(9, 0)], tokens())
    assert mean_outputs(llama, [], tokens()) == {}


def test_a_model_with_dropout_is_refused(tokens):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=1)).train()
    with capture(model, "weights"), pytest.raises(ValueError, match="dropout must be 0"):
        model(tokens())
