"""Positions: rotations keep norms and see distances only; codes and biases equal their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.attention.positions import (
    RelativeBias,
    alibi,
    alibi_slopes,
    rotary_half,
    rotary_interleaved,
    sinusoid,
)

rotaries = pytest.mark.parametrize("rotary", [rotary_half, rotary_interleaved])
seeds = st.integers(0, 2**31)
halves = st.integers(1, 8)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@rotaries
@given(seed=seeds, half=halves, batch=st.integers(0, 3), tokens=st.integers(0, 6))
def test_rotary_preserves_norms(rotary, seed, half, batch, tokens):
    x = random(batch, 2, tokens, 2 * half, seed=seed)
    torch.testing.assert_close(rotary(x, torch.arange(tokens) * 1000).norm(dim=-1), x.norm(dim=-1))


@rotaries
@given(seed=seeds, half=halves, shift=st.integers(-500, 500))
def test_rotary_scores_depend_on_distance_only(rotary, seed, half, shift):
    query, key = random(2, 5, 2 * half, seed=seed)
    here, there = torch.arange(5), torch.arange(5) + shift
    scores = rotary(query, here) @ rotary(key, here).T
    torch.testing.assert_close(rotary(query, there) @ rotary(key, there).T, scores)


@rotaries
def test_rotary_leaves_position_zero_and_moves_the_others(rotary):
    x = random(3, 4, seed=0)
    turned = rotary(x, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(turned[0], x[0])
    assert (turned[1:] - x[1:]).abs().amax() > 0.1


@given(seed=seeds, half=halves)
def test_the_two_rotaries_are_one_up_to_the_order_of_channels(seed, half):
    x, positions = random(2, 5, 2 * half, seed=seed), torch.tensor([3, 0, 9, 100, -4])
    order = torch.arange(2 * half).view(2, half).T.flatten()  # channel i of a pair, then channel i + half
    torch.testing.assert_close(rotary_interleaved(x[..., order], positions), rotary_half(x, positions)[..., order])


@rotaries
@given(seed=seeds, inner=st.lists(st.integers(1, 3), max_size=2))
def test_positions_per_batch_row_equal_the_rows_alone(rotary, seed, inner):
    x, positions = random(3, *inner, 4, 6, seed=seed), torch.randint(0, 99, (3, 4))
    rows = [rotary(row, row_positions) for row, row_positions in zip(x, positions, strict=True)]
    torch.testing.assert_close(rotary(x, positions), torch.stack(rows))


def test_rotary_worked_values():
    x, positions = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([1])
    cos, sin = [math.cos(1), math.cos(0.01)], [math.sin(1), math.sin(0.01)]  # angles 1 and 10000^(-1/2)
    pairs = [1 * cos[0] - 3 * sin[0], 2 * cos[1] - 4 * sin[1], 3 * cos[0] + 1 * sin[0], 4 * cos[1] + 2 * sin[1]]
    torch.testing.assert_close(rotary_half(x, positions), torch.tensor([pairs]))
    pairs = [1 * cos[0] - 2 * sin[0], 2 * cos[0] + 1 * sin[0], 3 * cos[1] - 4 * sin[1], 4 * cos[1] + 3 * sin[1]]
    torch.testing.assert_close(rotary_interleaved(x, positions), torch.tensor([pairs]))


@rotaries
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotary_in_half_precision_still_counts_far_positions(rotary, dtype):
    x, positions = random(4, 8, seed=0).to(dtype), torch.tensor([4095, 4096, 4097, 100_001])
    assert rotary(x, positions).dtype == dtype
    torch.testing.assert_close(rotary(x, positions).double(), rotary(x.double(), positions), atol=2e-2, rtol=2e-2)


@rotaries
def test_rotary_refuses_odd_dims_and_positions_of_other_shapes(rotary):
    with pytest.raises(ValueError, match="dim must be positive and even, got 3"):
        rotary(torch.zeros(2, 3), torch.arange(2))
    with pytest.raises(ValueError, match=r"positions must be \(tokens,\) or \(batch, tokens\) of x, got \(2, 4\)"):
        rotary(torch.zeros(3, 2, 4, 6), torch.zeros(2, 4))


@given(position=st.integers(0, 10_000), half=halves)
def test_sinusoid_equals_the_formula(position, half):
    code = sinusoid(torch.tensor(position), 2 * half)
    for pair in range(half):
        angle = position / 10000 ** (2 * pair / (2 * half))
        assert code[2 * pair].item() == pytest.approx(math.sin(angle), abs=2e-3)
        assert code[2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=2e-3)


def test_sinusoid_codes_rows_of_any_shape_and_products_see_distances_only():
    codes = sinusoid(torch.arange(12).view(3, 4), 8)
    assert codes.shape == (3, 4, 8)
    gram = codes.flatten(0, 1) @ codes.flatten(0, 1).T
    torch.testing.assert_close(gram[1:, 1:], gram[:-1, :-1])
    with pytest.raises(ValueError, match="dim must be positive and even, got 0"):
        sinusoid(torch.arange(2), 0)


def test_alibi_slopes_are_those_of_the_paper():
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-power for power in range(1, 9)]))
    torch.testing.assert_close(alibi_slopes(16)[:2], torch.tensor([2.0**-0.5, 2.0**-1]))
    six = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    torch.testing.assert_close(alibi_slopes(6), six)
    with pytest.raises(ValueError, match="heads must be positive, got 0"):
        alibi_slopes(0)


def test_alibi_worked_values():
    bias = alibi(torch.tensor([0.5, 0.25]), torch.tensor([2, 3]), torch.tensor([0, 2, 3]))
    torch.testing.assert_close(bias[0], torch.tensor([[-1.0, 0.0, -0.5], [-1.5, -0.5, 0.0]]))
    torch.testing.assert_close(bias[1], bias[0] / 2)


def test_relative_bias_reads_its_table_by_clipped_distance():
    bias = RelativeBias(num_heads=2, max_distance=1)
    with torch.no_grad():
        bias.table.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    scores = bias(torch.tensor([0, 5]), torch.tensor([0, 1, 4, 5]))
    torch.testing.assert_close(scores[0], torch.tensor([[2.0, 3.0, 3.0, 3.0], [1.0, 1.0, 1.0, 2.0]]))
    scores[1].sum().backward()
    torch.testing.assert_close(bias.table.grad, torch.tensor([[0.0, 0.0, 0.0], [3.0, 2.0, 3.0]]))


def test_relative_bias_refuses_bad_sizes():
    with pytest.raises(ValueError, match="num_heads must be positive, got 0"):
        RelativeBias(0, 3)
    with pytest.raises(ValueError, match="max_distance must not be negative, got -1"):
        RelativeBias(2, -1)
