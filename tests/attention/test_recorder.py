"""The recorder: files weights by module name, leaves the model as it was, and draws them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard.attention.attend import attend, attend_reference
from regard.attention.masks import causal
from regard.attention.recorder import attention_map, record


class Head(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attend(x, x, x, mask=causal())


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = Head(), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.attn(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor, fail: bool = False) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        if fail:
            raise RuntimeError("the model broke")
        return attend(x, x, x)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))


def test_weights_are_filed_under_the_innermost_module(x):
    model = Model()
    with record(model) as recording:
        recorded = model(x)
    assert list(recording.weights) == ["layers.0.attn", "layers.1.attn", ""]
    expected = attend_reference(x, x, x, mask=causal()).weights
    torch.testing.assert_close(recording.weights["layers.0.attn"], expected)
    torch.testing.assert_close(model(x), recorded)
    assert len(recording.calls["layers.0.attn"]) == 1  # the second forward ran after the block


def test_patterns_choose_modules_and_calls_are_kept_in_order(x):
    model = Model()
    with record(model, "layers.1.*") as recording:
        model(x)
        model(x[:, :, :2])
    assert list(recording.calls) == ["layers.1.attn"]
    assert [weights.shape for weights in recording.calls["layers.1.attn"]] == [(2, 3, 5, 5), (2, 3, 2, 2)]
    assert recording.weights["layers.1.attn"].shape == (2, 3, 2, 2)
    with pytest.raises(ValueError, match=r"no module is called 'layer\.0'; the model has layers, layers\.0, "):
        record(model, "layer.0").__enter__()


def test_without_a_model_calls_are_filed_under_attend(x):
    with record() as recording:
        attend(x, x, x)
        Model()(x)
    assert [len(calls) for calls in recording.calls.values()] == [4]
    assert list(recording.weights) == ["attend"]
    assert not recording.weights["attend"].requires_grad


def test_an_exception_leaves_no_hook_and_no_recording(x):
    model = Model()
    with record(model, "") as recording, pytest.raises(RuntimeError, match="the model broke"):
        model(x, fail=True)
    assert recording.name == "attend"  # nothing is thought to be running still
    with pytest.raises(RuntimeError, match="the model broke"), record(model):
        model(x, fail=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(x)
    assert not recording.calls


def test_recordings_nest_and_the_inner_one_records(x):
    model = Model()
    with record(model) as outer:
        with record(model) as inner:
            model(x)
        assert not outer.calls
        model(x)
    assert list(inner.calls) == list(outer.calls) == ["layers.0.attn", "layers.1.attn", ""]
    assert len(outer.calls["layers.0.attn"]) == len(inner.calls["layers.0.attn"]) == 1


def test_the_map_draws_a_panel_per_head_and_names_keys_and_queries(x, tmp_path):
    weights = attend_reference(x[:1, :, 3:], x[:1], x[:1], mask=causal()).weights[0]
    figure = attention_map(weights, labels=["a", "b", "c", "d", "e"])
    figure.savefig(tmp_path / "map.png")
    panels = [axis for axis in figure.axes if axis.get_title().startswith("head")]
    assert len(panels) == 3
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["a", "b", "c", "d", "e"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["d", "e"]
    assert torch.equal(torch.as_tensor(panels[1].images[0].get_array().data), weights[1])


def test_the_map_refuses_batches_and_wrong_labels():
    with pytest.raises(ValueError, match=r"labels must name all 3 keys, and no more queries than keys, got 2 labels"):
        attention_map(torch.zeros(2, 3), labels=["a", "b"])
    long = attention_map(torch.zeros(500, 500), labels=[str(token) for token in range(500)])
    assert len(long.axes[0].get_xticks()) <= 40
