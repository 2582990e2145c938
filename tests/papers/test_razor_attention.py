"""RazorAttention: heads found in repeated random tokens, and caches whose mean stands for what they dropped."""

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicCache

from regard.attention.attend import attend
from regard.llm import Full, attach, use
from regard.llm.heads import capture
from regard.llm.visible import Visible
from regard.paper import Run
from regard.papers.razor_attention import (
    Heads,
    Probe,
    RazorAttention,
    Scores,
    alibi_slopes,
    choose,
    find,
    find_heads,
    head_scores,
    load_heads,
    released_windows,
    save_heads,
    vision_scope,
)
from regard.papers.razor_attention.cache_policy import Dropped
from regard.papers.razor_attention.claim import choices, compensation_helps, found_heads_retrieve
from regard.papers.razor_attention.jobs import Train
from regard.papers.razor_attention.search import looks_back

VOCABULARY, LAYERS, HEADS = 61, 2, 3
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=6,
    num_key_value_heads=HEADS,
    head_dim=8,
    initializer_range=0.2,
    max_position_embeddings=512,
    bos_token_id=0,
)
MIXED = torch.tensor([[True, False, True], [False, False, False]])
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=14)).eval().requires_grad_(False)


def tokens(rows: int, number: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, number), generator=torch.Generator().manual_seed(seed))


def policy(**options) -> RazorAttention:
    options = {"recent": 6, "compression": 4.0, "sinks": 2, "trim_every": 3} | options
    return RazorAttention.of_heads(MIXED, **options)


def in_chunks(model, policy, ids, chunks, attention_mask=None):
    logits, cache = [], policy.cache(model)
    with use(model, policy):
        for chunk in ids.split(chunks, dim=1):
            seen = cache.get_seq_length() + chunk.shape[1]
            mask = None if attention_mask is None else attention_mask[:, :seen]
            logits.append(model(chunk, past_key_values=cache, attention_mask=mask).logits)
    return torch.cat(logits, dim=1), cache


# Heads and their files


def test_heads_survive_their_file(tmp_path):
    heads = Heads(((2, 1), (0, 0)), (3, 2), {"seed": 4, "name": "mine"})
    assert load_heads(save_heads(heads, tmp_path / "new" / "heads.json")) == heads
    assert find_heads(tmp_path / "new") == find_heads(tmp_path / "new" / "heads.json") == heads
    assert heads.mask(3, 2).tolist() == [[True, False], [False, False], [False, True]]
    assert set(Heads.of_mask(heads.mask(3, 2)).protected) == set(heads.protected)


