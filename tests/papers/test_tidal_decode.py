"""TidalDecode: equal to masked attention, no choice of what is hidden, corrected caches, the search for a layer."""

import gc
import json
import math
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from regard.attention.gathered import gathered_attention
from regard.llm import Full, Quantised, SnapKV, Streaming, attach, use
from regard.llm.codec import Integers
from regard.llm.heads import capture
from regard.llm.longcontext import Haystack, passkeys, recall
from regard.llm.policies.full import forked
from regard.llm.visible import Visible
from regard.papers.tidal_decode import PUBLISHED, Search, TidalDecode, correct
from regard.papers.tidal_decode.cache_policy import Choice, choose
from regard.papers.tidal_decode.claim import BUDGETS, handed_over, recall_rises, reselection_works
from regard.papers.tidal_decode.jobs import Train
from regard.papers.tidal_decode.search import Found, agreement, find_layer, read_contexts, recall_in_force

VOCABULARY, LAYERS, HEADS, KV_HEADS = 259, 5, 4, 2
CLOSE = dict(rtol=1e-4, atol=1e-4)
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    initializer_range=0.25,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
TIDAL = TidalDecode(budget=6, select=1, reselect=3)
STEPS = [20, *[1] * 4, 5, *[1] * 3]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def mistral() -> MistralForCausalLM:
    torch.manual_seed(1)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9)).eval().requires_grad_(False)


def tokens(rows: int, number: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, number), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, *padding: int) -> Tensor:
    return (torch.arange(ids.shape[1]) >= torch.tensor(padding)[:, None]).long()


def fed(model, cache, ids: Tensor, chunks: list[int], mask: Tensor | None = None) -> Tensor:
    """The logits of all tokens, fed in chunks of these lengths."""
    assert sum(chunks) == ids.shape[1]
    logits = []
    for chunk in ids.split(chunks, dim=1):
        seen = cache.get_seq_length() + chunk.shape[1]
        shown = None if mask is None else mask[:, :seen]
        logits.append(model(chunk, past_key_values=cache, attention_mask=shown).logits)
    return torch.cat(logits, dim=1)


def under(model, policy, ids: Tensor, chunks: list[int], mask: Tensor | None = None) -> tuple[Tensor, object]:
    cache = policy.cache(model)
    with use(model, policy):
        return fed(model, cache, ids, chunks, mask), cache


def by_masks(model, policy: TidalDecode, ids: Tensor, chunks: list[int], mask: Tensor | None = None) -> Tensor:
    """The plain reference: dense attention, in which steps of one token mask all but what was chosen."""
    chosen: list[Tensor] = []

    def attention(module, query, key, value, visible: Visible, scale):
        groups, layer = query.shape[1] // key.shape[1], module.layer_idx
        scores = query @ key.repeat_interleave(groups, 1).mT * scale
        places = torch.arange(key.shape[2])
        shown = visible.at(places)
        if query.shape[2] == 1 and layer >= policy.select:
            if layer in (policy.select, policy.reselect):
                worth = scores.masked_fill(~shown, -math.inf)
                if policy.per == "kv":
                    of_group = worth.unflatten(1, (-1, groups))
                    worth = of_group.sum(2) if policy.reduce == "sum" else of_group.amax(2)
                    worth = worth.repeat_interleave(groups, 1)
                if policy.keep_last:
                    worth[..., -1] = math.inf
                top = worth.topk(min(policy.budget, worth.shape[-1])).indices
                chosen[:] = [torch.zeros_like(worth, dtype=torch.bool).scatter(-1, top, True)]
            else:
                shown = shown & chosen[0]
        weights = scores.masked_fill(~shown, -math.inf).softmax(-1).nan_to_num(0.0)
        return weights @ value.repeat_interleave(groups, 1)

    with attach(model, attention):
        return fed(model, DynamicCache(), ids, chunks, mask)


