"""Recycled attention: the index form equals append-and-drop, rows decide for themselves, and tokens come back."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.masking_utils import causal_mask_function
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from regard.llm import Full, SnapKV, Streaming, attach, load, use
from regard.llm.policies.full import forked
from regard.llm.visible import Visible
from regard.paper import Run
from regard.papers.recycled_attention import PUBLISHED, Chains, ContinuedTraining, RecycledAttention, claim
from regard.papers.recycled_attention.cache_policy import (
    Choice,
    RecycledLayer,
    frequencies,
    highest,
    mean_query,
    pooled_scores,
    turned_back,
)
from regard.papers.recycled_attention.chains import ASK, COMMA, SYMBOLS, ChainTraining, learn_chains
from regard.papers.recycled_attention.jobs import Train
from regard.papers.recycled_attention.training import Trainer, recycled_loss, recycling, train_on

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
HEADS, KV_HEADS, DIM = 4, 2, 8


def new_llama(seed: int = 0, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options})).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return new_llama()


def tokens(rows: int, number: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 61, (rows, number), generator=torch.Generator().manual_seed(seed))


def fed(model, policy, ids: Tensor, chunks: list[int], mask: Tensor | None = None, cache=None) -> tuple[Tensor, object]:
    """The logits of all tokens, fed in chunks of these lengths, and the cache."""
    cache = cache or policy.cache(model)
    logits = []
    with use(model, policy):
        for chunk in ids.split(chunks, dim=1):
            seen = cache.get_seq_length() + chunk.shape[1]
            out = model(chunk, past_key_values=cache, attention_mask=None if mask is None else mask[:, :seen])
            logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


def heads(batch: int, number: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one layer, with clear preferences."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (torch.randn(batch, size, number, DIM, generator=generator) for size in sizes)
    return 2 * q, k, v


def steps_of_a_layer(policy: RecycledAttention, q: Tensor, k: Tensor, v: Tensor, prompt: int) -> tuple[Tensor, list]:
    """What one layer gives for every token after the prompt, and how many steps each row's choice is old after it."""
    layer = RecycledLayer(policy)
    outs, ages = [], []
    for start, stop in [(0, prompt), *((n, n + 1) for n in range(prompt, q.shape[2]))]:
        visible = Visible(causal_mask_function, start, stop - start, None, "cpu")
        layer.update(k[:, :, start:stop], v[:, :, start:stop])
        outs.append(layer.step(torch.nn.Identity(), q[:, :, start:stop], visible, DIM**-0.5))
        ages.append(None if layer.choice is None else layer.choice.since.tolist())
    return torch.cat(outs[1:], dim=2), ages


