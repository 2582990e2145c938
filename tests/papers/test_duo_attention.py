"""DuoAttention: gates in the authors' format, training as released, split caches that equal masked attention."""

import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from regard.attention.masks import sinks_and_window
from regard.llm import attach, use
from regard.llm.visible import Visible
from regard.papers.duo_attention import DuoAttention, binarise, load_gates, random_gates, save_gates
from regard.papers.duo_attention.streaming import streaming_attention

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