def test_files_are_the_released_tools(tmp_path):
    torch.save({"prefix_matching": {3: [1, 0], 5: [2]}, "copying": {5: [2], 7: [1]}}, tmp_path / "heads.pt")
    (tmp_path / "heads.json").write_text(json.dumps({"3": [1, 0], "5": [2]}))
    assert load_heads(tmp_path / "heads.pt") == Heads(((5, 2), (7, 1), (3, 1), (3, 0)))
    there = RazorAttention.from_official(tmp_path / "heads.json", recent=9)
    assert there == RazorAttention(Heads(((3, 1), (3, 0), (5, 2))), recent=9)
    with pytest.raises(ValueError, match="a budget needs to know how many heads there are"):
        there.with_budget(10, 100)
    with pytest.raises(ValueError, match="heads need the shape of their model"):
        there.save(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must map layers to KV heads, got a list"),
        ("{", "is not a file of heads"),
        ('{"3": 1}', "must map layers to lists of KV heads"),
        ('{"layers": 2, "heads": []}', "'kv_heads' is missing"),
        ('{"layers": 2, "kv_heads": 2, "heads": [[1, 2]]}', "heads must be in 2 layers x 2 KV heads, got layer 1"),
        ('{"layers": 2, "kv_heads": 2, "heads": [[1, 1], [1, 1]]}', "must name every head once"),
        (b"\xff\xfe", "is not a file of heads"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    file = tmp_path / "heads.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as raised:
        load_heads(file)
    assert message.startswith("heads") or str(file) in str(raised.value)


def test_a_torch_file_of_something_else_is_refused(tmp_path):
    torch.save({"prefix_matching": {}}, tmp_path / "heads.pt")
    with pytest.raises(ValueError, match="must hold the maps 'prefix_matching' and 'copying'"):
        load_heads(tmp_path / "heads.pt")


def test_heads_that_ship_fit_the_model_that_ships(llama):
    heads = RazorAttention().heads
    assert heads.shape == (30, 3) and len(heads.protected) == 14
    with pytest.raises(FileNotFoundError, match=r"or one of smollm2-135m-instruct, got 'smol'"):
        find_heads("smol")
    with pytest.raises(ValueError, match="of 30 layers x 3 KV heads, this one has 2 x 3"), use(llama, RazorAttention()):
        pass


# The search


def test_the_probe_repeats_different_tokens_behind_the_start():
    probe = Probe(block=20, repeats=3, first_id=10, last_id=40).tokens(VOCABULARY, seed=1, start=5)
    assert probe[0] == 5 and len(probe) == 61
    blocks = probe[1:].view(3, 20)
    assert (blocks == blocks[0]).all() and len(set(blocks[0].tolist())) == 20
    assert blocks.min() >= 10 and blocks.max() <= 40
    assert len(Probe.published["razor_attention"].tokens(32_000, seed=0)) == 10_001
    with pytest.raises(ValueError, match=r"block must be at most the 31 ids of 15\.\.45, got 32"):
        Probe(block=32).tokens(VOCABULARY, seed=0)
    with pytest.raises(ValueError, match=r"must be a range within 0\.\.60, got 50\.\.61"):
        Probe(block=3, first_id=50, last_id=61).tokens(VOCABULARY, seed=0)


@pytest.mark.parametrize("tile", [7, 16, 1000])
def test_scores_are_their_definition(llama, tile):
    block, repeats = 9, 3
    probe = Probe(block=block, repeats=repeats, tile=tile)
    ids = probe.tokens(VOCABULARY, seed=2, start=0)
    with capture(llama, "weights") as captured, torch.no_grad():
        llama(ids[None])
    scores = head_scores(llama, probe, seed=2)
    for layer, weights in captured.weights.items():
        without_start = weights[0, :, 1:, 1:]
        later = range(block, block * repeats)
        for name, shift in (("echo", 0), ("induction", 1)):
            sums = [sum(without_start[:, i, j + shift] for j in range(i % block, i, block)) for i in later]
            expected = torch.stack(sums).mean(0).view(HEADS, 2).amax(1)
            torch.testing.assert_close(getattr(scores, name)[layer], expected)


def test_a_perfect_head_scores_one():
    block, length = 5, 16
    follows, copies = torch.zeros(2, length, length)
    for query in range(1 + block, length):
        follows[query, query - block + 1] = copies[query, query - 2 * block if query > 2 * block else query - block] = 1
    induction, echo = looks_back(torch.stack([follows, copies])[None], block) / (length - 1 - block)
    assert induction.tolist() == [1, 0] and echo.tolist() == [0, 1]


def test_shares_are_kept_where_scores_tie():
    flat = Scores(torch.ones(5, 4), torch.zeros(5, 4))
    assert choose(flat, induction=0.14, echo=0.0).protected == ((0, 0), (0, 1), (0, 2))
    scores = Scores(torch.arange(20.0).view(5, 4) / 20, torch.arange(20.0).flip(0).view(5, 4) / 10)
    chosen = choose(scores, induction=0.1, echo=0.05)
    assert chosen.protected == ((0, 0), (4, 3), (4, 2)) and chosen.shape == (5, 4)
    with pytest.raises(ValueError, match=r"echo must be a share of the heads from 0 to 1, got 1\.5"):
        choose(scores, echo=1.5)


def test_a_policy_finds_its_heads_and_survives_its_folder(llama, tmp_path):
    found = find(llama, Probe(block=8, repeats=2), seed=1, induction=0.3, echo=0.1)
    assert len(found.protected) == round(6 * 0.3) + round(6 * 0.1) - (len(found.protected) < 3)
    there = RazorAttention(found, recent=9, compression=math.inf, sinks=1, compensation="mean", trim_every=2)
    there.save(tmp_path / "new")
    assert RazorAttention.load(tmp_path / "new") == there


def test_the_job_writes_what_the_policy_reads(llama, tmp_path, monkeypatch):
    loaded = type("Loaded", (), {"model": llama, "name": "tiny"})()
    monkeypatch.setattr("regard.papers.razor_attention.jobs.load", lambda *_, **__: loaded)
    file = Train(model="tiny", probe=Probe(block=8, repeats=2), induction=0.3, echo=0.0).run(Run(1, tmp_path))
    assert find_heads(tmp_path) == load_heads(file)
    assert (
        find_heads(file).protected == find(llama, Probe(block=8, repeats=2), seed=1, induction=0.3, echo=0.0).protected
    )
    assert find_heads(file).settings["model"] == "tiny" and (tmp_path / "figures" / "scores.png").is_file()


# ALiBi


def test_slopes_are_the_published_ones():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]


def test_beyond_its_vision_scope_a_head_sees_nothing():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 4, 16, generator=generator) / 8 for _ in range(2))
    gain, bias, slopes = torch.rand(16, generator=generator), torch.rand(16, generator=generator) / 4, alibi_slopes(2)
    scope = vision_scope(query, key, slopes, gain, bias, epsilon=1e-4)
    form = query.mT @ key
    for head in range(2):
        by_hand = 2 * torch.linalg.svdvals(form[head])[0] * (gain.square().sum() + bias.square().sum()) - math.log(1e-4)
        torch.testing.assert_close(scope[head], by_hand / slopes[head])
    with pytest.raises(ValueError, match="epsilon must be between 0 and 1, got 1"):
        vision_scope(query, key, slopes, gain, epsilon=1.0)


