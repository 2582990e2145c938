"""A2SF: scores that forget, and step by step in one pass what decoding does token by token."""

import json
import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.masking_utils import causal_mask_function

from regard.attention.attend import attend
from regard.llm import H2O, attach, use
from regard.llm.visible import Visible
from regard.papers.a2sf import A2SF, ideal_mask, mask_similarity, simulate
from regard.papers.a2sf.cache_policy import A2SFLayer
from regard.papers.a2sf.claim import (
    FACTORS,
    SHARES,
    age_follows_the_factor,
    forgetting_wins,
    mean_age,
    no_half_is_needed,
    plain_sum_keeps_the_old,
)
from regard.papers.a2sf.jobs import Train
from regard.papers.a2sf.search import best_factor, losses_under, sweep
from regard.papers.a2sf.selection import discounts, grouped_logits

VOCABULARY = 61
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=8,
    initializer_range=0.2,
    max_position_embeddings=512,
)
ROWS = [[1.0], [0.6, 0.4], [0.5, 0.1, 0.4], [0.4, 0.05, 0.25, 0.3]]
"""One head's attention over four tokens."""


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def mistral() -> MistralForCausalLM:
    torch.manual_seed(1)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=12)).eval().requires_grad_(False)


def tokens(rows: int, number: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, number), generator=torch.Generator().manual_seed(seed))


def in_chunks(model, policy, ids, chunks, mask=None):
    cache, logits = policy.cache(model), []
    with use(model, policy):
        for chunk in ids.split(chunks, dim=1):
            seen = cache.get_seq_length() + chunk.shape[1]
            part = None if mask is None else mask[:, :seen]
            logits.append(model(chunk, past_key_values=cache, attention_mask=part).logits)
    return torch.cat(logits, dim=1), cache


def fed(policy: A2SF, rows: list[list[float]], chunks: list[int]) -> A2SFLayer:
    """A layer of one head that has read tokens which attend to each other as the rows say."""
    size = len(rows)
    query = torch.tensor([row + [1.0] * (size - len(row)) for row in rows]).log()[None, None]
    key, layer, first = torch.eye(size)[None, None], A2SFLayer(policy), 0
    for length in chunks:
        part = slice(first, first + length)
        visible = Visible(causal_mask_function, first, length, None, torch.device("cpu"))
        layer.attend(torch.nn.Identity(), query[:, :, part], key[:, :, part], key[:, :, part], visible, 1.0)
        first = layer.seen = first + length
    return layer


# Scores


@pytest.mark.parametrize(
    ("forgetting", "expected"),
    [(1.0, [2.5, 0.55, 0.65, 0.3]), (0.5, [0.925, 0.2, 0.45, 0.3]), (0.0, [0.4, 0.05, 0.25, 0.3])],
)
@pytest.mark.parametrize("chunks", [[4], [1, 1, 1, 1], [2, 2], [1, 3]], ids=str)
def test_scores_are_those_worked_out_by_hand(forgetting, expected, chunks):
    layer = fed(A2SF(budget=4, forgetting=forgetting, recent=0), ROWS, chunks)
    assert layer.store.held("scores").flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("prefill", ["whole", "stepwise"])
def test_the_newest_token_stays_even_where_it_has_the_lowest_score(prefill):
    rows = [[1.0], [0.9, 0.1], [0.5, 0.49, 0.01]]
    for chunks in ([3], [1, 1, 1], [2, 1]):
        layer = fed(A2SF(budget=2, forgetting=1.0, recent=0, prefill=prefill), rows, chunks)
        assert sorted(layer.store.held("positions").flatten().tolist()) == [0, 2]


def test_old_queries_fade_without_a_trace_of_rounding():
    weights = discounts(0.2, 600)
    assert weights[-3:].tolist() == pytest.approx([0.04, 0.2, 1.0], rel=1e-6)
    assert weights.isfinite().all() and weights[0] == 0
    assert discounts(0.0, 3).tolist() == [0.0, 0.0, 1.0]


