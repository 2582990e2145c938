import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.blocks.convolution import CausalConvolution


@settings(max_examples=30, deadline=None)
@given(
    chunks=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    kernel=st.integers(1, 4),
    bias=st.booleans(),
    batch=st.integers(1, 3),
)
def test_any_chunks_equal_the_whole_in_outputs_and_state(chunks, kernel, bias, batch):
    torch.manual_seed(0)
    convolution = CausalConvolution(5, kernel, bias)
    x = torch.randn(batch, sum(chunks), 5)
    whole, end = convolution(x)
    state, parts = convolution.initial(batch), []
    for chunk in x.split(chunks, dim=1):
        part, state = convolution(chunk, state)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-6)
    assert state.shape == (batch, kernel - 1, 5) and torch.equal(state, end)


def test_a_worked_value():
    convolution = CausalConvolution(1, 3)
    with torch.no_grad():
        convolution.conv.weight.copy_(torch.tensor([[[100.0, 10.0, 1.0]]]))  # the last weight meets the token itself
    y, state = convolution(torch.tensor([[[1.0], [2.0], [3.0]]]))
    assert y.flatten().tolist() == [1, 12, 123]
    assert state.flatten().tolist() == [2, 3]


def test_no_output_sees_a_later_token_or_another_channel():
    convolution = CausalConvolution(3, 4)
    x = torch.randn(1, 9, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(convolution(x)[0][0, 5, 1], x)
    touched = gradient[0].nonzero().tolist()
    assert touched == [[token, 1] for token in (2, 3, 4, 5)]


def test_gradients_flow_through_the_state():
    convolution = CausalConvolution(2, 3)
    state = convolution.initial(1).requires_grad_()
    convolution(torch.randn(1, 1, 2), state)[0].sum().backward()
    assert state.grad is not None and (state.grad != 0).all()


def test_half_precision_and_an_empty_sequence():
    convolution = CausalConvolution(4, 3).bfloat16()
    y, state = convolution(torch.randn(2, 6, 4).bfloat16())
    assert y.dtype == state.dtype == torch.bfloat16 and y.isfinite().all()
    y, same = convolution(torch.randn(2, 0, 4).bfloat16(), state)
    assert y.shape == (2, 0, 4) and torch.equal(same, state)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="dim and kernel must be at least 1, got dim 4 and kernel 0"):
        CausalConvolution(4, 0)
