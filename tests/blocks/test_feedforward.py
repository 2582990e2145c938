import pytest
import torch

from regard.blocks.feedforward import SwiGLU, round_up


def test_a_worked_value():
    net = SwiGLU(1, hidden=1)
    with torch.no_grad():
        net.fc1.weight.copy_(torch.tensor([[3.0], [2.0]]))  # value, then gate
        net.fc2.weight.fill_(0.5)
    gate = torch.tensor(2.0)
    assert torch.allclose(net(torch.ones(1, 1)), 0.5 * 3 * gate * gate.sigmoid())


def test_rows_are_independent_and_of_any_number():
    net, x = SwiGLU(8, hidden=16), torch.randn(2, 5, 8)
    assert torch.allclose(net(x)[:, 2:3], net(x[:, 2:3]), atol=1e-6)
    assert net(x[:, :0]).shape == (2, 0, 8)


def test_the_default_hidden_width_has_the_parameters_of_a_plain_net():
    parameters = sum(weight.numel() for weight in SwiGLU(96).parameters())
    assert parameters == 2 * 4 * 96 * 96
    assert all(name.endswith("weight") for name in SwiGLU(8).state_dict())


def test_round_up():
    assert [round_up(n, 256) for n in (1, 256, 257)] == [256, 256, 512]


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="dim and hidden must be at least 1, got dim 8 and hidden 0"):
        SwiGLU(8, hidden=0)