def test_without_forgetting_it_is_h2o(llama):
    ids, chunks = tokens(2, 50), [30, *[1] * 12, 8]
    ours, _ = in_chunks(llama, A2SF(budget=12, forgetting=1.0, recent=5), ids, chunks)
    theirs, _ = in_chunks(llama, H2O(budget=12, recent=5), ids, chunks)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# Step by step in one pass


def naive_mask(logits: Tensor, budget: int, forgetting: float, recent: int, streaming: int) -> Tensor:
    """What each query sees, by dictionaries and one head at a time."""
    batch, kv_heads, _, queries, keys = logits.shape
    mask = torch.zeros(batch, kv_heads, queries, keys, dtype=torch.bool)
    for row in range(batch):
        for head in range(kv_heads):
            scores: dict[int, float] = {}
            for query in range(queries):
                scores[query] = 0.0
                kept = sorted(scores)
                mask[row, head, query, kept] = True
                weights = logits[row, head, :, query, kept].double().softmax(-1).sum(0)
                scores = {key: forgetting * scores[key] + weights[i].item() for i, key in enumerate(kept)}
                if len(kept) > budget:
                    free = [key for key in kept if streaming <= key <= query - max(recent, 1)]
                    del scores[min(free, key=lambda key: scores[key])]
    return mask


@pytest.mark.parametrize(
    ("budget", "forgetting", "recent", "streaming"),
    [(6, 1.0, 0, 0), (6, 0.5, 0, 0), (5, 0.9, 3, 1), (7, 0.2, 0, 3), (6, 0.0, 1, 0), (100, 0.5, 4, 0), (1, 0.5, 0, 0)],
)
def test_the_simulation_is_what_a_plain_loop_does(budget, forgetting, recent, streaming):
    logits = 2 * torch.randn(2, 2, 3, 30, 30, generator=torch.Generator().manual_seed(budget))
    options = dict(budget=budget, forgetting=forgetting, recent=recent, streaming=streaming)
    mask = simulate(logits, **options)
    assert torch.equal(mask, naive_mask(logits, **options))
    assert torch.equal(mask.sum(-1), torch.arange(1, 31).clamp(max=budget + 1).expand(2, 2, -1))


STEPWISE = A2SF(budget=9, forgetting=0.6, recent=2, streaming=1, prefill="stepwise")
LONG = 142  # more than a tile of queries beyond the budget


def test_the_policy_sees_what_the_simulation_says(llama):
    ids = tokens(2, LONG)

    def attention(module, query, key, value, visible, scale):
        mask = simulate(grouped_logits(query, key, scale), budget=9, forgetting=0.6, recent=2, streaming=1)
        return attend(query, key, value, mask=mask.repeat_interleave(2, 1), scale=scale)

    with attach(llama, attention):
        expected = llama(ids, use_cache=False).logits
    torch.testing.assert_close(in_chunks(llama, STEPWISE, ids, [LONG])[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_one_pass_is_decoding_token_by_token(request, name):
    model, ids = request.getfixturevalue(name), tokens(2, LONG)
    real = (torch.arange(LONG) >= torch.tensor([[0], [12]])).long()
    one_by_one, slow = in_chunks(model, STEPWISE, ids, [1] * LONG, real)
    for chunks in ([LONG], [5, 1, 120, 16], [9, 1, LONG - 10]):
        at_once, fast = in_chunks(model, STEPWISE, ids, chunks, real)
        torch.testing.assert_close(at_once[real.bool()], one_by_one[real.bool()], rtol=1e-4, atol=1e-4)
        for layers in zip(slow.layers, fast.layers, strict=True):
            stores = [layer.store for layer in layers]
            places = [store.held("positions").sort(-1) for store in stores]
            assert torch.equal(places[0].values, places[1].values)
            scores = [s.held("scores").gather(-1, p.indices) for s, p in zip(stores, places, strict=True)]
            torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


def test_first_tokens_are_those_after_the_padding(llama):
    real = (torch.arange(40) >= torch.tensor([[0], [7]])).long()
    for prefill, chunks in (("whole", [30, *[1] * 10]), ("stepwise", [40])):
        policy = A2SF(budget=6, forgetting=0.1, recent=1, streaming=3, prefill=prefill)
        _, cache = in_chunks(llama, policy, tokens(2, 40), chunks, real)
        for layer in cache.layers:
            held = layer.store.held("positions").sort(-1).values
            assert (held[0, :, :3] == torch.arange(3)).all()
            assert (held[1, :, :3] == 7 + torch.arange(3)).all()


# Masks


def test_the_ideal_mask_has_the_highest_of_every_row():
    logits = torch.tensor([row + [0.0] * (4 - len(row)) for row in ROWS]).log()[None, None, None]
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert ideal_mask(logits, 2)[0, 0].int().tolist() == expected
    assert torch.equal(ideal_mask(logits, 9)[0, 0], torch.ones(4, 4, dtype=torch.bool).tril())


def test_the_similarity_is_the_share_in_common():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)[None, None]
    other = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)[None, None]
    assert mask_similarity(mask, mask).item() == pytest.approx(1.0)
    assert mask_similarity(mask, other).item() == pytest.approx(0.5)


