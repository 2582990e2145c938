import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.attention.positions import rotary_half
from regard.attention.tree import tree_bytes, tree_map
from regard.blocks.softmax_attention import SoftmaxAttention


def mixer(dim: int = 16, num_heads: int = 2) -> SoftmaxAttention:
    torch.manual_seed(0)
    return SoftmaxAttention(dim, num_heads)


def in_chunks(attention, x, chunks):
    state, parts = None, []
    for chunk in x.split(chunks, dim=1):
        part, state = attention(chunk, state)
        parts.append(part)
    return torch.cat(parts, dim=1), state


def test_it_equals_softmax_attention_written_out():
    attention, x = mixer(), torch.randn(2, 7, 16)
    q, k, v = attention.in_proj(x).view(2, 7, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = rotary_half(q, torch.arange(7)), rotary_half(k, torch.arange(7))
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    expected = attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(attention(x)[0], expected, atol=1e-6)


@pytest.mark.parametrize("gradients", [True, False])
@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(0, 9), min_size=1, max_size=6), batch=st.integers(1, 3))
def test_any_chunks_equal_the_whole_in_outputs_and_state(gradients, chunks, batch):
    attention, x = mixer(), torch.randn(batch, sum(chunks), 16)
    with torch.set_grad_enabled(gradients):
        whole, end = attention(x)
        parts, state = in_chunks(attention, x, chunks)
        again, _ = attention(x, attention.initial(batch))
    assert torch.allclose(parts, whole, atol=1e-5) and torch.equal(again, whole)
    assert state.keys.shape == end.keys.shape == (batch, 2, sum(chunks), 8)
    assert torch.allclose(state.keys, end.keys, atol=1e-5) and torch.allclose(state.values, end.values, atol=1e-5)


def test_no_output_sees_a_later_token():
    attention, x = mixer(), torch.randn(1, 6, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(x)[0][0, 3].sum(), x)
    assert (gradient[0, :4] != 0).any(dim=-1).all() and (gradient[0, 4:] == 0).all()


def test_gradients_flow_through_the_state():
    attention, first = mixer(), torch.randn(1, 3, 16, requires_grad=True)
    _, state = attention(first)
    attention(torch.randn(1, 2, 16), state)[0].sum().backward()
    assert first.grad is not None and (first.grad != 0).any(dim=-1).all()


@torch.no_grad()
def test_a_state_that_is_read_on_from_twice_stays_as_it_was():
    attention = mixer()
    _, start = attention(torch.randn(1, 5, 16))
    kept = tree_map(torch.clone, start)
    one, other = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    _, after_one = attention(one, start)
    expected = tree_map(torch.clone, after_one)
    attention(other, start)
    for now, before in zip((*start, *after_one), (*kept, *expected), strict=True):
        assert torch.equal(now, before)


@torch.no_grad()
def test_decoding_writes_into_buffers_that_double():
    attention, state, places = mixer(), None, []
    for _ in range(70):
        _, state = attention(torch.randn(1, 1, 16), state)
        places.append(state.keys.data_ptr())
    assert len(set(places)) <= 4  # room for 16, 32, 64, 128
    assert tree_bytes(state) == 2 * 70 * 16 * 4


@torch.no_grad()
def test_rows_of_a_state_can_be_picked_and_go_on():
    attention, x, more = mixer(), torch.randn(3, 4, 16), torch.randn(2, 1, 16)
    rows = torch.tensor([2, 0])
    _, state = attention(x)
    _, state = attention(x[:, :1], state)
    picked = tree_map(lambda part: part.index_select(0, rows), state)
    expected, _ = attention(torch.cat([x, x[:, :1]], dim=1)[rows])
    assert torch.allclose(picked.keys, attention(torch.cat([x, x[:, :1]], dim=1)[rows])[1].keys, atol=1e-6)
    whole, _ = attention(torch.cat([x[rows], x[rows, :1], more], dim=1))
    assert torch.allclose(attention(more, picked)[0], whole[:, -1:], atol=1e-5)
    assert expected.shape == (2, 5, 16)


def test_a_prompt_read_in_inference_mode_can_go_on_outside_of_it():
    attention, x = mixer(), torch.randn(1, 4, 16)
    with torch.inference_mode():
        _, state = attention(x[:, :3])
    with torch.no_grad():
        last, _ = attention(x[:, 3:], state)
        assert torch.allclose(last, attention(x)[0][:, 3:], atol=1e-6)


def test_half_precision_and_an_empty_sequence():
    attention = mixer().bfloat16()
    y, state = attention(torch.randn(2, 5, 16).bfloat16())
    assert y.dtype == state.keys.dtype == torch.bfloat16 and y.isfinite().all()
    y, same = attention(torch.randn(2, 0, 16).bfloat16(), state)
    assert y.shape == (2, 0, 16) and torch.equal(same.keys, state.keys)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="dim must be a positive multiple of 2 \\* num_heads, got dim 6, num_heads 2"):
        SoftmaxAttention(6, 2)
