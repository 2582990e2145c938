"""gathered_attention: every layout, grouping and mask gives what the definition gives, and reads nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.attention import gathered as module
from regard.attention.attend import attend
from regard.attention.gathered import gathered_attention, gathered_attention_reference


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def positions(batch: int, groups: int, chosen: int, keys: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(keys, (batch, groups, chosen), generator=torch.Generator().manual_seed(seed))


def contiguous(batch, heads, keys, dim, seed):
    return normal(batch, heads, keys, dim, seed=seed)


def slice_of_a_buffer(batch, heads, keys, dim, seed):
    return normal(batch, heads, keys + 3, dim, seed=seed)[:, :, :keys]


def later_slice(batch, heads, keys, dim, seed):
    return normal(batch + 1, heads + 1, keys + 3, dim, seed=seed)[1:, 1:, 2 : 2 + keys]


def every_second(batch, heads, keys, dim, seed):
    return normal(batch, heads, 2 * keys, dim, seed=seed)[:, :, ::2]


def transposed(batch, heads, keys, dim, seed):
    return normal(batch, keys, heads, dim, seed=seed).transpose(1, 2)


def interleaved_keys_and_values(batch, heads, keys, dim, seed):
    return normal(batch, heads, keys, 2 * dim, seed=seed)[..., dim:]


def same_for_the_batch(batch, heads, keys, dim, seed):
    return normal(1, heads, keys, dim, seed=seed).expand(batch, -1, -1, -1)


def ragged_rows(batch, heads, keys, dim, seed):
    return normal(batch, heads, keys, dim + 1, seed=seed)[..., :dim]


def reversed_axes(batch, heads, keys, dim, seed):
    return normal(batch, heads, dim, keys, seed=seed).mT


tables = [
    contiguous,
    slice_of_a_buffer,
    later_slice,
    every_second,
    transposed,
    interleaved_keys_and_values,
    same_for_the_batch,
]
no_tables = [ragged_rows, reversed_axes]


@st.composite
def calls(draw):
    """Small tensors of any shape and layout, choices with repetitions, and masks that may hide whole rows."""
    batch, kv_heads, sharing = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    keys, chosen = draw(st.integers(1, 7)), draw(st.integers(0, 9))
    dim, value_dim, seed = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(0, 99))
    heads = kv_heads * sharing
    groups = draw(st.sampled_from([heads, kv_heads]))
    q = normal(batch, heads, 1, dim, seed=seed)
    k = draw(st.sampled_from(tables + no_tables))(batch, kv_heads, keys, dim, seed + 1)
    v = draw(st.sampled_from(tables + no_tables))(batch, kv_heads, keys, value_dim, seed + 2)
    index = positions(batch, groups, chosen, keys, seed).to(draw(st.sampled_from([torch.int64, torch.int32])))
    mask = normal(batch, groups, chosen, seed=seed) > draw(st.sampled_from([0, 1])) if draw(st.booleans()) else None
    return (q, k, v, index), dict(mask=mask, scale=draw(st.sampled_from([None, 0.3])))


@settings(max_examples=150)
@given(call=calls())
def test_every_layout_and_grouping_equals_the_definition(call):
    tensors, options = call
    expected = gathered_attention_reference(*tensors, **options)
    torch.testing.assert_close(gathered_attention(*tensors, **options), expected)


@settings(max_examples=50)
@given(call=calls())
def test_the_definition_equals_each_head_attending_to_its_keys(call):
    (q, k, v, index), options = call
    out = gathered_attention_reference(q, k, v, index, **options)
    batch, heads = q.shape[:2]
    for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).tolist():
        group, kv_head = h * index.shape[1] // heads, h * k.shape[1] // heads
        seen = index[b, group] if options["mask"] is None else index[b, group][options["mask"][b, group]]
        chosen_k, chosen_v = k[b, kv_head, seen], v[b, kv_head, seen]
        expected = attend(q[b, h][None, None], chosen_k[None, None], chosen_v[None, None], scale=options["scale"])
        torch.testing.assert_close(out[b, h], expected[0, 0])


@pytest.mark.parametrize("layout", tables, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_a_table_of_rows_is_read_without_the_definition(layout, groups, masked, monkeypatch):
    q, k, v = normal(3, 6, 1, 8), layout(3, 2, 20, 8, 1), layout(3, 2, 20, 4, 2)
    index = positions(3, groups, 7, 20)
    mask = normal(3, groups, 7) > 0.5 if masked else None
    expected = gathered_attention_reference(q, k, v, index, mask=mask)
    monkeypatch.setattr(module, "gathered_attention_reference", None)
    torch.testing.assert_close(gathered_attention(q, k, v, index, mask=mask), expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("groups", ["heads", "kv_heads"])
def test_choosing_every_position_is_full_attention(kv_heads, groups):
    q, k, v = normal(2, 6, 1, 8), normal(2, kv_heads, 30, 8, seed=1), normal(2, kv_heads, 30, 5, seed=2)
    everything = torch.randperm(30).expand(2, 6 if groups == "heads" else kv_heads, -1)
    torch.testing.assert_close(gathered_attention(q, k, v, everything), attend(q, k, v))


def test_worked_values():
    q, k = torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 3, 1)
    v = torch.tensor([3.0, 6.0, 12.0]).view(1, 1, 3, 1)
    assert gathered_attention(q, k, v, torch.tensor([[[0, 2]]])).flatten().tolist() == [7.5, 7.5]
    index = torch.tensor([[[0, 0, 1], [2, 1, 1]]])  # equal scores, and a position chosen twice counts twice
    assert gathered_attention(q, k, v, index).flatten().tolist() == pytest.approx([4, 8])
    mask = torch.tensor([[[True, False, True], [False, False, False]]])
    assert gathered_attention(q, k, v, index, mask=mask).flatten().tolist() == pytest.approx([4.5, 0])


def test_nothing_chosen_gives_zeros():
    q, k, v = normal(2, 4, 1, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 3)
    for keys in (5, 0):
        out = gathered_attention(q, k[:, :, :keys], v[:, :, :keys], torch.zeros(2, 2, 0, dtype=torch.int64))
        assert out.shape == (2, 4, 1, 3)
        assert not out.any()


def test_what_the_positions_do_not_name_is_not_read():
    q, k, v = normal(2, 4, 1, 8), normal(2, 2, 9, 8), normal(2, 2, 9, 8)
    index = positions(2, 2, 5, 8)
    expected = gathered_attention(q, k, v, index)
    k[:, :, 8], v[:, :, 8] = torch.nan, torch.nan
    torch.testing.assert_close(gathered_attention(q, k, v, index), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision(dtype, groups, masked):
    tensors = [normal(2, heads, tokens, 64, seed=heads, dtype=dtype) for heads, tokens in ((4, 1), (2, 500), (2, 500))]
    index = positions(2, groups, 300, 500)
    mask = normal(2, groups, 300) > 0 if masked else None
    out = gathered_attention(*tensors, index, mask=mask, scale=1.0)  # scores so large that rounding them would show
    exact = gathered_attention_reference(*[tensor.double() for tensor in tensors], index, mask=mask, scale=1.0)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=4 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_finite_and_those_of_attention_over_the_chosen(groups, masked):
    leaves = [normal(2, heads, tokens, 3, dtype=torch.float64) for heads, tokens in ((4, 1), (2, 6), (2, 6))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    index = positions(2, groups, 8, 6)
    mask = torch.arange(2)[:, None, None].expand_as(index) == 1 if masked else None  # the first row sees nothing
    ours = torch.autograd.grad(gathered_attention(*leaves, index, mask=mask).square().sum(), leaves)
    q, k, v = leaves
    times = torch.nn.functional.one_hot(index, 6).sum(2).repeat_interleave(4 // groups, 1)[:, :, None]
    bias = times.double().log()
    mask = None if mask is None else mask.repeat_interleave(4 // groups, 1)[..., None, :1]
    expected = torch.autograd.grad(attend(q, k, v, bias=bias, mask=mask).square().sum(), leaves)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs)


def test_mixed_dtypes_come_back_in_that_of_the_query():
    q, k, v = normal(1, 2, 1, 4), normal(1, 2, 5, 4, seed=1), normal(1, 2, 5, 4, seed=2)
    index = positions(1, 2, 3, 5)
    out = gathered_attention(q, k.double(), v.double(), index)
    torch.testing.assert_close(out, gathered_attention(q, k, v, index))


@pytest.mark.parametrize("position", [-1, 5])
def test_a_position_that_is_not_there_is_refused_on_cpu(position):
    """Also where the memory goes on, with another head or an unused slot."""
    q, k = normal(1, 2, 1, 4), normal(1, 2, 9, 4)[:, :, :5]
    index = torch.tensor([[[0, 1], [2, position]]])
    with pytest.raises(IndexError, match=f"index must be positions from 0 to 4, got {position}"):
        gathered_attention(q, k, k, index)


SHAPES = {"q": (1, 4, 1, 4), "k": (1, 2, 5, 4), "v": (1, 2, 5, 4), "index": (1, 2, 3)}
yes = torch.ones(1, 2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("shapes", "mask", "error", "message"),
    [
        ({"q": (1, 4, 4)}, None, ValueError, "must have 4 dimensions and index 3, got 3, 4, 4 and 3"),
        ({"index": (2, 3)}, None, ValueError, "must have 4 dimensions and index 3, got 4, 4, 4 and 2"),
        ({"q": (1, 4, 2, 4)}, None, ValueError, "must be one query per head, got 2"),
        ({"q": (1, 4, 1, 8)}, None, ValueError, r"must agree in batch, kv_heads, keys and dim, got q \(1, 4, 1, 8\)"),
        ({"v": (1, 2, 6, 4)}, None, ValueError, r"must agree in .*, v \(1, 2, 6, 4\)"),
        ({"index": (2, 2, 3)}, None, ValueError, r"must agree in .*, index \(2, 2, 3\)"),
        ({"q": (1, 3, 1, 4)}, None, ValueError, "multiple of kv_heads, got 3 heads and 2 kv_heads"),
        ({"index": (1, 3, 3)}, None, ValueError, "a group for each of 2 kv_heads or 4 heads, got 3"),
        ({"index": (1, 1, 3)}, None, ValueError, "a group for each of 2 kv_heads or 4 heads, got 1"),
        ({}, yes[:, :1], ValueError, r"mask must have the shape of index, \(1, 2, 3\), got \(1, 1, 3\)"),
        ({}, yes.float(), TypeError, r"mask must be boolean \(True = may attend\), got torch\.float32"),
    ],
)
@pytest.mark.parametrize("function", [gathered_attention, gathered_attention_reference])
def test_wrong_input_is_refused_in_one_sentence(function, shapes, mask, error, message):
    q, k, v, index = (torch.zeros(shape) for shape in (SHAPES | shapes).values())
    unchecked = getattr(function, "__wrapped__", function)  # the tests check annotations, which would refuse it first
    with pytest.raises(error, match=message):
        unchecked(q, k, v, index.long(), mask=mask)
