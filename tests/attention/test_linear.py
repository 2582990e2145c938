"""Linear attention: every size of chunks equals the recurrence, and the recurrence equals a sum written out."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.attention.linear import (
    Identity,
    LinearState,
    Taylor,
    linear_attention,
    linear_attention_reference,
)

law = settings(deadline=None, max_examples=150)
DECAYS = ("none", "per head", "per token", "per channel")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(batch: int, heads: int, tokens: int, dim: int, value_dim: int, positive: bool = False, **options):
    q, k, v = (
        normal(batch, heads, tokens, size, seed=seed, **options) for seed, size in enumerate((dim, dim, value_dim))
    )
    return (q.abs() + 0.1, k.abs() + 0.1, v) if positive else (q, k, v)


def decay_of(kind: str, batch: int, heads: int, tokens: int, features: int) -> torch.Tensor | None:
    shapes = {
        "per head": (heads, 1, 1),
        "per token": (batch, heads, tokens, 1),
        "per channel": (batch, heads, tokens, features),
    }
    return None if kind == "none" else -normal(*shapes[kind], seed=5).abs()


def same(one: tuple, other: tuple, **tolerance) -> None:
    for mine, expected in zip((one[0], *one[1]), (other[0], *other[1]), strict=True):
        torch.testing.assert_close(mine, expected, **tolerance)


@st.composite
def calls(draw):
    """Tensors of any shape, also without tokens or rows, with their options."""
    batch, heads, tokens = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 12))
    dim, value_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    feature_map = draw(st.sampled_from([Identity(), Taylor(dim)]))
    eps = draw(st.sampled_from([None, 1e-12, 0.5]))
    # products of unlike signs may sum to a denominator of nearly zero: no two roundings agree there
    positive = eps is not None and isinstance(feature_map, Identity)
    decay = decay_of(draw(st.sampled_from(DECAYS)), batch, heads, tokens, feature_map.size(dim))
    tensors = qkv(batch, heads, tokens, dim, value_dim, positive)
    return tensors, dict(feature_map=feature_map, eps=eps, decay=decay)


@law
@given(call=calls(), chunk=st.integers(1, 15))
def test_every_size_of_chunks_equals_the_recurrence(call, chunk):
    tensors, options = call
    same(linear_attention(*tensors, **options, chunk=chunk), linear_attention_reference(*tensors, **options))


@law
@given(call=calls(), cuts=st.lists(st.floats(0, 1), max_size=3), chunk=st.integers(1, 15))
def test_any_parts_that_carry_the_state_give_the_whole(call, cuts, chunk):
    tensors, options = call
    decay, tokens = options.pop("decay"), tensors[0].shape[2]
    ends = [0, *sorted(int(cut * tokens) for cut in cuts), tokens]
    state, outs = None, []
    for start, stop in pairwise(ends):
        here = slice(start, stop)
        part_decay = decay if decay is None or decay.ndim == 3 else decay[:, :, here]
        parts = (tensor[:, :, here] for tensor in tensors)
        out, state = linear_attention(*parts, **options, decay=part_decay, state=state, chunk=chunk)
        outs.append(out)
    same((torch.cat(outs, 2), state), linear_attention_reference(*tensors, **options, decay=decay))


@law
@given(call=calls())
def test_the_recurrence_equals_the_sum_written_out(call):
    (q, k, v), options = call
    out, state = linear_attention_reference(q, k, v, **options)
    phi, eps = options["feature_map"], options["eps"]
    batch, heads, tokens, _ = q.shape
    features = phi.size(q.shape[-1])
    decay = torch.zeros(batch, heads, tokens, features, dtype=torch.float64)
    decay = decay if options["decay"] is None else decay + options["decay"]

    def left(b: int, h: int, s: int, t: int) -> torch.Tensor:
        """The features of key s that are left at token t."""
        return phi(k[b, h, s : s + 1])[0] * decay[b, h, s + 1 : t + 1].sum(0).exp()

    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                weights = [phi(q[b, h, t : t + 1])[0].dot(left(b, h, s, t)) for s in range(t + 1)]
                total = sum(weight * v[b, h, s] for s, weight in enumerate(weights))
                torch.testing.assert_close(out[b, h, t], total if eps is None else total / (sum(weights) + eps))
            if tokens:
                kept = torch.stack([left(b, h, s, tokens - 1) for s in range(tokens)])
                torch.testing.assert_close(state.kv[b, h], kept.T @ v[b, h])
                assert state.k.shape[-1] == (0 if eps is None else features)
                torch.testing.assert_close(state.k[b, h], kept.sum(0)[: state.k.shape[-1]])


def test_a_worked_sum():
    q = k = torch.ones(1, 1, 3, 1)
    v = torch.tensor([4.0, 2.0, 8.0]).view(1, 1, 3, 1)
    halves = torch.tensor(math.log(0.5)).view(1, 1, 1)
    assert linear_attention(q, k, v, eps=None)[0].flatten().tolist() == [4, 6, 14]
    assert linear_attention(q, k, v)[0].flatten().tolist() == pytest.approx([4, 3, 14 / 3])
    out, state = linear_attention(q, k, v, decay=halves, eps=None)
    assert out.flatten().tolist() == pytest.approx([4, 4, 10])
    assert state.kv.item() == pytest.approx(10)
    assert linear_attention(q, k, v, decay=halves)[0].flatten().tolist() == pytest.approx([4, 8 / 3, 40 / 7])


@law
@given(
    dim=st.integers(1, 6),
    queries=st.integers(0, 5),
    keys=st.integers(0, 5),
    rows=st.lists(st.integers(0, 2), max_size=2),
)
def test_the_similarity_of_taylor_is_the_product_of_features_and_positive(dim, queries, keys, rows):
    taylor, q, k = Taylor(dim), normal(*rows, queries, dim), normal(*rows, keys, dim, seed=1)
    features = taylor(q)
    assert features.shape == (*rows, queries, taylor.size(dim))
    torch.testing.assert_close(taylor.similarity(q, k), features @ taylor(k).mT)
    assert (taylor.similarity(10 * q, k) >= 0.5 - 1e-9).all()  # 1 + s + s^2 / 2 is never below a half


def test_taylor_is_the_start_of_the_exponential():
    q, k = 0.1 * normal(5, 4), normal(6, 4, seed=1)
    scores = q @ k.T / 2
    error = Taylor(4).similarity(q, k) - scores.exp()
    assert (error.abs() <= scores.abs() ** 3 / 6 * scores.abs().exp() + 1e-15).all()  # Lagrange's remainder
    assert Taylor(1).similarity(torch.tensor([[3.0]]), torch.tensor([[2.0]])).item() == pytest.approx(1 + 6 + 18)


def test_with_taylor_small_scores_give_softmax_attention():
    q, k, v = qkv(2, 2, 40, 4, 3)
    q = 0.01 * q
    scores = (q @ k.mT / 2).masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -math.inf)
    out, _ = linear_attention(q, k, v, feature_map=Taylor(4), chunk=16)
    largest = scores[scores.isfinite()].abs().max()
    of_weights = largest**3 / 6 * largest.exp()  # the remainder, relative; twice that of their quotients
    torch.testing.assert_close(out, scores.softmax(-1) @ v, atol=2 * (of_weights * v.abs().max()).item(), rtol=0)


@pytest.mark.parametrize("feature_map", [Identity(), Taylor(2)], ids=["identity", "taylor"])
@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("eps", [None, 1e-12])
@pytest.mark.parametrize("stated", [False, True])
def test_gradients_are_the_slopes(feature_map, kind, eps, stated):
    leaves = list(qkv(1, 2, 3, 2, 2, positive=True))
    features = feature_map.size(2)
    decay = decay_of(kind, 1, 2, 3, features)
    leaves += [] if decay is None else [decay]
    leaves += [normal(1, 2, features, 2), normal(1, 2, 0 if eps is None else features).abs()] if stated else []

    def through(q, k, v, *others):
        others = list(others)
        given_decay = None if decay is None else others.pop(0)
        state = LinearState(*others) if stated else None
        out, last = linear_attention(q, k, v, feature_map=feature_map, eps=eps, decay=given_decay, state=state, chunk=2)
        return out, *last

    assert torch.autograd.gradcheck(through, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("kind", ["per head", "per token", "per channel"])
def test_a_decay_that_forgets_everything_gives_the_last_token_and_finite_gradients(kind):
    q, k, v = qkv(1, 2, 64, 3, 2, positive=True, dtype=torch.float32)
    decay = (0 * decay_of(kind, 1, 2, 64, 3).float() - 200).requires_grad_()  # exp(200) alone is beyond fp32
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out, state = linear_attention(*leaves, decay=decay, chunk=16)
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(state.k, k[:, :, -1])
    (out.square().sum() + state.kv.sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in (*leaves, decay))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("feature_map", [Identity(), Taylor(4)], ids=["identity", "taylor"])
def test_half_precision_and_autocast_keep_the_sums_in_fp32(feature_map, kind, autocast):
    tensors = qkv(2, 2, 50, 4, 3, positive=True, dtype=torch.float32 if autocast else torch.bfloat16)
    decay = decay_of(kind, 2, 2, 50, feature_map.size(4))
    options = dict(feature_map=feature_map, chunk=16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out, state = linear_attention(*tensors, **options, decay=None if decay is None else decay.float())
    assert out.dtype == tensors[2].dtype
    assert state.kv.dtype == state.k.dtype == torch.float32
    exact = linear_attention_reference(*(t.double() for t in tensors), feature_map=feature_map, decay=decay)
    torch.testing.assert_close(state.kv.double(), exact[1].kv, atol=1e-4, rtol=1e-5)  # sums of up to 50 products
    torch.testing.assert_close(state.k.double(), exact[1].k, atol=1e-4, rtol=1e-5)
    rounding = 1e-5 if autocast else 2**-8  # of the output, once
    torch.testing.assert_close(out.double(), exact[0], atol=rounding, rtol=rounding)


def test_a_state_counts_beyond_what_half_precision_can():
    ones = torch.ones(1, 1, 1000, 1, dtype=torch.bfloat16)
    state = None
    for part in ones.split(100, 2):
        _, state = linear_attention(part, part, part, state=state, chunk=7)
    assert state.k.item() == state.kv.item() == 1000  # in bfloat16 the sum would stop at 256


def test_no_tokens_leave_the_state_and_give_nothing():
    q, k, v = qkv(2, 3, 0, 4, 5, dtype=torch.bfloat16)
    out, empty = linear_attention(q, k, v)
    assert (out.shape, out.dtype) == ((2, 3, 0, 5), torch.bfloat16)
    assert empty.kv.shape == (2, 3, 4, 5) and empty.k.shape == (2, 3, 4)
    assert empty.kv.dtype == torch.float32 and not empty.kv.any() and not empty.k.any()
    state = LinearState(torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4))
    _, after = linear_attention(q, k, v, state=state)
    assert torch.equal(after.kv, state.kv) and torch.equal(after.k, state.k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(chunk=0), "chunk must be at least 1, got 0"),
        (dict(feature_map=Taylor(3)), r"queries and keys must have dim 3 for Taylor\(3\), got 4"),
        (
            dict(decay=torch.zeros(3, 1, 1)),
            r"decay must broadcast to \(batch, heads, tokens, features\) = \(1, 2, 6, 4\), got \(3, 1, 1\)",
        ),
        (dict(decay=torch.zeros(1, 1, 2, 5, 1)), r"decay must broadcast to .*, got \(1, 1, 2, 5, 1\)"),
        (
            dict(state=LinearState(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4))),
            r"the state must have kv of \(1, 2, 4, 5\) and k of \(1, 2, 4\), got \(1, 2, 4, 4\) and \(1, 2, 4\)",
        ),
        (
            dict(state=LinearState(torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 4)), eps=None),
            r"the state must have kv of .* and k of \(1, 2, 0\), got \(1, 2, 4, 5\) and \(1, 2, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(*qkv(1, 2, 6, 4, 5), **options)


def test_taylor_needs_numbers():
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        Taylor(0)
