"""Scans: every prefix at once equals one element after the other, and a softmax written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.attention.merge import Partial, merge, partial_attention
from regard.attention.scan import Running, associative_scan, plain_prefix_attention, prefix_attention

law = settings(deadline=None, max_examples=60)
LENGTHS = (1, 7, 64, 257)
"""One token, part of a chunk, whole chunks, and chunks of chunks (32 x 32 would need 1,024) with a rest."""
KINDS = ("steep", "late", "early", "padded", "first hidden", "all hidden")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scores_of(kind: str, tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Scores (2, 3, tokens) that are hard to sum."""
    scores = 30 * normal(2, 3, tokens)
    slope = torch.linspace(0, 300, tokens, dtype=torch.float64)
    if kind == "late":
        scores = scores / 30 + slope
    if kind == "early":
        scores = scores / 30 - slope
    if kind == "padded":
        scores = scores.masked_fill(normal(2, 3, tokens, seed=5) > 0, -math.inf)
    if kind == "first hidden":
        scores[..., : tokens // 2] = -math.inf
    if kind == "all hidden":
        scores[:] = -math.inf
    return scores.to(dtype)


def naive(scores: torch.Tensor, values: torch.Tensor) -> Partial:
    """The softmax over every prefix, written out as a masked matrix."""
    tokens = scores.shape[-1]
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril() & (scores > -math.inf)[..., None, :]
    rows = scores[..., None, :].masked_fill(~seen, -math.inf)
    lse = rows.logsumexp(-1)
    weights = (rows - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return Partial(weights @ values, lse)


def same_state(one: Running, other: Running) -> None:
    """The same attention: the two may hold it relative to different scores."""
    torch.testing.assert_close(one.partial.out, other.partial.out)
    torch.testing.assert_close(one.partial.lse, other.partial.lse)


MODULUS = 97


def product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of matrices of whole numbers: associative to the last bit, and not commutative."""
    return first @ second % MODULUS


@law
@given(length=st.integers(0, 70), seed=st.integers(0, 99), axis=st.sampled_from([0, 1, -3, -4]))
def test_a_scan_equals_a_loop_in_order(length, seed, axis):
    generator = torch.Generator().manual_seed(seed)
    shape = (length, 2) if axis % 4 == 0 else (2, length)
    elements = torch.randint(0, MODULUS, (*shape, 3, 3), generator=generator)
    expected = list(elements.unbind(axis))
    for position in range(1, length):
        expected[position] = product(expected[position - 1], expected[position])
    result = associative_scan(product, elements, axis)
    assert torch.equal(result, torch.stack(expected, axis) if expected else elements)


def after(first: dict, second: dict) -> dict:
    """One affine map after another, each x -> keep * x + add."""
    keep = first["keep"] * second["keep"]
    return {"keep": keep, "add": first["add"] * second["keep"][..., None] + second["add"]}


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_scan_takes_trees_and_carries_gradients(length):
    keep, add = normal(2, length).requires_grad_(), normal(2, length, 3, seed=1).requires_grad_()

    def scanned(keep, add):
        return associative_scan(after, {"keep": keep, "add": add}, 1)["add"]

    expected, x = [], torch.zeros(2, 3, dtype=torch.float64)
    for position in range(length):
        x = keep[:, position, None] * x + add[:, position]
        expected.append(x)
    torch.testing.assert_close(scanned(keep, add), torch.stack(expected, 1))
    assert torch.autograd.gradcheck(scanned, (keep, add))


def test_a_scan_takes_a_logarithm_of_rounds():
    calls = []
    ones = torch.ones(1000, dtype=torch.int64)
    counted = associative_scan(lambda a, b: calls.append(a.shape[0]) or a + b, ones, 0)
    assert torch.equal(counted, torch.arange(1, 1001))
    assert len(calls) <= 2 * math.log2(1000)
    assert sum(calls) <= 2 * 1000


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [prefix_attention, plain_prefix_attention], ids=["chunks", "plain"])
def test_every_prefix_is_a_softmax(way, kind, tokens):
    scores, values = scores_of(kind, tokens, torch.float64), normal(2, 3, tokens, 5, seed=1)
    out, last = way(scores, values)
    expected = naive(scores, values)
    torch.testing.assert_close(out, expected.out)
    torch.testing.assert_close(last.out, expected.out[..., -1, :])
    torch.testing.assert_close(last.partial.lse, expected.lse[..., -1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_is_a_softmax_also_in_fp32(kind):
    """The plain way is no oracle here: it rounds an lse of 300, by 1e-5, at every token."""
    scores, values = scores_of(kind, 257), normal(2, 3, 257, 5, seed=1, dtype=torch.float32)
    out, last = prefix_attention(scores, values)
    expected = naive(scores.double(), values.double())
    torch.testing.assert_close(out, expected.out.float())
    torch.testing.assert_close(last.partial.lse, expected.lse[..., -1].float())


@pytest.mark.parametrize("chunk", [2, 3, 16, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_chunks_does_not_matter(kind, chunk):
    scores, values = scores_of(kind, 257, torch.float64), normal(2, 3, 257, 5, seed=1)
    out, last = prefix_attention(scores, values, chunk=chunk)
    expected = naive(scores, values)
    torch.testing.assert_close(out, expected.out)
    torch.testing.assert_close(last.partial.lse, expected.lse[..., -1])


@law
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 31, 32, 33, 70]), max_size=5),
    way=st.sampled_from([prefix_attention, plain_prefix_attention]),
)
def test_any_chunks_that_carry_the_state_give_the_whole(kind, lengths, way):
    tokens = sum(lengths)
    scores, values = scores_of(kind, tokens, torch.float64), normal(2, 3, tokens, 5, seed=1)
    state, outs = Running.empty(2, 3, 5, dtype=torch.float64), [values[..., :0, :]]
    for part_scores, part_values in zip(scores.split(lengths, -1), values.split(lengths, -2), strict=True):
        out, state = way(part_scores, part_values, state)
        outs.append(out)
    whole, last = prefix_attention(scores, values)
    torch.testing.assert_close(torch.cat(outs, -2), whole)
    same_state(state, last)


@law
@given(kind=st.sampled_from(KINDS), cut=st.integers(0, 40))
def test_states_are_partials_and_partials_are_states(kind, cut):
    scores, values = scores_of(kind, 40, torch.float64), normal(2, 3, 40, 5, seed=1)
    _, whole = prefix_attention(scores, values)
    _, before = prefix_attention(scores[..., :cut], values[..., :cut, :])
    _, behind = prefix_attention(scores[..., cut:], values[..., cut:, :])
    merged = Running.of(merge(before.partial, behind.partial))
    same_state(merged, whole)
    same_state(Running.of(whole.partial), whole)
    _, continued = prefix_attention(scores[..., cut:], values[..., cut:, :], Running.of(before.partial))
    same_state(continued, whole)


def test_a_state_goes_on_from_attention_over_stored_keys():
    q, k, v = normal(2, 3, 1, 4), normal(2, 3, 50, 4, seed=1), normal(2, 3, 50, 4, seed=2)
    stored = partial_attention(q, k[:, :, :20], v[:, :, :20], scale=1.0)
    initial = Running.of(Partial(stored.out[:, :, 0], stored.lse[:, :, 0]))
    _, last = prefix_attention((q @ k.mT)[:, :, 0, 20:], v[:, :, 20:], initial)
    expected = partial_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(last.out, expected.out[:, :, 0])
    torch.testing.assert_close(last.partial.lse, expected.lse[:, :, 0])


def test_worked_values():
    scores, values = torch.log(torch.tensor([1.0, 3.0, 4.0])), torch.tensor([8.0, 0.0, 4.0])
    out, last = prefix_attention(scores.view(1, 1, 3), values.view(1, 1, 3, 1))
    assert out.flatten().tolist() == pytest.approx([8, 2, 3])
    assert last.partial.lse.item() == pytest.approx(math.log(8))
    empty = Running.empty(1, 1, 1)
    assert empty.out.item() == 0
    assert empty.partial.lse.item() == -math.inf


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_state_counts_where_a_logarithm_cannot(tokens):
    many = 2**23
    before = Running(torch.full((1, 1), 100.0), torch.full((1, 1), float(many)), torch.zeros(1, 1, 1))
    _, state = prefix_attention(torch.full((1, 1, tokens), 100.0), torch.zeros(1, 1, tokens, 1), before)
    assert state.total.item() == many + tokens
    assert state.partial.lse.item() == before.partial.lse.item()


@pytest.mark.parametrize("tokens", [1, 7, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_and_those_of_the_softmax(kind, tokens):
    scores, values = scores_of(kind, tokens, torch.float64), normal(2, 3, tokens, 5, seed=1)
    if kind == "steep":
        scores = scores / 30  # gradients of a softmax that has picked one token are all zero
    cotangent = normal(2, 3, tokens, 5, seed=2)

    def gradients(way):
        leaves = scores.clone().requires_grad_(), values.clone().requires_grad_()
        return torch.autograd.grad((way(*leaves) * cotangent).sum(), leaves)

    def written_out(scores, values):
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril() & (scores > -math.inf)[..., None, :]
        empty = ~seen.any(-1, keepdim=True)
        rows = scores.nan_to_num(neginf=0.0)[..., None, :].masked_fill(~seen & ~empty, -math.inf)
        return rows.softmax(-1).masked_fill(empty, 0.0) @ values

    expected = gradients(written_out)
    for way in (prefix_attention, plain_prefix_attention):
        for mine, wanted in zip(gradients(lambda *leaves, way=way: way(*leaves)[0]), expected, strict=True):
            assert mine.isfinite().all()
            torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize(
    ("way", "tokens"),
    [
        *((prefix_attention, tokens) for tokens in (0, 1, 4, 40)),
        *((plain_prefix_attention, tokens) for tokens in (0, 3)),
    ],
)
def test_gradients_flow_through_the_state(way, tokens):
    scores, values = normal(1, 2, tokens).requires_grad_(), normal(1, 2, tokens, 3, seed=1).requires_grad_()
    before = normal(1, 2, 3, seed=2).requires_grad_(), normal(1, 2, seed=3).requires_grad_()

    def through(scores, values, out, lse):
        result, last = way(scores, values, Running.of(Partial(out, lse)))
        return result, *last.partial

    assert torch.autograd.gradcheck(through, (scores, values, *before))


@pytest.mark.parametrize("kind", ["steep", "late", "padded"])
@pytest.mark.parametrize("tokens", [1, 100])
def test_half_precision_and_autocast_keep_the_sums_in_fp32(kind, tokens):
    scores = scores_of(kind, tokens)
    values = normal(2, 3, tokens, 5, seed=1, dtype=torch.bfloat16)
    for way in (prefix_attention, plain_prefix_attention):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, last = way(scores, values)
        assert out.dtype == torch.bfloat16
        assert {part.dtype for part in last} == {torch.float32}
        exact = naive(scores.double(), values.double())
        torch.testing.assert_close(last.out.double(), exact.out[..., -1, :], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.double(), exact.out, atol=1e-4, rtol=2**-8)  # one rounding to 8 bits


def test_a_batch_of_two_is_two_singles_and_no_rows_are_no_rows():
    scores, values = scores_of("padded", 70, torch.float64), normal(2, 3, 70, 5, seed=1)
    out, last = prefix_attention(scores, values)
    for row in range(2):
        single, state = prefix_attention(scores[row : row + 1], values[row : row + 1])
        torch.testing.assert_close(single[0], out[row])
        torch.testing.assert_close(state.partial.lse[0], last.partial.lse[row])
    assert prefix_attention(scores[:0], values[:0])[0].shape == (0, 3, 70, 5)


def test_scores_that_do_not_fit_the_values_are_refused():
    call = getattr(prefix_attention, "__wrapped__", prefix_attention)  # without the annotation check of the tests
    message = r"scores must have the shape of values without dim, got \(1, 2, 4\) and \(1, 2, 3, 5\)"
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 2, 4), torch.zeros(1, 2, 3, 5))
