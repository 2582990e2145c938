"""merge is the algebra of key sets; partial_attention, fused or by the definition, gives what it merges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.attention import merge as module
from regard.attention.attend import attend_reference
from regard.attention.merge import Partial, merge, merge_all, partial_attention, plain_partial_attention

law = settings(deadline=None, max_examples=100)
ways = pytest.mark.parametrize("way", [partial_attention, plain_partial_attention], ids=["fused", "plain"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int = 4, seed: int = 0, **options):
    shapes = [(batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)]
    return tuple(normal(*shape, seed=seed + number, **options) for number, shape in enumerate(shapes))


def same(one: Partial, other: Partial, **tolerance) -> None:
    torch.testing.assert_close(one.out, other.out, **tolerance)
    torch.testing.assert_close(one.lse, other.lse, **tolerance)


@st.composite
def partials(draw, rows: int = 4) -> Partial:
    """Attention over some keys, the normaliser of any size; a row may have seen none."""
    lse = draw(st.lists(st.floats(-1e4, 1e4) | st.just(-math.inf), min_size=rows, max_size=rows))
    lse = torch.tensor(lse, dtype=torch.float64)
    out = normal(rows, 3, seed=draw(st.integers(0, 99)))
    return Partial(out.masked_fill(lse[:, None] == -math.inf, 0.0), lse)


@st.composite
def calls(draw, dtype: torch.dtype = torch.float64):
    """Small tensors of any shape with any mask that fits; there may be no rows and no keys."""
    batch, kv_heads, group = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    full = (batch, kv_heads * group, queries, keys)
    shape = [draw(st.sampled_from([1, size])) for size in full][draw(st.integers(0, 3)) :]
    seed = draw(st.integers(0, 99))
    mask = draw(st.sampled_from([None, normal(*shape, seed=seed) > 0, torch.zeros(shape, dtype=torch.bool)]))
    tensors = qkv(batch, kv_heads * group, kv_heads, queries, keys, seed=seed, dtype=dtype)
    return tensors, dict(mask=mask, scale=draw(st.sampled_from([None, 0.3])))


@law
@given(a=partials(), b=partials(), c=partials())
def test_merge_is_associative_and_commutative(a, b, c):
    same(merge(a, b), merge(b, a))
    same(merge(merge(a, b), c), merge(a, merge(b, c)))
    same(merge_all([a, b, c]), merge(a, merge(b, c)))


@law
@given(a=partials())
def test_no_keys_are_the_identity_to_the_last_bit(a):
    empty = Partial.empty(4, 3, dtype=torch.float64)
    for merged in (merge(a, empty), merge(empty, a), merge_all([a])):
        assert torch.equal(merged.out, a.out)
        assert torch.equal(merged.lse, a.lse)


def test_a_worked_merge():
    one, three = Partial(torch.tensor([[8.0]]), torch.zeros(1)), Partial(torch.zeros(1, 1), torch.tensor([math.log(3)]))
    merged = merge(one, three)  # one key of value 8, three of value 0, all of score 0
    assert merged.out.item() == pytest.approx(2)
    assert merged.lse.item() == pytest.approx(math.log(4))


@law
@given(call=calls(), owner=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_parts_of_the_keys_merge_to_attention_over_all(call, owner):
    (q, k, v), options = call
    owner = torch.tensor(owner)[: k.shape[2]]
    mask = options["mask"]
    parts = []
    for part in range(4):
        of_part = mask if mask is None or mask.shape[-1] == 1 else mask[..., owner == part]
        mine = (k[:, :, owner == part], v[:, :, owner == part])
        parts.append(partial_attention(q, *mine, mask=of_part, scale=options["scale"]))
    expected = attend_reference(q, k, v, **options)
    same(merge_all(parts), Partial(expected.out, expected.lse))


@law
@given(call=calls())
def test_both_ways_equal_the_definition(call):
    tensors, options = call
    expected = attend_reference(*tensors, **options)
    same(plain_partial_attention(*tensors, **options), Partial(expected.out, expected.lse))
    same(partial_attention(*tensors, **options), Partial(expected.out, expected.lse))


@law
@given(call=calls(), trained=st.lists(st.sampled_from("qkv"), min_size=1), used=st.sampled_from(["out", "lse", "both"]))
def test_gradients_of_the_fused_way_are_those_of_the_definition(call, trained, used):
    tensors, options = call

    def gradients(way) -> list[torch.Tensor]:
        leaves = dict(zip("qkv", (tensor.clone() for tensor in tensors), strict=True))
        chosen = [leaves[name].requires_grad_() for name in sorted(set(trained))]
        out, lse = way(*leaves.values(), **options)
        loss = 0.0 * chosen[0].sum()  # the lse alone does not depend on v
        if used != "lse":
            loss = loss + (out * normal(*out.shape, seed=7)).sum()
        if used != "out":
            loss = loss + (lse.masked_fill(lse == -math.inf, 0.0) * normal(*lse.shape, seed=8)).sum()
        return list(torch.autograd.grad(loss, chosen, materialize_grads=True))

    for mine, expected in zip(gradients(partial_attention), gradients(plain_partial_attention), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, expected)


@ways
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "queries"), [(2, 3), (4, 3), (4, 1)], ids=["heads", "groups", "decoding"])
def test_gradients_are_the_slopes(way, masked, heads, queries):
    tensors = [tensor.requires_grad_() for tensor in qkv(1, heads, 2, queries, 5)]
    mask = None
    if masked:
        mask = normal(heads, queries, 5, seed=5) > 0
        mask[0, 0] = False  # a row that sees nothing

    def through(q, k, v):
        out, lse = way(q, k, v, mask=mask)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(through, tensors)


def test_gradients_of_a_merge_are_the_slopes_also_where_a_side_has_no_keys():
    outs = [normal(4, 3, seed=seed).requires_grad_() for seed in range(2)]
    scores = [normal(4, seed=seed).requires_grad_() for seed in range(2, 4)]
    empty = [torch.tensor(rows) for rows in ([True, True, False, False], [True, False, True, False])]

    def through(*leaves):
        sides = zip(leaves[:2], leaves[2:], empty, strict=True)
        sides = [
            Partial(out.masked_fill(none[:, None], 0.0), lse.masked_fill(none, -math.inf)) for out, lse, none in sides
        ]
        out, lse = merge(*sides)
        assert lse[0] == -math.inf
        return out, lse[1:]

    assert torch.autograd.gradcheck(through, (*outs, *scores))


@ways
@pytest.mark.parametrize("queries", [0, 1, 3])
def test_without_keys_there_is_the_identity_and_a_gradient_of_zero(way, queries):
    tensors = [tensor.requires_grad_() for tensor in qkv(2, 4, 2, queries, 0)]
    part = way(*tensors)  # the kernel itself would end the process
    same(part, Partial.empty(2, 4, queries, 4, dtype=torch.float64), rtol=0, atol=0)
    part.out.sum().backward()
    assert not any(tensor.grad is not None and tensor.grad.any() for tensor in tensors)


@ways
def test_a_row_that_may_attend_to_nothing_is_the_identity(way):
    tensors = [tensor.requires_grad_() for tensor in qkv(2, 4, 2, 3, 5)]
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    out, lse = way(*tensors, mask=mask)
    assert not out[:, :, 1].any()
    assert (lse[:, :, 1] == -math.inf).all()
    other = attend_reference(*tensors)
    torch.testing.assert_close(out[:, :, [0, 2]], other.out[:, :, [0, 2]])
    (out[:, :, 1].sum() + lse[:, :, 0].sum()).backward()
    assert not tensors[0].grad[:, :, 1:].any()
    assert tensors[0].grad[:, :, 0].any()
    assert all(tensor.grad.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 30])
def test_half_precision(dtype, queries):
    tensors = qkv(2, 4, 2, queries, 300, dim=16, dtype=dtype)
    mask = normal(queries, 300, seed=5) > 0
    exact = attend_reference(*[tensor.double() for tensor in tensors], mask=mask)
    for way in (partial_attention, plain_partial_attention):
        part = way(*tensors, mask=mask)
        assert (part.out.dtype, part.lse.dtype) == (dtype, torch.float32)
        # one rounding of out to 8 bits (bfloat16), and weights of that precision inside the fused kernel
        same(part, Partial(exact.out, exact.lse), atol=0.01, rtol=0.01, check_dtype=False)


def test_a_chain_begun_in_fp32_stays_there_and_does_not_lose_the_small():
    half = Partial(torch.ones(1, 1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16))
    total = Partial.empty(1, 1)
    for _ in range(1000):
        total = merge(total, half)
    assert (total.out.dtype, total.lse.dtype) == (torch.float32, torch.float32)
    assert total.lse.item() == pytest.approx(math.log(1000), abs=1e-4)  # in bfloat16 it would stop at log(256)
    parts = [partial_attention(*qkv(1, 2, 1, 3, 5, seed=seed, dtype=torch.bfloat16)) for seed in range(2)]
    assert merge(*parts).out.dtype == torch.float32


@ways
def test_autocast_does_not_lower_the_precision(way):
    tensors = qkv(2, 4, 2, 3, 50, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = way(*tensors)
    same(cast, way(*tensors), atol=0, rtol=0)


def test_the_definition_serves_only_where_the_kernel_does_not(monkeypatch):
    served = []
    plain = module.plain_partial_attention
    monkeypatch.setattr(module, "plain_partial_attention", lambda *a, **o: served.append(1) or plain(*a, **o))
    q, k, v = qkv(1, 4, 2, 3, 5)
    for call in [(q, k, v), (q[:, :, :1], k, v), (q.requires_grad_(), k, v)]:
        partial_attention(*call, mask=torch.ones(5, dtype=torch.bool))
    assert not served
    for call in [(q, k, v[..., :3]), (q.float(), k, v), (q.float(), k.float(), v)]:
        expected = attend_reference(*[tensor.double() for tensor in call])
        same(partial_attention(*call), Partial(expected.out, expected.lse), check_dtype=False, atol=1e-5, rtol=1e-5)
    assert len(served) == 3


def unchecked(function):
    """Without the annotation check of the tests, which would refuse the same input before the function does."""
    return getattr(function, "__wrapped__", function)


ones = torch.ones(2, 3, dtype=torch.bool)


@ways
@pytest.mark.parametrize(
    ("shapes", "mask", "message"),
    [
        ([(3, 4), (1, 2, 3, 4), (1, 2, 3, 4)], None, "q, k, v must have 4 dimensions, got 2, 4, 4"),
        ([(1, 3, 2, 4), (1, 2, 3, 4), (1, 2, 3, 4)], None, "heads must be a multiple of kv_heads, got 3 and 2"),
        ([(1, 3, 2, 4), (1, 0, 3, 4), (1, 0, 3, 4)], None, "heads must be a multiple of kv_heads, got 3 and 0"),
        ([(1, 2, 2, 4), (2, 2, 3, 4), (2, 2, 3, 4)], None, r"agree in batch, keys and dim, got q \(1, 2, 2, 4\), k"),
        ([(1, 2, 2, 4), (1, 2, 3, 8), (1, 2, 3, 8)], None, "must agree in batch, keys and dim"),
        ([(1, 2, 2, 4), (1, 2, 3, 4), (1, 2, 4, 4)], None, "must agree in batch, keys and dim"),
        ([(1, 2, 2, 4), (1, 2, 3, 4), (1, 1, 3, 4)], None, "must agree in batch, keys and dim"),
        (None, ones.T, r"mask must broadcast to .* = \(1, 2, 2, 3\), got \(3, 2\)"),
        (None, ones.float(), r"mask must be boolean with up to 4 dimensions, got torch\.float32 with 2"),
        (None, ones.expand(1, 1, 1, 2, 3), "mask must be boolean with up to 4 dimensions, got torch.bool with 5"),
        (None, torch.tensor(True), "mask must be boolean with up to 4 dimensions, got torch.bool with 0"),
    ],
)
def test_wrong_shapes_are_refused_in_one_sentence(way, shapes, mask, message):
    tensors = [torch.zeros(shape) for shape in shapes or [(1, 2, 2, 4), (1, 2, 3, 4), (1, 2, 3, 4)]]
    with pytest.raises(ValueError, match=message):
        unchecked(way)(*tensors, mask=mask)


def test_a_merge_of_no_parts_is_refused():
    with pytest.raises(ValueError, match="parts must hold at least one Partial, got none"):
        merge_all([])
