"""The laws of cache policies, over the baselines and the policies of every room.

A room whose card provides `cache_policy` exports `POLICIES`, by name, and `POLICY_EXAMPLES`: makers of small policies
for the config of a model, whose names begin with the policy's. Their budgets are below the 24 tokens used here.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from regard import papers
from regard.llm import CachePolicy, PolicyCache, use
from regard.llm import policies as baselines

VOCABULARY, TOKENS, LAYERS = 61, 24, 2
CLOSE = dict(rtol=1e-4, atol=1e-4)
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=LAYERS,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ),
}


@cache
def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False)


def rooms() -> dict[str, object]:
    """The modules that offer policies, by the name to give them in a failure."""
    of_rooms = {paper.slug: paper.module for paper in papers.all() if "cache_policy" in paper.provides}
    return {"the baselines": baselines} | {slug: import_module(module) for slug, module in of_rooms.items()}


EXAMPLES = {name: make for room in rooms().values() for name, make in getattr(room, "POLICY_EXAMPLES", {}).items()}
every_policy = pytest.mark.parametrize("make", EXAMPLES.values(), ids=EXAMPLES)
every_model = pytest.mark.parametrize("name", MODELS)


def indifferent_to_chunks(policy: CachePolicy) -> CachePolicy:
    """The policy, or where the chunks of a prompt matter to it, the setting in which they cannot."""
    return policy if policy.chunk_invariant else policy.unlimited()


def tokens(rows: int = 1, number: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, number), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, *padding: int) -> Tensor:
    return (torch.arange(ids.shape[1]) >= torch.tensor(padding)[:, None]).long()


def fed(model: PreTrainedModel, cache: PolicyCache, ids: Tensor, chunks: list[int], mask: Tensor | None = None):
    """The logits of all tokens, after they went into the cache in chunks of these lengths."""
    assert sum(chunks) == ids.shape[1]
    logits = []
    for chunk in ids.split(chunks, dim=1):
        seen = cache.get_seq_length() + chunk.shape[1]
        out = model(chunk, past_key_values=cache, attention_mask=None if mask is None else mask[:, :seen])
        assert out.past_key_values is cache
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def fresh(model: PreTrainedModel, policy: CachePolicy, ids: Tensor, chunks: list[int], mask: Tensor | None = None):
    with use(model, policy):
        return fed(model, policy.cache(model), ids, chunks, mask)


def written(model: PreTrainedModel, ids: Tensor, new: int = 6, **options) -> Tensor:
    torch.manual_seed(3)
    mask = options.pop("attention_mask", torch.ones_like(ids))
    options.setdefault("do_sample", False)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **options)


# What a room must offer


@pytest.mark.parametrize("room", rooms().values(), ids=rooms())
def test_every_policy_has_an_example(room):
    config = model_of("llama").config
    made = {name: make(config) for name, make in room.POLICY_EXAMPLES.items()}
    for name, kind in room.POLICIES.items():
        assert any(type(policy) is kind and example.startswith(name) for example, policy in made.items()), name


# unlimited() is the untouched model


@every_model
@every_policy
@pytest.mark.parametrize("chunks", [[TOKENS], [9, 1, 1, 8, 5]], ids=str)
def test_unlimited_is_the_untouched_model(name, make, chunks):
    model, ids = model_of(name), tokens(2)
    policy = make(model.config).unlimited()
    torch.testing.assert_close(fresh(model, policy, ids[:1], chunks), model(ids[:1]).logits, **CLOSE)
    mask = left_padded(ids, 0, 7)
    real = mask.bool()
    untouched = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(fresh(model, policy, ids, chunks, mask)[real], untouched[real], **CLOSE)


@every_policy
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("llama", {}, id="greedy"),
        pytest.param("llama", {"do_sample": True}, id="sampling"),
        pytest.param("llama", {"num_beams": 3}, id="beams"),
        pytest.param("mistral", {"prefill_chunk_size": 5}, id="prefill in chunks"),
    ],
)
def test_unlimited_generates_what_the_untouched_model_does(name, make, options):
    model, ids = model_of(name), tokens(2)
    mask = left_padded(ids, 0, 7)
    expected = written(model, ids, attention_mask=mask, **options)
    with use(model, make(model.config).unlimited()):
        assert torch.equal(written(model, ids, attention_mask=mask, **options), expected)


@pytest.mark.parametrize("make", [pytest.param(m, id=name) for name, m in EXAMPLES.items() if name != "full"])
def test_a_small_budget_changes_something(make):
    """Otherwise an example would hold the laws of `unlimited()` by default."""
    model, ids = model_of("llama"), tokens()
    chunks = [TOKENS - 8, *[1] * 8]
    assert (fresh(model, make(model.config), ids, chunks) - model(ids).logits).abs().max() > 1e-2


# Bytes


@every_policy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_held_never_exceed_the_promise(make, dtype):
    model, ids = model_of("llama"), tokens(2, 40)
    mask = left_padded(ids, 0, 4)
    policy, held = make(model.config), []
    try:
        with use(model.to(dtype), policy):
            cache = policy.cache(model)
            for chunk in ids.split([3, 1, 1, 11, *[1] * 8, 6, *[1] * 10], dim=1):
                seen = cache.get_seq_length() + chunk.shape[1]
                out = model(chunk, past_key_values=cache, attention_mask=mask[:, :seen])
                assert out.logits[mask[:, seen - chunk.shape[1] : seen].bool()].isfinite().all()
                held.append(cache.bytes_held)
                assert 0 < held[-1] <= policy.promised_bytes(model.config, 2, seen, dtype.itemsize)
    finally:
        model.float()
    assert held[0] == 2 * 3 * 2 * 8 * LAYERS * 2 * dtype.itemsize, "three tokens are within every budget"


@every_policy
def test_what_is_dropped_is_freed(make):
    """Counted in the memory behind the tensors, of which at most a block of 256 slots waits for new tokens."""
    model = model_of("llama")
    policy, ids = make(model.config), tokens(1, 600) % VOCABULARY
    with use(model, policy):
        cache = policy.cache(model)
        fed(model, cache, ids, [597, 1, 1, 1])
    stores = [store for layer in cache.layers for store in layer.stores if store.keys is not None]
    behind = sum(part.untyped_storage().nbytes() for store in stores for part in (store.keys, store.values))
    token = 2 * model.config.num_key_value_heads * 8 * 4 * LAYERS
    assert cache.bytes_allocated == behind < cache.bytes_held + 256 * token
    assert cache.bytes_held <= policy.promised_bytes(model.config, 1, 600)


@every_policy
def test_a_budget_is_about_what_is_held(make):
    """Of a policy that holds everything it is what most steps read, which its own tests count."""
    model, context = model_of("llama"), 400
    token = 2 * model.config.num_key_value_heads * 8 * 4 * LAYERS
    for tokens_held in (100, 200):
        policy = make(model.config).with_budget(tokens_held, context)
        assert type(policy) is type(make(model.config))
        with use(model, policy):
            cache = policy.cache(model)
            fed(model, cache, tokens(1, context), [context - 1, 1])
        held = cache.bytes_held / token
        assert held == context or held <= tokens_held + context / 16
        assert held >= 0.5 * tokens_held  # heads come in whole ones
    for wrong in ((0, 10), (10, 0)):
        if "with_budget" in vars(type(policy)):
            with pytest.raises(ValueError, match="must be at least 1 token, got 0"):
                policy.with_budget(*wrong)


# Chunks, turns, rows


@every_policy
@pytest.mark.parametrize("name", ["llama", "mistral"])
@settings(max_examples=5, deadline=None, database=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 8))
def test_chunks_do_not_matter_where_the_policy_says_so(make, name, chunks, padding):
    model = model_of(name)
    policy, ids = indifferent_to_chunks(make(model.config)), tokens(2, sum(chunks))
    mask = left_padded(ids, 0, min(padding, sum(chunks) - 1))
    whole = fresh(model, policy, ids, [sum(chunks)], mask)
    torch.testing.assert_close(fresh(model, policy, ids, chunks, mask)[mask.bool()], whole[mask.bool()], **CLOSE)


@every_policy
def test_turns_on_one_cache_are_one_conversation(make):
    model = model_of("llama")
    policy = indifferent_to_chunks(make(model.config))
    said = tokens(1, 14)
    with use(model, policy):
        cache = policy.cache(model)
        first = written(model, said, past_key_values=cache)
        said = torch.cat([first, tokens(1, 9, seed=5)], dim=1)
        answer = written(model, said, past_key_values=cache)
        assert cache.get_seq_length() == answer.shape[1] - 1
        assert torch.equal(answer, written(model, said))


@every_policy
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_batch_of_two_is_two_batches_of_one(make, name):
    model, ids = model_of(name), tokens(2, 30)
    policy, chunks = make(model.config), [18, *[1] * 6, 6]
    both = fresh(model, policy, ids, chunks, left_padded(ids, 0, 5))
    torch.testing.assert_close(both[:1], fresh(model, policy, ids[:1], chunks), **CLOSE)
    # rotations are relative, so that the shifted positions of the padded row give the same
    alone = fresh(model, policy, ids[1:, 5:], [18 - 5, *chunks[1:]])
    torch.testing.assert_close(both[1:, 5:], alone, **CLOSE)


@every_policy
def test_a_padded_prompt_of_several_tiles_is_that_of_a_row_alone(make):
    """Attention is summed up in tiles of 128 queries, and long chunks go through in blocks."""
    model, ids = model_of("llama"), tokens(2, 303)
    policy, chunks = make(model.config), [300, 1, 2]
    both = fresh(model, policy, ids, chunks, left_padded(ids, 0, 5))
    torch.testing.assert_close(both[:1], fresh(model, policy, ids[:1], chunks), **CLOSE)
    alone = fresh(model, policy, ids[1:, 5:], [295, 1, 2])
    torch.testing.assert_close(both[1:, 5:], alone, **CLOSE)


@every_policy
def test_rows_follow_the_beams(make):
    model, ids = model_of("llama"), tokens(2)
    policy, mask, more = make(model.config), left_padded(ids, 0, 5), tokens(2, 4, seed=8)

    def after(change: Callable[[PolicyCache], None], rows: list[int]) -> tuple[Tensor, Tensor]:
        """The logits of what follows, where the rows were changed in between and where they were so from the start."""
        longer = torch.cat([mask, torch.ones_like(more)], dim=1)[rows]
        changed, original = policy.cache(model), policy.cache(model)
        with use(model, policy):
            fed(model, changed, ids, [TOKENS - 2, 1, 1], mask)
            fed(model, original, ids[rows], [TOKENS - 2, 1, 1], mask[rows])
            change(changed)
            following = more[rows]
            return (
                fed(model, changed, following, [1, 3], longer),
                fed(model, original, following, [1, 3], longer),
            )

    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True])), [1]),
    ):
        torch.testing.assert_close(*after(change, rows), **CLOSE)


@every_policy
def test_a_reset_cache_is_a_new_one(make):
    model = model_of("llama")
    policy, chunks = make(model.config), [TOKENS - 3, 1, 2]
    with use(model, policy):
        cache = policy.cache(model)
        fed(model, cache, tokens(2, seed=4), chunks, left_padded(tokens(2), 0, 6))
        cache.reset()
        assert cache.get_seq_length() == cache.bytes_held == cache.bytes_allocated == cache.bytes_of_bookkeeping == 0
        again = fed(model, cache, tokens(), chunks)  # of another batch size, too
    assert torch.equal(again, fresh(model, policy, tokens(), chunks))


@every_policy
def test_tokens_are_taken_back_or_the_cache_says_that_it_cannot(make):
    model, ids, other = model_of("llama"), tokens(1, 5), tokens(1, 3, seed=9)
    policy = make(model.config)
    with use(model, policy):
        cache = policy.cache(model)
        fed(model, cache, ids, [5])
        cache.crop(0)
        if not cache.is_croppable:
            with pytest.raises(ValueError, match="cannot be taken back"):
                cache.crop(-2)
            return
        cache.crop(-2)
        assert cache.get_seq_length() == 3
        answer = fed(model, cache, other, [1, 2])
    expected = fresh(model, policy, torch.cat([ids[:, :3], other], dim=1), [3, 1, 2])
    torch.testing.assert_close(answer, expected[:, 3:], **CLOSE)


# Files


@every_policy
def test_options_survive_their_file(make, tmp_path):
    policy = make(model_of("llama").config)
    policy.save(tmp_path)
    assert type(policy).load(tmp_path) == policy


# The model afterwards, and what is refused


@every_policy
def test_the_model_is_as_before(make):
    model, ids = model_of("llama"), tokens()
    policy, before = make(model.config), model(ids).logits
    state = model.config._attn_implementation, dict(model.base_model._forward_pre_hooks)
    with use(model, policy):
        written(model, ids)
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(KeyError), use(model, policy):
        model(ids)
        raise KeyError
    assert torch.equal(model(ids).logits, before)
    assert (model.config._attn_implementation, dict(model.base_model._forward_pre_hooks)) == state
    assert torch.is_grad_enabled()


@every_policy
def test_what_does_not_fit_is_refused(make):
    model, ids = model_of("llama"), tokens(2)
    policy = make(model.config)
    with use(model, policy):
        with pytest.raises(ValueError, match=r"must be 2-D .* got 4-D"):
            model(ids, attention_mask=torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool))
        cache = policy.cache(model)
        fed(model, cache, ids, [TOKENS])
        with pytest.raises(ValueError, match="holds a batch of 2, got 1"):
            model(ids[:1, :1], past_key_values=cache)
        other = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
        foreign = policy.cache(other)
        with use(other, policy):
            fed(other, foreign, ids, [TOKENS])
        with pytest.raises(ValueError, match="was made for another model"):
            model(ids[:, :1], past_key_values=foreign)
        fewer = PolicyCache(policy.cache(model).layers[:1])
        with pytest.raises(ValueError, match="made for 1 layers, the model has 2"):
            model(ids, past_key_values=fewer)


@every_policy
def test_a_model_that_needs_more_than_softmax_is_refused(make):
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8)).eval()
    with use(capped, make(capped.config)), pytest.raises(ValueError, match="passes 'softcap'"):
        capped(tokens())
    sizes = dict(vocab_size=9, d_model=8, d_ff=8, num_layers=LAYERS, num_heads=2, d_kv=4)
    encoder_decoder = T5ForConditionalGeneration(T5Config(**sizes))
    policy = make(model_of("llama").config)
    with pytest.raises(ValueError, match="is an encoder-decoder"), use(encoder_decoder, policy):
        pass