def append_and_drop(policy: RecycledAttention, q: Tensor, k: Tensor, v: Tensor, prompt: int) -> tuple[Tensor, list]:
    """The same for one row, as the paper tells it: a small cache to which tokens are appended and from which they drop.

    Every KV head's is a list of positions, the lowest score first.
    """
    groups, size = HEADS // KV_HEADS, q.shape[2]

    def weights(head: int, at: int, positions: list[int]) -> Tensor:
        scores = torch.stack([q[0, head, at] @ k[0, head // groups, p] for p in positions]) * DIM**-0.5
        return scores.softmax(0)

    def chosen(at: int) -> list[list[int]]:
        lists = []
        for kv in range(KV_HEADS):
            rows = torch.stack([weights(kv * groups + g, at, list(range(at + 1))) for g in range(groups)])
            row = {"max": rows.max(0).values, "mean": rows.mean(0), "first": rows[0]}[policy.group].tolist()
            reach = policy.kernel // 2
            pooled = [max(row[max(p - reach, 0) : p + reach + 1]) for p in range(at + 1)]
            lists.append(sorted(range(at + 1), key=lambda p: (pooled[p], p))[-policy.budget :])
        return lists

    small, since, outs, ages = chosen(prompt - 1), 0, [], []
    last = q[0, :, prompt - 1].mean(0)
    for at in range(prompt, size):
        now = q[0, :, at].mean(0)
        if policy.check_every is None:
            due = since + 1 == policy.stride
        else:
            due = (since + 1) % policy.check_every == 0 and cosine_similarity(now, last, 0) < policy.similarity
        full = due or since == policy.budget or at + 1 <= policy.budget
        read = [list(range(at + 1)) if full else [*of_head, at] for of_head in small]
        out = [weights(h, at, read[h // groups]) @ v[0, h // groups, read[h // groups]] for h in range(HEADS)]
        outs.append(torch.stack(out))
        if full:
            small, since, last = chosen(at), 0, now
        else:
            small, since = [[*of_head[1:], at] for of_head in small], since + 1
        ages.append(since)
    return torch.stack(outs, dim=1)[None], ages


# The mechanism


def test_new_tokens_replace_the_lowest_of_the_chosen_ones():
    choice = Choice(torch.tensor([[[5, 2, 9]], [[4, 7, 1]]]), torch.tensor([0, 2]), torch.zeros(2, DIM))
    assert choice.positions(12).tolist() == [[[5, 2, 9, 12]], [[10, 11, 1, 12]]]


def test_positions_come_by_ascending_score_the_later_of_equals_higher():
    scores = torch.tensor([[[0.3, 0.1, 0.3, 0.2, 0.1]]])
    assert highest(scores, None, 3).tolist() == [[[3, 0, 2]]]
    assert highest(scores, None, 5).tolist() == [[[1, 4, 3, 0, 2]]]
    row = torch.tensor([False, True, False, True, False])[None, None, None]
    assert highest(scores, row, 3).tolist() == [[[-1, 1, 3]]]


def test_neighbours_of_a_peak_come_with_it():
    q = torch.full((1, 2, 1, 1), 1.0)
    q[:, 1] = -1.0
    k = torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0, 0.0, -9.0])[None, None, :, None]
    pooled = pooled_scores(q, k, None, 1.0, 3, "max")
    assert (pooled > 0.9).tolist() == [[[False, False, True, True, True, True, True]]]
    first = pooled_scores(q, k, None, 1.0, 3, "first")
    assert (first > 0.9).tolist() == [[[False, False, True, True, True, False, False]]]
    assert (pooled_scores(q, k, None, 1.0, 1, "mean") - 0.5).abs().sort().values[..., :2].max() < 1e-2


@pytest.mark.parametrize(
    "options",
    [
        dict(stride=4),
        dict(stride=4, kernel=1, group="mean"),
        dict(stride=3, kernel=7, group="first"),
        dict(stride=50),  # the budget runs out first
        dict(check_every=2, similarity=0.3),
        dict(check_every=3, similarity=0.99),
        dict(check_every=1, similarity=-1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", [3, 17])
def test_the_index_form_is_append_and_drop(options, prompt):
    policy = RecycledAttention(**{"budget": 5, "kernel": 3, **options})
    q, k, v = heads(1, 34)
    out, ages = steps_of_a_layer(policy, q, k, v, prompt)
    expected, expected_ages = append_and_drop(policy, q, k, v, prompt)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert [age[0] for age in ages[1:] if age is not None] == expected_ages[-sum(age is not None for age in ages[1:]) :]


def test_rows_out_of_phase_are_as_alone():
    policy = RecycledAttention(budget=5, kernel=3, check_every=2, similarity=0.3)
    q, k, v = heads(4, 40, seed=1)
    out, ages = steps_of_a_layer(policy, q, k, v, 12)
    assert any(len(set(age)) > 1 for age in ages), "some rows are in a full step while others are not"
    for row in range(4):
        one = slice(row, row + 1)
        alone, _ = append_and_drop(policy, q[one], k[one], v[one], 12)
        torch.testing.assert_close(out[one], alone, rtol=1e-5, atol=1e-5)


def test_a_full_step_every_time_is_full_attention(llama):
    ids = tokens(2, 24)
    out, _ = fed(llama, RecycledAttention(budget=3, stride=1), ids, [10, *[1] * 14])
    torch.testing.assert_close(out, llama(ids).logits, rtol=1e-4, atol=1e-4)


def test_padded_rows_and_rows_out_of_phase_are_as_alone(llama):
    policy = RecycledAttention(budget=6, check_every=2, similarity=0.6, kernel=3)
    ids, chunks = tokens(2, 40), [9, *[1] * 31]
    mask = (torch.arange(40) >= torch.tensor([0, 5])[:, None]).long()
    both, _ = fed(llama, policy, ids, chunks, mask)
    torch.testing.assert_close(both[:1], fed(llama, policy, ids[:1], chunks)[0], rtol=1e-4, atol=1e-4)
    alone, _ = fed(llama, policy, ids[1:, 5:], [4, *chunks[1:]])
    torch.testing.assert_close(both[1:, 5:], alone, rtol=1e-4, atol=1e-4)


def test_a_sliding_window_hides_what_was_chosen_in_it():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval().requires_grad_(False)
    ids = tokens(1, 30)
    changed = ids.clone()
    changed[:, :4] = tokens(1, 4, seed=9)
    policy, chunks = RecycledAttention(budget=6, stride=40, kernel=1), [12, *[1] * 18]
    one, other = (fed(model, policy, each, chunks)[0] for each in (ids, changed))
    # two layers of a window of 8 reach 14 tokens back
    torch.testing.assert_close(one[:, 18:], other[:, 18:])
    assert not torch.allclose(one[:, :12], other[:, :12])


def test_chunks_of_more_than_a_token_do_not_matter(llama):
    policy, ids = RecycledAttention(budget=6, stride=4), tokens(2, 26)
    whole, _ = fed(llama, policy, ids, [20, *[1] * 6])
    for chunks in ([2, 7, 11], [18, 2], [1, 1, 5, 13]):
        pieces, _ = fed(llama, policy, ids, [*chunks, *[1] * 6])
        torch.testing.assert_close(pieces[:, 20:], whole[:, 20:], rtol=1e-4, atol=1e-4)
    single, _ = fed(llama, policy, ids, [19, 1, *[1] * 6])
    assert (single - whole)[:, 20:].abs().max() > 1e-3


def test_a_later_turn_chooses_anew(llama):
    policy, ids = RecycledAttention(budget=6, stride=100), tokens(1, 34)
    _, cache = fed(llama, policy, ids[:, :23], [20, 1, 1, 1])
    assert all(layer.choice.since.tolist() == [3] for layer in cache.layers)
    fed(llama, policy, ids[:, 23:33], [10], cache=cache)
    assert all(layer.choice.since.tolist() == [0] for layer in cache.layers)
    last = cache.layers[0].choice.small
    _, whole = fed(llama, policy, ids[:, :33], [33])
    assert torch.equal(last, whole.layers[0].choice.small), "keys of the first layer do not depend on what was read"


# Queries before their rotation


def test_turned_back_queries_have_the_cosine_of_unrotated_ones():
    config = LlamaConfig(**SIZES)
    raw = torch.randn(2, HEADS, 12, DIM, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaRotaryEmbedding(config)(raw, torch.arange(12)[None] + 5)
    q, _ = apply_rotary_pos_emb(raw, raw, cos, sin)
    steps = torch.tensor([4, 7])
    then = torch.stack([mean_query(q[row : row + 1, :, : 12 - n])[0] for row, n in enumerate(steps)])
    ours = cosine_similarity(turned_back(mean_query(q), steps, frequencies(config)), then, dim=-1)
    wanted = [cosine_similarity(raw[row, :, -1].mean(0), raw[row, :, 11 - n].mean(0), 0) for row, n in enumerate(steps)]
    torch.testing.assert_close(ours, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    assert (cosine_similarity(mean_query(q), then, dim=-1) - ours).abs().min() > 1e-3


def test_other_rotations_are_refused(llama):
    policy = RecycledAttention(budget=6, check_every=2, rotated=False)
    assert policy.cache(llama).layers[0].frequencies is not None
    with pytest.raises(ValueError, match=r"rotated=False needs .* got 'gpt2' with rotation None"):
        policy.check(GPT2Config())
    scaled = LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="got 'llama' with rotation 'linear'"):
        policy.check(scaled)
    RecycledAttention(rotated=False).check(GPT2Config())  # a fixed schedule compares nothing


# Forks and tokens taken back


def test_a_smaller_budget_goes_on_from_a_larger_ones_choice(llama):
    ids = tokens(2, 30)
    small, large = RecycledAttention(budget=4, stride=3), RecycledAttention(budget=9, stride=5)
    _, read = fed(llama, large, ids[:, :20], [20])
    expected, _ = fed(llama, small, ids, [20, *[1] * 10])
    continued, _ = fed(llama, small, ids[:, 20:], [1] * 10, cache=forked(read, small, llama))
    torch.testing.assert_close(continued, expected[:, 20:], rtol=1e-4, atol=1e-4)
    assert read.get_seq_length() == 20


def test_a_fork_without_a_choice_begins_with_a_full_step(llama):
    ids = tokens(1, 21)
    policy = RecycledAttention(budget=4, stride=9)
    for reader in (Full(), RecycledAttention(budget=3), RecycledAttention(budget=9, kernel=1)):
        _, read = fed(llama, reader, ids[:, :20], [20])
        out, _ = fed(llama, policy, ids[:, 20:], [1], cache=forked(read, policy, llama))
        torch.testing.assert_close(out, llama(ids).logits[:, -1:], rtol=1e-4, atol=1e-4)


def test_after_tokens_were_taken_back_a_step_is_full(llama):
    ids = tokens(1, 20)
    policy = RecycledAttention(budget=4, stride=9)
    _, cache = fed(llama, policy, ids, [20])
    cache.crop(-2)
    again, _ = fed(llama, policy, ids[:, 18:], [1, 1], cache=cache)
    torch.testing.assert_close(again[:, :1], llama(ids).logits[:, 18:19], rtol=1e-4, atol=1e-4)
    assert all(layer.choice.since.tolist() == [1] for layer in cache.layers)


def test_candidates_of_a_prompt_lookup_are_taken_back(llama):
    ids = tokens(1, 5).repeat(1, 3)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with use(llama, RecycledAttention(budget=4, stride=1)) as model:
        looked_up = model.generate(ids, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(looked_up, llama.generate(ids, **options))


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(budget=0), "budget must be at least 1 token, got 0"),
        (dict(stride=0), "stride must be at least 1 step, got 0"),
        (dict(check_every=0), "check_every must be at least 1 step, or None for a fixed stride, got 0"),
        (dict(similarity=1.5), "similarity must be a cosine, from -1 to 1, got 1.5"),
        (dict(kernel=4), "kernel must be an odd number of tokens, got 4"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RecycledAttention(**options)


def test_published_settings():
    policy = RecycledAttention.published("llama-3.1-8b-qc10", 16384)
    assert (policy.budget, policy.check_every, policy.similarity) == (2048, 10, 0.85)
    assert RecycledAttention.published("qwen2-7b-qc5", 32768).similarity == 0.95
    assert RecycledAttention.published("recycled-attention", 4).budget == 1
    assert {RecycledAttention.published(name, 8).group for name in PUBLISHED} == {"max"}
    with pytest.raises(ValueError, match=r"name must be one of recycled-attention, .* got 'gpt'"):
        RecycledAttention.published("gpt", 8)
    with pytest.raises(ValueError, match="context must be at least 1 token, got 0"):
        RecycledAttention.published("qwen2-7b-qc5", 0)


def test_a_budget_is_what_partial_steps_read(llama):
    assert RecycledAttention(stride=3).with_budget(100, 800) == RecycledAttention(budget=100, stride=3)
    with pytest.raises(ValueError, match="budget must be at least 1 token, got 0"):
        RecycledAttention().with_budget(0, 800)


# Training

TINY = ContinuedTraining(context=16, local=5, budget=4, kernel=3, steps=6, batch=2, learning_rate=1e-2, warm_up=2)


def test_later_tokens_read_what_the_last_of_the_context_chose(llama):
    ids = tokens(2, 21)

    def masked(module, query, key, value, visible, scale):
        scores = query @ key.repeat_interleave(2, 1).mT * scale
        causal = torch.ones(21, 21, dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
        row = weights[:, :, 15].unflatten(1, (2, 2)).amax(2)
        pooled = torch.stack([row[..., max(p - 1, 0) : p + 2].amax(-1) for p in range(16)], dim=-1)
        best = pooled.sort(stable=True).indices[..., -4:]
        allowed = torch.zeros(2, 2, 21, dtype=torch.bool).scatter(2, best, True).repeat_interleave(2, 1)
        mask = causal.expand(2, 4, -1, -1).clone()
        mask[:, :, 16:, :16] = allowed[:, :, None, :16]
        return scores.masked_fill(~mask, -math.inf).softmax(-1) @ value.repeat_interleave(2, 1)

    with attach(llama, masked):
        expected = llama(ids, use_cache=False).logits
    with attach(llama, recycling(replace(TINY, kernel=3))):
        torch.testing.assert_close(llama(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - llama(ids).logits)[:, 16:].abs().max() > 1e-2


def test_a_budget_for_everything_is_the_models_own_loss(llama):
    ids = tokens(2, 22)
    loss = recycled_loss(llama, ids, replace(TINY, budget=99))
    torch.testing.assert_close(loss, llama(ids, labels=ids).loss)
    assert (recycled_loss(llama, ids, TINY) - loss).abs() > 1e-4
    with pytest.raises(ValueError, match="sequences must be longer than context 16, got 16 tokens"):
        recycled_loss(llama, ids[:, :16], TINY)


def test_the_loss_falls_and_interrupted_training_ends_in_the_same_weights(tmp_path):
    text = tokens(1, 300)[0]
    whole = new_llama()
    losses = train_on(whole, text, replace(TINY, steps=6), seed=3)
    assert losses[-1] < losses[0] and not any(weight.requires_grad for weight in whole.parameters())

    class Stop(Exception):
        pass

    def three(steps, total):
        for step in steps:
            if step == 3:
                raise Stop
            yield step

    path = tmp_path / "training.pt"
    with pytest.raises(Stop):
        train_on(new_llama(), text, TINY, seed=3, checkpoint=path, checkpoint_every=2, progress=three)
    resumed = new_llama()
    assert train_on(resumed, text, TINY, seed=3, checkpoint=path) == losses[2:]
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"was trained with budget 4, got 5; begin in another folder"):
        train_on(new_llama(), text, replace(TINY, budget=5), checkpoint=path)
    with pytest.raises(ValueError, match="is of another model than LlamaForCausalLM here"):
        train_on(new_llama(hidden_size=16, head_dim=8), text, TINY, checkpoint=path)
    path.write_text("no checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint of this training"):
        Trainer(new_llama(), TINY).restore(path)


def test_the_published_recipe():
    recipe = ContinuedTraining()
    assert (recipe.context, recipe.local, recipe.budget) == (8092, 50, 2048)
    assert recipe.steps * recipe.batch == 120_000 and recipe.learning_rate == 5e-6
    assert [recipe.share(step) for step in (0, 19, 20)] == [0.05, 1.0, 1.0]
    assert 0 < recipe.share(1874) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(budget=0), "budget must be at least 1, got 0"),
        (dict(kernel=2), "kernel must be an odd number of tokens, got 2"),
        (dict(learning_rate=0.0), "learning_rate must be above 0, got 0.0"),
        (dict(steps=20), "warm_up must be from 0 to 19, below steps, got 20"),
    ],
)
def test_bad_training_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ContinuedTraining(**options)


def test_the_job_writes_a_model_that_loads(tmp_path, tokenizer):
    folder, text = tmp_path / "mine", tmp_path / "text.txt"
    new_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text.write_text("Rivers run to the sea. " * 20)
    job = Train(model=str(folder), text=text, training=replace(TINY, steps=3))
    made = job.run(Run(seed=0, workdir=tmp_path / "run"))
    before, after = load(folder), load(made)
    ids = tokens(1, 12)
    assert not torch.allclose(before.model(ids).logits, after.model(ids).logits, atol=1e-3)
    with use(after.model, RecycledAttention(budget=4)) as model:
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
    weights = Path(made, "model.safetensors").read_bytes()
    assert Path(job.run(Run(seed=0, workdir=tmp_path / "run")), "model.safetensors").read_bytes() == weights


# Chains and claims


def test_a_chain_walks_through_its_list():
    chains = Chains(keys=12, links=5)
    drawn = chains.draw(20, torch.Generator().manual_seed(0))
    assert drawn.shape == (20, 3 * 12 + 2 + 3 * 5 - 1)
    for row in drawn.tolist():
        keys = {row[at]: row[at + 1] for at in range(0, 36, 3)}
        assert len(keys) == len(set(keys.values())) == 12 and set(row[2:36:3]) == {COMMA} and row[36] == ASK
        symbol, said = row[37], []
        for _ in range(5):
            said += [symbol, keys[symbol], COMMA]
            symbol = keys[symbol]
        assert row[37:] == said
        assert [row[at] for at in chains.looked_up] == said[1::3]
    assert not torch.equal(drawn[0], drawn[1])
    with pytest.raises(ValueError, match=f"keys must be from 2 to {SYMBOLS}, got 33"):
        Chains(keys=33)
    with pytest.raises(ValueError, match="links must be from 1 to the 4 keys, got 5"):
        Chains(keys=4, links=5)


def test_the_little_model_learns_and_is_scored(monkeypatch):
    short = ChainTraining(stages=((4, 2, 8),), most_steps=20, learning_rate=3e-3)
    before = torch.get_rng_state()
    model = learn_chains(0, short)
    assert torch.equal(torch.get_rng_state(), before)
    chains = Chains(keys=4, links=2)
    monkeypatch.setattr(claim, "CHAINS", chains)
    rows = chains.draw(64, torch.Generator().manual_seed(1))
    shares = claim.said_right(model, Full(), rows)
    direct = (model(rows).logits.argmax(-1)[:, :-1] == rows[:, 1:]).float().mean(0)[chains.looked_up - 1]
    torch.testing.assert_close(shares, direct)
    commas = chains.prompt + 3 * torch.arange(2)[:-1] + 1
    assert (model(rows).logits.argmax(-1)[:, commas - 1] == COMMA).all(), "the easiest third is learnt at once"


def test_systems_that_share_a_reading_are_as_if_they_had_read_alone(llama, monkeypatch):
    monkeypatch.setattr(claim, "BUDGETS", (5, 9))
    monkeypatch.setattr(claim, "WINDOW", 4)
    ids = tokens(2, 40)
    policies = {
        "full": Full(),
        "snapkv": SnapKV(budget=9, window=4),
        "ours": RecycledAttention(budget=5, stride=3),
        "streaming": Streaming(sinks=2, recent=4),
    }
    seen = {}
    for name, policy, cache in claim.after_reading(llama, ids[:, :30], policies):
        seen[name] = fed(llama, policy, ids[:, 30:], [1] * 10, cache=cache)[0]
    for name in ("full", "snapkv", "ours"):
        alone, _ = fed(llama, policies[name], ids, [30, *[1] * 10])
        torch.testing.assert_close(seen[name], alone[:, 30:], rtol=1e-4, atol=1e-4)
    assert seen["streaming"].shape == seen["full"].shape and not torch.allclose(seen["streaming"], seen["full"])


def test_without_refresh_only_recent_tokens_are_left(llama):
    policy = claim.NeverAgain(budget=4)
    _, cache = fed(llama, policy, tokens(1, 30), [20, *[1] * 10])
    layer = cache.layers[0]
    assert layer.choice.since.tolist() == [10]
    assert layer.choice.positions(30)[0, 0].tolist() == [26, 27, 28, 29, 30]


def test_the_share_of_heads_that_read_a_token(llama):
    policy = RecycledAttention(budget=5, stride=2)
    shares = claim.reading(llama, policy, tokens(1, 20), tokens(1, 3)[0])
    assert shares.shape == (3, 20)
    assert shares[0].sum().item() == pytest.approx(5) and shares[1].sum().item() == pytest.approx(4)


def test_the_rules_can_fail():
    good = {"full_nll": 0.3}
    for budget in claim.BUDGETS:
        good |= {f"snapkv_{budget}_nll": 4.0, f"ours_{budget}_nll": 0.6}
    assert claim.refreshed_reads_what_is_lost([good] * 3)
    assert not claim.refreshed_reads_what_is_lost([good | {"ours_64_nll": 3.1}])
    assert not claim.refreshed_reads_what_is_lost([good | {"ours_128_nll": 1.1}])

    later = {"ours_later_nll": 2.7, "snapkv_later_nll": 2.8, "never_later_nll": 2.8}
    assert claim.refreshed_keeps_up([later])
    assert not claim.refreshed_keeps_up([later | {"snapkv_later_nll": 2.6}])
    assert not claim.refreshed_keeps_up([later | {"never_later_nll": 2.6}])

    chains = {f"full_{place}": 1.0 for place in range(1, 9)} | {"ours_from_third": 0.5, "snapkv_from_third": 0.3}
    assert claim.refreshed_follows_chains([chains])
    assert not claim.refreshed_follows_chains([chains | {"ours_from_third": 0.3}])
    assert not claim.refreshed_follows_chains([chains | {"full_8": 0.5}])