def test_the_age_counts_back_from_the_query():
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)[None, None]
    assert mean_age(mask) == pytest.approx((2 + 0 + 2 + 0) / 4)


def test_part_of_a_sequence_is_refused():
    with pytest.raises(ValueError, match="logits must be those of a whole sequence, got 2 queries and 5 keys"):
        simulate(torch.zeros(1, 1, 1, 2, 5), budget=2, forgetting=0.5)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be at least 1 token, got 0"),
        ({"forgetting": 1.1}, "forgetting must be from 0 .* got 1.1"),
        ({"forgetting": math.nan}, "forgetting must be from 0"),
        ({"budget": 8, "recent": 9}, "recent must be from 0 to the budget of 8 tokens, got 9"),
        ({"budget": 8, "recent": 3, "streaming": 6}, "streaming must be from 0 to the 5 tokens that are not recent"),
        ({"budget": 8, "recent": 0, "streaming": 8}, "streaming must be from 0 to the 7 tokens"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        A2SF(**options)


def test_a_share_is_rounded_to_tokens():
    assert A2SF.of_share(1000, 0.2, forgetting=0.5) == A2SF(budget=200, forgetting=0.5, recent=0)
    assert A2SF.of_share(3, 0.1).budget == 1 and A2SF.of_share(5, 0.5).budget == 3 and A2SF.of_share(7, 1.0).budget == 7
    for wrong in ((0.0, "share must be above 0"), (1.2, "at most 1, got 1.2")):
        with pytest.raises(ValueError, match=wrong[1]):
            A2SF.of_share(100, wrong[0])
    with pytest.raises(ValueError, match="prompt must be at least 1 token, got 0"):
        A2SF.of_share(0, 0.5)


def test_published_settings_have_names():
    assert A2SF.published("original", 1000) == A2SF(budget=200, forgetting=0.2, recent=0)
    assert A2SF.published("repository", 1000) == A2SF()
    with pytest.raises(ValueError, match="name must be one of original, repository, got 'paper'"):
        A2SF.published("paper", 1000)


def test_a_smaller_budget_leaves_room_for_the_newest():
    policy = A2SF(budget=64, recent=16, streaming=8)
    assert policy.with_budget(20, 100) == A2SF(budget=20, recent=16, streaming=4)
    assert policy.with_budget(5, 100) == A2SF(budget=5, recent=5, streaming=0)
    assert A2SF(budget=64, recent=0, streaming=8).with_budget(3, 100) == A2SF(budget=3, recent=0, streaming=2)


def test_a_share_of_the_prompt_holds_its_promise(llama):
    policy = A2SF.of_share(60, 0.2)
    _, cache = in_chunks(llama, policy, tokens(2, 70), [60, *[1] * 10])
    assert cache.bytes_held == policy.promised_bytes(llama.config, 2, 70) == 2 * 3 * 12 * 2 * 8 * 4 * 2


# The search


def test_the_search_gives_every_factor_its_loss(llama):
    text = tokens(3, 40)
    losses = sweep(llama, text, A2SF(budget=8, recent=0), (0.3, 0.9))
    assert list(losses) == [0.3, 0.9] and len(set(losses.values())) == 2
    logits, _ = in_chunks(llama, A2SF(budget=8, recent=0, forgetting=0.3), text, [1] * 40)
    target = text[:, -20:]
    expected = torch.nn.functional.cross_entropy(logits[:, 19:-1].mT, target)
    assert losses[0.3] == pytest.approx(expected.item(), rel=1e-4)
    whole = losses_under(llama, A2SF().unlimited(), text)
    assert whole.shape == (3, 20)


def test_of_equal_losses_the_longest_memory_is_chosen():
    assert best_factor({0.2: 2.5, 0.5: 2.4, 0.9: 2.4}) == 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 200, "budget": 128}, "length must be at least twice the budget of 128 tokens, got 200"),
        ({"passages": 0}, "passages must be at least 1, got 0"),
        ({"factors": ()}, "factors must name at least one"),
        ({"factors": (0.5, 2.0)}, "forgetting must be from 0"),
    ],
)
def test_wrong_searches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Train(**options)


