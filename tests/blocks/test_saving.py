"""Models survive their folder, and one that does not fit is refused."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from regard.blocks.saving import WEIGHTS, Saved


@dataclass(frozen=True)
class Config:
    dim: int = 3
    tied: bool = True


class Tied(nn.Module, Saved):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(5, config.dim)
        self.head = nn.Linear(config.dim, 5, bias=False)
        self.register_buffer("mean", torch.zeros(2))
        if config.tied:
            self.head.weight = self.embedding.weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_survives_its_folder(tmp_path, tied, dtype):
    model = Tied(Config(tied=tied)).to(dtype)
    model.mean.fill_(2)
    model.save_pretrained(tmp_path)
    loaded = Tied.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight) and loaded.state_dict()[name].dtype == dtype
    assert (loaded.head.weight is loaded.embedding.weight) is tied
    assert loaded.head.weight.requires_grad


def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path):
    Tied(Config()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"dim": 4, "tied": true}')
    with pytest.raises(ValueError, match=r"is not of this Tied: embedding.weight must be \(5, 4\), got \(5, 3\)"):
        Tied.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"dim": 3, "tied": false}')
    with pytest.raises(ValueError, match=r"is not of this Tied: (head|embedding).weight must be \(5, 3\), got none"):
        Tied.from_pretrained(tmp_path)
    weights = tmp_path / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(ValueError, match="is damaged"):
        Tied.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no Tied: model\.safetensors is missing"):
        Tied.from_pretrained(tmp_path)