# The mechanism


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"select": 0, "reselect": 4},
        {"select": 2, "reselect": None},
        {"per": "kv"},
        {"per": "kv", "reduce": "max"},
        {"keep_last": True, "budget": 1},
    ],
    ids=str,
)
def test_steps_equal_masked_attention(llama, options):
    policy, ids = replace(TIDAL, **options), tokens(2, sum(STEPS))
    logits, _ = under(llama, policy, ids, STEPS)
    torch.testing.assert_close(logits, by_masks(llama, policy, ids, STEPS), **CLOSE)
    assert (logits - llama(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("options", [{}, {"per": "kv", "keep_last": True}, {"budget": 12}], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_padding_and_windows_stay_hidden(request, name, options):
    """A budget of 12 is more than the window shows, and than a row has behind its padding."""
    model, policy, ids = request.getfixturevalue(name), replace(TIDAL, **options), tokens(2, sum(STEPS))
    mask = left_padded(ids, 0, 15)
    logits, _ = under(model, policy, ids, STEPS, mask)
    expected = by_masks(model, policy, ids, STEPS, mask)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **CLOSE)


def test_a_windowed_layer_sees_nothing_outside_its_window_through_a_choice(mistral):
    """A layer that sees everything chooses, then one with a window follows."""
    policy = replace(TIDAL, budget=8)
    layer, other = (policy.cache(mistral).layers[index] for index in (2, 4))
    key, value = torch.randn(1, KV_HEADS, 30, 8), torch.randn(1, KV_HEADS, 30, 8)
    query = torch.randn(1, HEADS, 1, 8)
    index = torch.tensor([3, 7, 25, 29, 11, 2, 27, 0]).expand(1, HEADS, -1)
    windowed = Visible(lambda row, head, at, held: (held <= at) & (held > at - 6), 29, 1, None, "cpu")
    for each in (layer, other):
        each.store.append(key, value)
    out = layer.attend_to(Choice(index, ragged=False), query, windowed, 0.3)
    inside = Choice(torch.tensor([29, 27, 25]).expand(1, HEADS, -1), ragged=False)
    everywhere = Visible(lambda row, head, at, held: held <= at, 29, 1, None, "cpu")
    torch.testing.assert_close(out, other.attend_to(inside, query, everywhere, 0.3))


@pytest.mark.parametrize("chunks", [[20, 10, 12], [2, 3, 37], [40, 2]])
def test_chunks_of_two_tokens_and_more_are_full_attention(llama, chunks):
    ids = tokens(2, 42)
    torch.testing.assert_close(under(llama, TIDAL, ids, chunks)[0], llama(ids).logits, **CLOSE)


def test_below_the_budget_every_step_is_full_attention(llama):
    ids = tokens(1, 16)
    logits, _ = under(llama, replace(TIDAL, budget=10), ids, [5, *[1] * 11])
    untouched = llama(ids).logits
    torch.testing.assert_close(logits[:, :10], untouched[:, :10], **CLOSE)
    assert (logits[:, 10:] - untouched[:, 10:]).abs().amax(-1).min() > 1e-3


def plain(seen: int) -> Visible:
    from transformers.masking_utils import causal_mask_function

    return Visible(causal_mask_function, seen - 1, 1, None, torch.device("cpu"))


def chosen(query: Tensor, keys: Tensor, policy: TidalDecode, visible: Visible | None = None) -> list[list[int]]:
    """The chosen positions of every group of the first row, sorted."""
    choice = choose(query, keys, plain(keys.shape[2]) if visible is None else visible, policy)
    return choice.positions[0].sort(-1).values.tolist()


def test_what_is_chosen_by_hand():
    """Two query heads share keys 3, 1, -2, 0, 2: the one looks for large keys, the other, weaker, for small ones."""
    query = torch.tensor([1.0, -0.9]).view(1, 2, 1, 1)
    keys = torch.tensor([3.0, 1.0, -2.0, 0.0, 2.0]).view(1, 1, 5, 1)
    two = TidalDecode(budget=2)
    assert chosen(query, keys, two) == [[0, 4], [2, 3]]
    assert chosen(query, keys, replace(two, per="kv")) == [[0, 4]]  # sums .3 .1 -.2 0 .2
    assert chosen(query, keys, replace(two, per="kv", reduce="max")) == [[0, 4]]  # 3 1 1.8 0 2
    assert chosen(query, keys, replace(two, per="kv", reduce="max", budget=3)) == [[0, 2, 4]]
    assert chosen(query, keys, replace(two, per="kv", budget=3)) == [[0, 1, 4]]
    assert chosen(query, keys, replace(two, keep_last=True)) == [[0, 4], [2, 4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_do_not_tie_in_half_precision(dtype):
    query = torch.ones(1, 1, 1, 2, dtype=dtype)
    keys = torch.tensor([[1.0, 0.0], [1.0, 1e-4], [1.0, 2e-4], [1.0, 0.0]], dtype=dtype).view(1, 1, 4, 2)
    assert chosen(query, keys, TidalDecode(budget=1)) == [[2]]


def test_too_few_visible_keys_leave_places_empty():
    query, keys = torch.ones(1, 1, 1, 1), torch.arange(6.0).view(1, 1, 6, 1)
    padding = torch.tensor([[0, 0, 0, 0, 1, 1]]).bool()
    visible = Visible(lambda row, head, at, held: held <= at, 5, 1, padding, torch.device("cpu"))
    assert chosen(query, keys, TidalDecode(budget=4), visible) == [[-1, -1, 4, 5]]


def test_coded_keys_are_read_as_they_are_decoded(llama):
    cache = Quantised(TIDAL, bits=8).cache(llama)
    layer, generator = cache.layers[2], torch.Generator().manual_seed(0)
    assert isinstance(layer.store.codec, Integers)
    keys, values = layer.store.append(*torch.randn(2, 2, KV_HEADS, 30, 8, generator=generator))
    query = torch.randn(2, HEADS, 1, 8, generator=generator)
    for groups in (HEADS, KV_HEADS):
        index = torch.rand(2, groups, 30, generator=generator).topk(7).indices
        out = layer.attend_to(Choice(index, ragged=False), query, plain(30), 0.3)
        torch.testing.assert_close(out, gathered_attention(query, keys, values, index, scale=0.3))


def test_a_prefill_is_shared(llama):
    ids = tokens(2, 34)
    read = under(llama, Full(), ids[:, :30], [30])[1]
    for policy in (TIDAL, replace(TIDAL, reselect=None)):
        with use(llama, policy):
            logits = fed(llama, forked(read, policy, llama), ids[:, 30:], [1] * 4)
        expected, _ = under(llama, policy, ids, [30, *[1] * 4])
        torch.testing.assert_close(logits, expected[:, 30:], **CLOSE)


def test_entries_read():
    """A model of 32 layers, of which 2 read all, 2 choose and 28 follow."""
    policy, config = TidalDecode(budget=128, reselect=13), LlamaConfig(num_hidden_layers=32)
    assert policy.entries_read(config, 100_000) == 4 * 100_000 + 28 * 128
    assert replace(policy, reselect=None).entries_read(config, 100_000) == 3 * 100_000 + 29 * 128
    assert policy.entries_read(config, 50) == 32 * 50


# Cache correction


def entries(cache) -> list[Tensor]:
    return [part for layer in cache.layers for part in layer.store.everything()]


def test_corrected_entries_are_those_of_full_attention(llama):
    ids, mask = tokens(2, 32), left_padded(tokens(2, 32), 0, 6)
    policy = replace(TIDAL, correct_every=4)
    _, full = under(llama, Full(), ids, [32], mask)
    _, never = under(llama, TIDAL, ids, [24, *[1] * 8], mask)
    _, cache = under(llama, policy, ids, [24, *[1] * 8], mask)
    differ = max(
        (a[..., 24:, :] - b[..., 24:, :]).abs().max() for a, b in zip(entries(never), entries(full), strict=True)
    )
    assert differ > 0.1
    for ours, theirs in zip(entries(cache), entries(full), strict=True):
        torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
        torch.testing.assert_close(ours[1, :, 6:], theirs[1, :, 6:], **CLOSE)


def test_correction_waits_for_its_number_and_takes_what_followed_along(llama):
    ids = tokens(1, 30)
    policy = replace(TIDAL, correct_every=5)
    full = entries(under(llama, Full(), ids, [30])[1])
    for chunks, waiting in ([24, 1, 1, 1, 1], 4), ([24, 1, 1, 2], 4), ([24, 1, 1, 1, 3], 0), ([24, 6], 0):
        _, cache = under(llama, policy, ids[:, : sum(chunks)], chunks)
        held = cache.layers[0].uncorrected
        assert waiting == (0 if held is None else held.shape[1])
        off = max(
            (ours - theirs[:, :, : sum(chunks)]).abs().max() for ours, theirs in zip(entries(cache), full, strict=True)
        )
        assert (off > 1e-2) == (waiting > 0)


def test_generation_is_corrected_with_positions_and_beams(llama):
    """Steps of `generate` bring the positions of rows behind their padding."""
    ids, mask = tokens(2, 16), left_padded(tokens(2, 16), 0, 5)
    for options in ({}, {"num_beams": 3}):
        policy = replace(TIDAL, correct_every=4)
        with use(llama, policy):
            out = llama.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=9,
                min_new_tokens=9,
                do_sample=False,
                return_dict_in_generate=True,
                **options,
            )
        cache = out.past_key_values
        assert cache.get_seq_length() == 24 and cache.layers[0].uncorrected is None
        if options:
            continue
        longer = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], 1)
        positions = (longer.cumsum(1) - 1).clamp(min=0)
        full = Full().cache(llama)
        with use(llama, Full()):
            llama(out.sequences[:, :24], attention_mask=longer, position_ids=positions, past_key_values=full)
        for ours, theirs in zip(entries(cache), entries(full), strict=True):
            torch.testing.assert_close(ours[1, :, 5:], theirs[1, :, 5:], **CLOSE)


def test_a_cache_is_corrected_by_hand(llama):
    ids = tokens(1, 28)
    cache = TIDAL.cache(llama)
    with use(llama, TIDAL):
        fed(llama, cache, ids, [20, *[1] * 8])
        correct(llama, cache, ids[:, 20:])
        with pytest.raises(ValueError, match="tokens must be the last ones of the cache, from 2 to the 28"):
            correct(llama, cache, ids[:, 27:])
    for ours, theirs in zip(entries(cache), entries(under(llama, Full(), ids, [28])[1]), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_the_hook_goes_with_its_cache(llama):
    hooks = llama.base_model._forward_hooks
    cache = replace(TIDAL, correct_every=4).cache(llama)
    assert len(hooks) == 1
    del cache
    gc.collect()
    assert not hooks


def test_tokens_that_are_taken_back_need_no_correction(llama):
    _, cache = under(llama, replace(TIDAL, correct_every=9), tokens(1, 26), [20, *[1] * 6])
    cache.crop(-2)
    assert cache.layers[0].uncorrected.tolist() == tokens(1, 26)[:, 20:24].tolist()
    assert forked(cache, replace(TIDAL, correct_every=9), llama).layers[0].uncorrected.shape == (1, 4)
    cache.crop(-4)
    assert cache.layers[0].uncorrected is None


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be at least 1 token, got 0"),
        ({"select": -1}, "select must be a layer, counted from 0, got -1"),
        ({"reselect": 2}, "reselect must be a layer after select = 2, got 2"),
        ({"per": "head"}, "per must be 'query' or 'kv', got 'head'"),
        ({"reduce": "mean"}, "reduce must be 'sum' or 'max', got 'mean'"),
        ({"correct_every": 1}, "correct_every must be at least 2 tokens, or None for never, got 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        TidalDecode(**options)
    if options.keys() & {"per", "reduce"}:
        return  # the type is refused first where types are checked
    assert message in str(caught.value)


def test_layers_must_be_the_models(llama):
    for policy, message in (
        (TidalDecode(), "reselect must be below 5, the layers of the model, got 15; regard train tidal_decode"),
        (TidalDecode(select=5, reselect=None), "select must be below 5"),
    ):
        with pytest.raises(ValueError, match=message), use(llama, policy):
            pass
    with pytest.raises(ValueError, match="model must be one of llama-2-7b, longchat-7b"):
        TidalDecode.published("llama")


def test_published_layers():
    assert TidalDecode.published("llama-3-8b", budget=32) == TidalDecode(budget=32, select=2, reselect=13)
    assert TidalDecode.published("smollm2-135m-instruct") == TidalDecode()
    assert all(TidalDecode.published(name) for name in PUBLISHED)


# The search


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    """Text of a few words, each a token, so that questions are short."""
    words = ["some", "plain", "words", "about", "nothing", "that", "matters"]
    known = ["?", "unknown", "What", "is", "The", "special", "number", "for", *words]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="unknown"))
    backend.pre_tokenizer = Whitespace()
    order = torch.randint(len(words), (2000,), generator=torch.Generator().manual_seed(0))
    return Haystack(PreTrainedTokenizerFast(tokenizer_object=backend), " ".join(words[i] for i in order))


def test_agreement_is_the_overlap_of_the_tops(llama):
    ids, queries, budget = tokens(2, 30), 3, 5
    agreed = agreement(llama, ids, budget, queries)
    with capture(llama, "weights") as captured:
        llama(ids)
    shares = []
    for row in range(2):
        for head in range(HEADS):
            for query in range(30 - queries, 30):
                tops = [set(captured.weights[n][row, head, query].topk(budget).indices.tolist()) for n in range(LAYERS)]
                shares.append([[len(a & b) / budget for b in tops] for a in tops])
    torch.testing.assert_close(agreed, torch.tensor(shares).mean(0))
    assert agreed.diagonal().tolist() == [1.0] * LAYERS
    with pytest.raises(ValueError, match="the text must be longer than the 16 queries, got 10 tokens"):
        agreement(llama, ids[:, :10], budget)


def test_recall_is_that_of_the_choice_in_force():
    agreed = torch.tensor([[1, 0.2, 0.3, 0.4, 0.5], [0] * 5, [0, 0, 1, 0.8, 0.9], [0] * 5, [0] * 5])
    policy = TidalDecode(select=0, reselect=2)
    assert recall_in_force(agreed, policy, above=0) == pytest.approx((0.2 + 0.8 + 0.9) / 3)
    assert recall_in_force(agreed, replace(policy, reselect=None), above=2) == pytest.approx((0.4 + 0.5) / 2)
    with pytest.raises(ValueError, match="a layer above 4 that follows a choice, the model has 5"):
        recall_in_force(agreed, policy, above=4)


def test_the_search_measures_what_decoding_loses(llama, haystack, tmp_path):
    search = Search(prompts=2, context=60, budget=10, candidates=(2, 4), passages=1)
    found = find_layer(llama, haystack, replace(TIDAL, correct_every=3), search)
    prompts = passkeys(haystack, 2, context=60, count=1, seed=100, split="train")
    second = TidalDecode(budget=10, select=1, reselect=2)
    assert found.losses[2] == pytest.approx(recall(llama, prompts, second).loss, rel=1e-4)
    assert found.full == pytest.approx(recall(llama, prompts).loss, rel=1e-4)
    assert found.full != pytest.approx(found.alone, rel=1e-3) and found.losses.keys() == {2, 4}
    assert found.recall.keys() == {2, 4}
    found.save(tmp_path, TIDAL)
    assert TidalDecode.load(tmp_path) == replace(TIDAL, reselect=found.best)
    assert json.loads((tmp_path / "search.json").read_text())["best"] == found.best


def test_wrong_searches_are_refused(llama, haystack):
    for search, message in (
        (Search(candidates=(1,)), "candidates must be from 2 to 4, got 1"),
        (Search(candidates=(5,)), "candidates must be from 2 to 4, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            find_layer(llama, haystack, TIDAL, search)
    with pytest.raises(ValueError, match="there must be two layers after select = 3, the model has 5"):
        find_layer(llama, haystack, replace(TIDAL, select=3, reselect=None), Search())
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        Search(budget=0)
    with pytest.raises(ValueError, match="candidates must name at least one layer"):
        Search(candidates=())


def test_the_best_layer_has_the_lowest_loss():
    assert Found({3: 2.0, 4: 1.0, 5: 1.5}, {3: 0.9, 4: 0.1}, 3.0, 0.5).best == 4
    assert Train().search.candidates is None


# The claims


@pytest.mark.parametrize("policy", [SnapKV(budget=20, window=8, kernel=3), Streaming(sinks=2, recent=12)], ids=str)
def test_other_policies_go_on_from_full_attention(llama, policy):
    """SnapKV as if it had read the context itself; StreamingLLM's entries are those that full attention made."""
    ids = tokens(2, 48)
    cache = handed_over(read_contexts(llama, ids[:, :32]), policy, llama)
    with use(llama, policy):
        logits = fed(llama, cache, ids[:, 32:], [8, *[1] * 8])
    if isinstance(policy, SnapKV):
        expected, _ = under(llama, policy, ids, [40, *[1] * 8])
        torch.testing.assert_close(logits, expected[:, 32:], **CLOSE)
    else:
        kept = torch.cat([torch.arange(2), torch.arange(20, 32)])
        first = handed_over(read_contexts(llama, ids[:, :32]), policy, llama).layers[3].store
        order = first.positions().sort().indices
        assert first.positions()[order].tolist() == kept.tolist()
        expected = read_contexts(llama, ids[:, :32]).layers[3].store.everything()[0][:, :, kept]
        torch.testing.assert_close(first.everything()[0][:, :, order], expected)
    assert cache.bytes_held < Full().promised_bytes(llama.config, 2, 48)


def test_the_first_rule():
    seed = {f"{name}_{budget}_nll": nll for budget in BUDGETS for name, nll in (("found", 1.5), ("alone", 3.0))}
    seed |= {f"streaming_{budget}_nll": 2.6 for budget in BUDGETS}
    assert reselection_works([seed, seed])
    for worse in ({"found_64_nll": 1.65}, {"alone_256_nll": 2.45}, {"streaming_128_nll": 2.45}):
        assert not reselection_works([seed | worse])
        assert reselection_works([seed | worse, seed])  # the means count


def test_the_second_rule():
    seed = {"alone_recall": 0.3, "anew_recall": 0.4, "alone_nll": 3.4, "anew_nll": 2.9}
    assert recall_rises([seed, seed])
    assert not recall_rises([seed | {"anew_recall": 0.34}])
    assert not recall_rises([seed | {"anew_nll": 3.2}])
