"""DuoAttention: gates in the authors' format, training as released, split caches that equal masked attention."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from regard.attention.masks import sinks_and_window
from regard.llm import attach, use
from regard.llm.longcontext import Prompt, Turn
from regard.llm.visible import Visible
from regard.papers.duo_attention import DuoAttention, binarise, find_gates, load_gates, random_gates, save_gates
from regard.papers.duo_attention.reorder import permute_heads, reordered
from regard.papers.duo_attention.streaming import streaming_attention
from regard.papers.duo_attention.training import (
    Example,
    GateTraining,
    as_example,
    frozen,
    gated_loss,
    schedule,
    train_gates,
)

VOCABULARY, LAYERS, HEADS = 61, 3, 3
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
)
MIXED = torch.tensor([[True, False, True], [False, False, True], [True, True, False]])


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def mistral() -> MistralForCausalLM:
    torch.manual_seed(1)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=12)).eval().requires_grad_(False)


def tokens(rows: int, number: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, number), generator=torch.Generator().manual_seed(seed))


def policy(**options) -> DuoAttention:
    return DuoAttention.of_heads(MIXED, **{"sinks": 3, "recent": 7, **options})


def in_chunks(model, policy: DuoAttention, ids: Tensor, chunks: list[int], **options) -> tuple[Tensor, object]:
    """The logits of all tokens, fed in chunks of these lengths."""
    cache, logits = policy.cache(model), []
    with use(model, policy):
        seen = 0
        for length in chunks:
            options_now = {k: v[:, : seen + length] for k, v in options.items()}
            out = model(ids[:, seen : seen + length], past_key_values=cache, **options_now)
            logits.append(out.logits)
            seen += length
    return torch.cat(logits, dim=1), cache


def with_masks(model, ids: Tensor, mask_of_streaming: Tensor) -> Tensor:
    """The logits under dense masks, streaming heads under the one given: the plain reference of the split cache."""

    def attention(module, query, key, value, visible: Visible, scale):
        full = visible.over()
        full = full if isinstance(full, Tensor) else full.tensor(query.shape[2], key.shape[2])
        keeps = MIXED[module.layer_idx].repeat_interleave(query.shape[1] // key.shape[1])[None, :, None, None]
        mask = full & (keeps | mask_of_streaming)
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        return weights @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)

    with attach(model, attention):
        return model(ids, use_cache=False).logits


# Gates


def test_gates_survive_their_files(tmp_path):
    gates = random_gates(4, 2, torch.Generator().manual_seed(0), sinks=8, recent=64)
    assert load_gates(save_gates(gates, tmp_path / "new" / "folder")) == gates
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "full_attention_heads.tsv",
    ]


def test_files_are_the_authors(tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_text("1.002e+00\t-3.1e-03\n5.000000000000000000e-01\t0.25\n")
    (tmp_path / "config.json").write_text('{"sink_size": 128, "recent_size": 256, "lr": 0.02}')
    gates = load_gates(tmp_path)
    assert gates.values.tolist() == [[1.0, 0.0], [0.5, 0.25]]
    assert (gates.sinks, gates.recent, gates.settings) == (128, 256, {"lr": 0.02})
    assert DuoAttention.from_official(tmp_path).retrieval.tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ("1\t0\n1\n", "{}", "every row must have one number per KV head"),
        ("", "{}", "every row must have one number per KV head"),
        ("1\tx\n", "{}", "every cell must be a number"),
        ("1\tnan\n", '{"sink_size": 1, "recent_size": 2}', "gates must be finite"),
        ("1\t0\n", "{", "not JSON"),
        ("1\t0\n", '{"sink_size": 1}', "sink_size and recent_size must be whole numbers"),
        ("1\t0\n", '{"sink_size": 1, "recent_size": 0}', "recent must be at least 1"),
        ("1\t0\n", None, "config.json is missing"),
    ],
)
def test_a_broken_file_is_named(tmp_path, table, settings, message):
    (tmp_path / "full_attention_heads.tsv").write_text(table)
    if settings is not None:
        (tmp_path / "config.json").write_text(settings)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        load_gates(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_binarise_keeps_the_highest_gates():
    gates = torch.tensor([[0.9, 0.1], [0.5, 0.4]])
    assert binarise(gates, 0.5).tolist() == [[True, False], [True, False]]
    assert binarise(gates, 0.75).tolist() == [[True, False], [False, False]]
    assert binarise(gates, 0.0).all() and not binarise(gates, 1.0).any()


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_binarise_breaks_ties_without_bias_to_a_place(sparsity):
    ties = torch.ones(8, 5)
    choices = torch.stack([binarise(ties, sparsity, torch.Generator().manual_seed(seed)) for seed in range(200)])
    assert (choices.flatten(1).sum(1) - round(40 * (1 - sparsity))).abs().max() <= 1
    assert (choices.float().mean(0) - (1 - sparsity)).abs().max() < 0.2
    assert torch.equal(binarise(ties, sparsity), binarise(ties, sparsity))


# Streaming attention


@pytest.mark.parametrize(("length", "sinks", "recent"), [(1, 2, 3), (5, 8, 9), (200, 4, 16), (130, 0, 1), (97, 5, 150)])
def test_blocks_equal_the_dense_mask(length, sinks, recent):
    generator = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(2, heads, length, 8, generator=generator) for heads in (6, 3, 3))
    query, key, value = (each.requires_grad_() for each in (query, key, value))
    first = key[:, :, :sinks], value[:, :, :sinks]
    out = streaming_attention(query, key, value, *first, recent=recent, visible=causal_rule(length), scale=0.3)
    mask = sinks_and_window(sinks, recent).tensor(length, length)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)
    weight = torch.randn(out.shape, generator=generator)
    ours = torch.autograd.grad((out * weight).sum(), (query, key, value))
    theirs = torch.autograd.grad((dense * weight).sum(), (query, key, value))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def causal_rule(length: int) -> Visible:
    from transformers.masking_utils import causal_mask_function

    return Visible(causal_mask_function, 0, length, None, torch.device("cpu"))


# The policy


@pytest.mark.parametrize("chunks", [[60], [1] * 60, [25, 1, 1, 20, 1, 12], [4, 56]])
def test_streaming_prefill_is_the_papers_mask(llama, chunks):
    ids = tokens(1, 60)
    logits, _ = in_chunks(llama, policy(prefill="streaming"), ids, chunks)
    mask = sinks_and_window(3, 7).tensor(60, 60)
    torch.testing.assert_close(logits, with_masks(llama, ids, mask), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunks", [[20, *[1] * 40], [20, 15, 1, 1, 13, 10], [2, 4, 30, 24], [1, 59]])
def test_released_prefill_is_full_then_truncated(llama, chunks):
    ids = tokens(1, 60)
    logits, _ = in_chunks(llama, policy(), ids, chunks)
    starts = torch.tensor([sum(chunks[:i]) for i, length in enumerate(chunks) for _ in range(length)])[:, None]
    key = torch.arange(60)
    mask = (starts == 0) | (key < 3) | (key >= starts - 7)
    torch.testing.assert_close(logits, with_masks(llama, ids, mask), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefill", ["released", "streaming"])
def test_a_sliding_window_stays(mistral, prefill):
    ids = tokens(1, 40)
    chunks = [15, 1, 1, 8, 1, 14]
    with torch.no_grad():
        untouched = mistral(ids).logits
    unlimited, _ = in_chunks(mistral, policy(prefill=prefill).unlimited(), ids, chunks)
    torch.testing.assert_close(unlimited, untouched, rtol=1e-4, atol=1e-4)
    if prefill == "streaming":
        logits, _ = in_chunks(mistral, policy(prefill=prefill), ids, chunks)
        mask = sinks_and_window(3, 7).tensor(40, 40)
        torch.testing.assert_close(logits, with_masks(mistral, ids, mask), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefill", ["released", "streaming"])
@pytest.mark.parametrize("chunks", [[30, 1, 1, 1, 5, 7], [4, 6, 3, 20, 1, 11]])
def test_left_padded_rows_equal_single_rows(llama, prefill, chunks):
    ids = tokens(3, 45)
    padding = torch.tensor([0, 5, 13])
    real = (torch.arange(45) >= padding[:, None]).long()
    logits, _ = in_chunks(llama, policy(prefill=prefill), ids, chunks, attention_mask=real)
    # rotation is relative: shifted positions give the same
    for row, skipped in enumerate(padding.tolist()):
        ends = torch.tensor(chunks).cumsum(0)
        own = [int(e) for e in (ends - skipped).clamp(min=0).diff(prepend=torch.zeros(1, dtype=torch.long))]
        alone, _ = in_chunks(llama, policy(prefill=prefill), ids[row : row + 1, skipped:], [n for n in own if n])
        torch.testing.assert_close(logits[row : row + 1, skipped:], alone, rtol=1e-4, atol=2e-4)


# Deployment


def test_bytes_are_the_formula_of_the_paper(llama):
    here = policy(prefill="streaming")
    full = int(MIXED.sum())
    cache, ids = here.cache(llama), tokens(2, 40)
    with use(llama, here):
        for step in range(40):
            llama(ids[:, step : step + 1], past_key_values=cache)
            seen = step + 1
            expected = 2 * 8 * 4 * 2 * (full * seen + (MIXED.numel() - full) * min(seen, 3 + 7))
            assert cache.bytes_held == expected == here.promised_bytes(llama.config, 2, seen)


def test_one_prefill_serves_every_choice_of_heads(llama):
    ids = tokens(2, 50)
    everything = policy().unlimited()
    read = everything.cache(llama)
    with use(llama, everything):
        llama(ids[:, :30], past_key_values=read)
    for choice in (policy(), policy().unlimited(), DuoAttention.of_heads(~MIXED, sinks=2, recent=5)):
        alone, _ = in_chunks(llama, choice, ids, [30, *[1] * 20])
        cache = choice.split(read)
        with use(llama, choice):
            rest = [llama(ids[:, at : at + 1], past_key_values=cache).logits for at in range(30, 50)]
        torch.testing.assert_close(torch.cat(rest, 1), alone[:, 30:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="only the released prefill can be shared"):
        policy(prefill="streaming").split(read)


def test_tokens_can_be_taken_back_until_one_was_dropped(llama):
    here, ids = policy(), tokens(1, 30)
    cache = here.cache(llama)
    with use(llama, here):
        llama(ids[:, :8], past_key_values=cache)
        before = llama(ids[:, 8:9], past_key_values=cache).logits
        for layer in cache.layers:
            layer.crop(-1)
        assert cache.get_seq_length() == 8
        again = llama(ids[:, 8:9], past_key_values=cache).logits
        torch.testing.assert_close(again, before)
        llama(ids[:, 9:], past_key_values=cache)
        with pytest.raises(ValueError, match="tokens have been dropped, so the last 1 cannot be taken back"):
            cache.layers[0].crop(-1)


def test_retrieval_heads_come_first_and_nothing_changes(llama):
    here, ids = policy(), tokens(1, 40)
    expected, _ = in_chunks(llama, here, ids, [25, *[1] * 15])
    weights = {name: weight.clone() for name, weight in llama.state_dict().items()}
    with reordered(llama, here) as there:
        assert there.retrieval.int().diff(dim=1).max() <= 0 and there.retrieval.sum() == MIXED.sum()
        assert not torch.equal(
            llama.model.layers[0].self_attn.q_proj.weight, weights["model.layers.0.self_attn.q_proj.weight"]
        )
        logits, _ = in_chunks(llama, there, ids, [25, *[1] * 15])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(weight, weights[name]) for name, weight in llama.state_dict().items())
    with pytest.raises(ValueError, match="order must permute 3 KV heads in each of 3 layers"):
        permute_heads(llama, torch.zeros(3, 3, dtype=torch.long))


def test_a_policy_survives_its_folder(tmp_path, llama):
    here = DuoAttention(random_gates(3, 3, torch.Generator().manual_seed(1)), sparsity=0.3, sinks=1, recent=9)
    here.save(tmp_path / "new")
    assert DuoAttention.load(tmp_path / "new") == here


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity must be from 0"),
        ({"sinks": -1}, "sinks must be at least 0, got -1"),
        ({"recent": 0}, "recent must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    gates = random_gates(3, 3, torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=message):
        DuoAttention(gates, **options)


def test_gates_of_another_model_are_refused(llama):
    here = DuoAttention(random_gates(4, 2, torch.Generator().manual_seed(1)))
    with (
        pytest.raises(ValueError, match="the gates are for 4 layers x 2 KV heads, the model has 3 x 3"),
        use(llama, here),
    ):
        pass


def test_gates_that_ship_fit_the_model_that_ships():
    here = DuoAttention.pretrained()
    assert here.gates.values.shape == (30, 3)
    assert here.retrieval.sum() == 45
    with pytest.raises(FileNotFoundError, match="gates must be a folder or one of smollm2-135m-instruct, got 'smol'"):
        find_gates("smol")


# Training


def example(step: int) -> Example:
    supervised = torch.zeros(1, 40, dtype=torch.bool)
    supervised[:, 30:] = True
    return Example(tokens(1, 40, seed=step), supervised)


SHORT = GateTraining(steps=12, learning_rate=0.1, sinks=2, recent=4)


@pytest.mark.parametrize("full_source", ["teacher", "self"])
def test_the_loss_falls_and_gates_leave_one(llama, full_source):
    training = dataclasses.replace(SHORT, full_source=full_source, regularisation=0.5)
    trainer = train_gates(llama, lambda step: example(0), training)
    first, last = (distance + 0.5 * mean for distance, mean in (trainer.history[0], trainer.history[-1]))
    assert last < first and trainer.gates.min() < 0.8
    assert not any(weight.requires_grad for weight in llama.parameters())


def test_with_all_gates_one_both_streams_agree(llama):
    with frozen(llama):
        loss = gated_loss(llama, example(0), torch.ones(LAYERS, HEADS), SHORT)
    assert loss.distillation < 1e-10 and loss.regularisation == 1


def test_the_two_sources_of_full_attention_differ_below_one(llama):
    gates = torch.full((LAYERS, HEADS), 0.5)
    with frozen(llama):
        teacher = gated_loss(llama, example(0), gates, SHORT)
        own = gated_loss(llama, example(0), gates, dataclasses.replace(SHORT, full_source="self"))
    assert 0 < teacher.distillation < own.distillation


def test_the_schedule_is_the_papers():
    rates = [0.02 * schedule(step, 2000) for step in (0, 39, 200, 399, 1000, 1600, 1800, 1999)]
    assert rates == pytest.approx([0.002, 0.002, 0.01005, 0.02, 0.02, 0.02, 0.01, 0.002])


def test_training_that_was_stopped_ends_at_the_same_gates(llama, tmp_path):
    whole = train_gates(llama, example, SHORT)

    def stop_at_eight(steps, total):
        for step in steps:
            if step == 8:
                raise KeyboardInterrupt
            yield step

    checkpoint = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        train_gates(llama, example, SHORT, checkpoint=checkpoint, checkpoint_every=3, progress=stop_at_eight)
    resumed = train_gates(llama, example, SHORT, checkpoint=checkpoint)
    assert torch.equal(resumed.gates, whole.gates) and resumed.history == whole.history
    with pytest.raises(ValueError, match=r"was trained with sinks 2, got 3; begin in another folder"):
        train_gates(llama, example, dataclasses.replace(SHORT, sinks=3), checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:200])
    with pytest.raises(ValueError, match="is not a checkpoint of gate training"):
        train_gates(llama, example, SHORT, checkpoint=checkpoint)


def test_a_learning_rate_that_cannot_reach_zero_is_refused():
    with pytest.raises(ValueError, match=r"learning_rate must be at least 1 / steps = 0\.1"):
        GateTraining(steps=10, learning_rate=0.02)


def test_shorter_rows_are_filled_up_behind_what_is_supervised():
    def prompt(context: int, answer: int) -> Prompt:
        part = [torch.arange(1, n + 1) for n in (context, 2, answer)]
        return Prompt(part[0], (Turn(part[1], part[2], ("x",)),))

    batch = as_example([prompt(4, 3), prompt(5, 1)])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 1, 2, 1, 2, 3], [1, 2, 3, 4, 5, 1, 2, 1, 0]]
    assert batch.supervised.sum(1).tolist() == [5, 3] and batch.supervised[1].tolist().index(True) == 5