def test_released_windows_follow_the_largest_entry():
    query, key = torch.zeros(2, 1, 3), torch.zeros(2, 1, 3)
    query[:, 0, 0], key[:, 0, 2] = 4.0, torch.tensor([4.0, 1.0])
    windows = released_windows([(query, key), (query / 2, key)], alibi_slopes(2), theta=1e-3, alpha=10.0)
    assert windows.tolist() == [int((10 + math.log(1e-3) + 4) * 16), int((10 + math.log(1e-3) + 2) * 256)]
    with pytest.raises(ValueError, match="theta must be from 1e-5 to 1e-3"):
        released_windows([(query, key)], alibi_slopes(2), theta=0.1)


# The compensation token

KEYS, VALUES = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


def worked(keys: Tensor, values: Tensor, bias: Tensor | None = None) -> float:
    shape = (1, 1, -1, 1)
    query = torch.ones(1, 1, 1, 1)
    return attend(query, keys.view(shape), values.view(shape), bias=bias, scale=1.0).item()


def test_the_worked_example():
    leaves = torch.tensor([[False, True, True, True, False]])
    keys, values = KEYS.view(1, 1, 5, 1), VALUES.view(1, 1, 5, 1)
    dropped = Dropped.none(keys, values)
    dropped.add(keys, values, leaves & (torch.arange(5) < 3), torch.arange(5)[None])  # in two steps
    dropped.add(keys, values, leaves & (torch.arange(5) >= 3), torch.arange(5)[None])
    assert dropped.count.tolist() == [3] and dropped.oldest.tolist() == [1]
    assert dropped.key.item() == pytest.approx(0) and dropped.value.item() == pytest.approx(3)
    kept = ~leaves[0]
    key = torch.cat([dropped.key.flatten(), KEYS[kept]])
    value = torch.cat([dropped.value.flatten(), VALUES[kept]])
    bias = torch.tensor([math.log(3), 0, 0])
    assert worked(KEYS, VALUES) == pytest.approx(1.9461, abs=5e-5)
    assert worked(KEYS[kept], VALUES[kept]) == pytest.approx(1.7297, abs=5e-5)
    assert worked(key, value) == pytest.approx(1.8563, abs=5e-5)
    assert worked(key, value, bias) == pytest.approx(2.0463, abs=5e-5)
    copies = torch.cat([key[:1], key[:1], key]), torch.cat([value[:1], value[:1], value])
    assert worked(*copies) == pytest.approx(worked(key, value, bias))