def test_the_job_writes_a_policy_that_loads(llama, tmp_path, monkeypatch):
    from regard.paper import Run
    from regard.papers.a2sf import jobs

    monkeypatch.setattr(jobs, "load", lambda name, device: type("Loaded", (), {"model": llama, "tokenizer": None}))
    monkeypatch.setattr(jobs, "Haystack", lambda tokenizer, text: None)
    monkeypatch.setattr(jobs, "draw_passages", lambda haystack, number, length, seed, split: tokens(number, length))
    job = Train(budget=8, length=32, passages=2, factors=(0.3, 0.9), streaming=1)
    folder = job.run(Run(seed=0, workdir=tmp_path))
    losses = json.loads((folder / "losses.json").read_text())
    assert A2SF.load(folder) == A2SF(
        budget=8, recent=0, streaming=1, forgetting=best_factor({float(a): loss for a, loss in losses.items()})
    )


# Claims


def measured(**changes: float) -> list[dict[str, float]]:
    values = {"similarity_a2s_0.2": 0.5, "ppl_h2o_0.2": 13.0}
    values |= {f"similarity_a2sf_{factor}_0.2": 0.54 for factor in FACTORS} | {"similarity_a2sf_0.5_0.2": 0.6}
    values |= {f"ppl_{name}_{share}": ppl for share in SHARES for name, ppl in (("best", 12.0), ("a2s", 50.0))}
    return [values, {**values, **changes}]


def test_forgetting_wins_by_its_rule():
    assert forgetting_wins(measured())
    assert not forgetting_wins(measured(**{"similarity_a2sf_0.5_0.2": 0.48}))
    assert not forgetting_wins(measured(**{"ppl_best_0.3": 90.0}))
    assert forgetting_wins(measured(**{"ppl_h2o_0.2": 10.0}))
    assert no_half_is_needed(measured()) and not no_half_is_needed(measured(**{"ppl_h2o_0.2": 10.0}))


def test_fairness_is_judged_by_its_rule():
    names = ("a2sf_0.2", "a2sf_0.5", "a2sf_0.9", "a2s")
    fair = {
        f"age_{name}_{share}": age
        for share in SHARES
        for name, age in zip(names, (50.0, 60.0, 70.0, 200.0), strict=True)
    }
    assert plain_sum_keeps_the_old([fair, fair]) and age_follows_the_factor([fair, fair])
    unordered = [{**fair, "age_a2sf_0.2_0.1": 71.0}]
    assert plain_sum_keeps_the_old(unordered) and not age_follows_the_factor(unordered)
    barely = [{**fair, "age_a2s_0.3": 76.0}]
    assert not plain_sum_keeps_the_old(barely) and age_follows_the_factor(barely)