class Reference:
    """RazorAttention by its definition, over a cache of everything: attention to copies of the mean; of one row."""

    def __init__(self, policy: RazorAttention) -> None:
        self.policy = policy
        self.begin: dict[int, int] = {}

    def __call__(self, module, query, key, value, visible: Visible, scale):
        layer, here = module.layer_idx, self.policy
        begin = self.begin.setdefault(layer, here.sinks)
        seen, new = key.shape[2], query.shape[2]
        out = []
        for head in range(query.shape[1]):
            kept = list(range(seen))
            k, v = key[0, head // 2], value[0, head // 2]
            count = begin - here.sinks
            if not MIXED[layer, head // 2] and count:
                kept = [*range(here.sinks), *range(begin, seen)]
                copies = {"weighted": count, "mean": 1, "none": 0}[here.compensation]
                mean_k, mean_v = k[here.sinks : begin].mean(0), v[here.sinks : begin].mean(0)
                k, v = (torch.cat([mean.expand(copies, -1), x[kept]]) for mean, x in ((mean_k, k), (mean_v, v)))
            scores = query[0, head] @ k.T * scale
            hidden = torch.ones(new, new, dtype=torch.bool).triu(1)
            scores[:, -new:] = scores[:, -new:].masked_fill(hidden, -math.inf)
            out.append(scores.softmax(-1) @ v)
        now = max(here.sinks, seen - max(here.recent, int(seen / here.compression)))
        if now - begin >= here.trim_every:
            self.begin[layer] = now
        return torch.stack(out)[None]


@pytest.mark.parametrize("compensation", ["weighted", "mean", "none"])
@pytest.mark.parametrize(
    ("compression", "chunks"), [(2.5, [30, *[1] * 12, 8]), (math.inf, [4, 6, 3, 20, 1, 26]), (4.0, [20, 15, 1, 1, 13])]
)
def test_caches_equal_the_definition(llama, compensation, compression, chunks):
    here, ids = policy(compensation=compensation, compression=compression), tokens(1, sum(chunks))
    logits, cache = in_chunks(llama, here, ids, chunks)
    everything = DynamicCache()
    with attach(llama, Reference(here)):
        expected = [llama(chunk, past_key_values=everything).logits for chunk in ids.split(chunks, dim=1)]
    torch.testing.assert_close(logits, torch.cat(expected, 1), **CLOSE)
    assert cache.bytes_held < in_chunks(llama, here.unlimited(), ids, chunks)[1].bytes_held


@pytest.mark.parametrize("compensation", ["weighted", "none"])
def test_chunks_between_trims_do_not_matter(llama, compensation):
    here, ids = policy(trim_every=6, compression=math.inf, compensation=compensation), tokens(1, 42)
    one_by_one, _ = in_chunks(llama, here, ids, [30, *[1] * 12])
    together, _ = in_chunks(llama, here, ids, [30, 6, 2, 4])
    torch.testing.assert_close(together, one_by_one, **CLOSE)
    before_any, _ = in_chunks(llama, here, ids[:, :13], [4, 1, 8])
    torch.testing.assert_close(before_any, llama(ids[:, :13]).logits, **CLOSE)
    across, _ = in_chunks(llama, here, ids, [30, 12])
    assert (across - one_by_one).abs().max() > 1e-2


@pytest.mark.parametrize("trim_every", [1, 4])
@pytest.mark.parametrize("chunks", [[20, 1, 1, 1, 5, 2], [2, 4, 3, 13, 1, 7]])
def test_left_padded_rows_equal_single_rows(llama, trim_every, chunks):
    here, ids = policy(trim_every=trim_every), tokens(3, 30)
    padding = torch.tensor([0, 5, 11])
    real = (torch.arange(30) >= padding[:, None]).long()
    logits, cache = in_chunks(llama, here, ids, chunks, attention_mask=real)
    assert cache.bytes_held <= here.promised_bytes(llama.config, 3, 30)
    # rotation is relative: shifted positions give the same
    for row, skipped in enumerate(padding.tolist()):
        ends = torch.tensor(chunks).cumsum(0)
        own = [int(e) for e in (ends - skipped).clamp(min=0).diff(prepend=torch.zeros(1, dtype=torch.long))]
        alone, _ = in_chunks(llama, here, ids[row : row + 1, skipped:], [n for n in own if n])
        torch.testing.assert_close(logits[row : row + 1, skipped:], alone, rtol=1e-4, atol=5e-4)


def test_padding_alone_is_within_the_promise(llama):
    here, ids = policy(), tokens(1, 30)
    real = (torch.arange(30) >= 12).long()[None]
    for chunks in ([30], [5, *[1] * 15, 10]):
        logits, cache = in_chunks(llama, here, ids, chunks, attention_mask=real)
        assert cache.bytes_held <= here.promised_bytes(llama.config, 1, 30)
        assert logits[:, 12:].isfinite().all()


def test_what_a_window_hides_does_not_come_back_in_the_mean(mistral):
    """No key before the window of a token changes what it sees, in one layer."""
    one_layer = MistralForCausalLM(MistralConfig(**{**SIZES, "num_hidden_layers": 1}, sliding_window=14)).eval()
    one_layer.model.layers[0].load_state_dict(mistral.model.layers[0].state_dict())
    here = RazorAttention.of_heads(torch.zeros(1, HEADS, dtype=torch.bool), recent=5, compression=math.inf, sinks=2)
    here = dataclasses.replace(here, trim_every=2)
    ids, other = tokens(1, 40), tokens(1, 40, seed=1)
    other[:, 20:] = ids[:, 20:]
    chunks = [18, *[1] * 22]
    ours, theirs = (in_chunks(one_layer, here, each, chunks)[0] for each in (ids, other))
    differs = (ours - theirs).abs().amax((0, 2)) > 1e-5
    assert differs[:33].any() and differs[20:22].all() and not differs[33:].any()


# Deployment


def test_bytes_are_counted_with_the_compensation_token(llama):
    here = policy(trim_every=1, compression=math.inf)
    cache, ids = here.cache(llama), tokens(2, 20)
    whole, slot = int(MIXED.sum()), 2 * 8 * 4 * 2
    with use(llama, here):
        for step in range(20):
            llama(ids[:, step : step + 1], past_key_values=cache)
            seen = step + 1
            reduced = seen if seen <= 2 + 6 else 2 + 6 + 1
            assert cache.bytes_held == slot * (whole * seen + (MIXED.numel() - whole) * reduced)
            assert cache.bytes_held == here.promised_bytes(llama.config, 2, seen)
    assert cache.bytes_of_bookkeeping > 0


def test_the_buffer_grows_with_the_context():
    here = RazorAttention.of_heads(MIXED)
    assert [here.buffer(n) for n in (100, 20_000, 100_000)] == [4000, 4000, 20_000]
    assert dataclasses.replace(here, compression=math.inf).buffer(100_000) == 4000
    assert here.most_held(100_000) == 4 + 20_000 + 63 + 1
    share = here.promised_bytes(LlamaConfig(**SIZES), 1, 10**6) / here.unlimited().promised_bytes(
        LlamaConfig(**SIZES), 1, 10**6
    )
    assert share == pytest.approx(1 / 3 + 2 / 3 / 5, abs=1e-3)  # r + (1 - r) / C


@pytest.mark.parametrize("budget", [1, 5, 20, 60, 120, 199, 250])
def test_a_budget_is_the_mean_over_the_heads(budget):
    here, config = policy(), LlamaConfig(**SIZES)
    fitted = here.with_budget(budget, 200)
    held = fitted.promised_bytes(config, 1, 200) / (2 * 8 * 4 * 6)
    assert min(budget, 200) - 8 <= held <= min(max(budget * 1.1, budget + 1), 200)
    assert set(fitted.heads.protected) <= set(here.heads.protected)
    assert budget < 120 or fitted.heads == here.heads


def test_one_prefill_serves_every_choice_of_heads(llama):
    ids, everything = tokens(2, 40), Full()
    read = everything.cache(llama)
    with use(llama, everything):
        llama(ids[:, :30], past_key_values=read)
    for choice in (policy(), policy().unlimited(), RazorAttention.of_heads(~MIXED, recent=5, trim_every=1)):
        alone, _ = in_chunks(llama, choice, ids, [30, *[1] * 10])
        cache = choice.split(read)
        with use(llama, choice):
            rest = [llama(ids[:, at : at + 1], past_key_values=cache).logits for at in range(30, 40)]
        torch.testing.assert_close(torch.cat(rest, 1), alone[:, 30:], **CLOSE)
    with pytest.raises(ValueError, match=r"cache must be that of Full\(\), got layers of RazorLayer"):
        policy().split(cache)


def test_tokens_can_be_taken_back_until_one_was_dropped(llama):
    here, ids = policy(), tokens(1, 30)
    cache = here.cache(llama)
    with use(llama, here):
        llama(ids[:, :8], past_key_values=cache)
        before = llama(ids[:, 8:9], past_key_values=cache).logits
        for layer in cache.layers:
            layer.crop(-1)
        again = llama(ids[:, 8:9], past_key_values=cache).logits
        torch.testing.assert_close(again, before)
        llama(ids[:, 9:], past_key_values=cache)
        with pytest.raises(ValueError, match="tokens have been dropped, so the last 1 cannot be taken back"):
            cache.layers[0].crop(-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recent": 0}, "recent must be at least 1"),
        ({"compression": 0.5}, "compression must be at least 1"),
        ({"compression": math.nan}, "compression must be at least 1"),
        ({"sinks": -1}, "sinks must be at least 0, got -1"),
        ({"trim_every": 0}, "trim_every must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        policy(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 1}, "block must be at least 2"),
        ({"repeats": 1}, "repeats must be at least 2"),
        ({"tile": 0}, "tile must be at least 1"),
        ({"first_id": 3}, "must be given together"),
    ],
)
def test_a_wrong_probe_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Probe(**options)


# The claims


def test_every_choice_has_as_many_heads():
    scores = Scores(torch.rand(10, 4), torch.rand(10, 4))
    made = choices(scores, seed=3)
    sizes = {name: len(heads.protected) for name, heads in made.items()}
    number = sizes["razor"]
    assert number >= 6 and sizes.pop("full") == 40 and sizes.pop("streaming") == 0 and set(sizes.values()) == {number}
    assert not set(made["lowest"].protected) & set(made["razor"].protected)
    assert made["random 0"] != made["random 1"]


def test_the_rules_of_the_claims():
    good = {"full_nll": 0.3, "razor_nll": 1.8, "random_nll": 4.1, "gap_closed": 0.6}
    assert found_heads_retrieve([good, good | {"razor_nll": 2.0}])
    assert not found_heads_retrieve([good, good | {"razor_nll": 4.2}])
    assert not found_heads_retrieve([good, good | {"random_nll": 1.9, "razor_nll": 1.85}, good | {"razor_nll": 2.0}])
    assert not found_heads_retrieve([good | {"gap_closed": 0.4}])
    assert not found_heads_retrieve([good | {"full_nll": 1.9}])
    helps = {"weighted_nll": 2.0, "none_nll": 2.1}
    assert compensation_helps([helps, {"weighted_nll": 2.11, "none_nll": 2.1}])
    assert not compensation_helps([helps, {"weighted_nll": 2.15, "none_nll": 2.1}])
    assert not compensation_helps([{"weighted_nll": 2.11, "none_nll": 2.1}])
