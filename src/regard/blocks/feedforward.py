"""The feed-forward parts of a decoder block."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


class SwiGLU(nn.Module):
    """A two-layer feed-forward net whose hidden values are gated by SiLU; no biases.

    `fc1` holds value and gate side by side, the value first. Without `hidden` the net has about the parameters of a
    plain one of hidden width `4 * dim`: two thirds of that, rounded up to a multiple of 8.

    Source: "GLU Variants Improve Transformer" (Shazeer, 2020), eq. 6.
    """

    def __init__(self, dim: int, hidden: int | None = None):
        super().__init__()
        hidden = round_up(8 * dim // 3, 8) if hidden is None else hidden
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim and hidden must be at least 1, got dim {dim} and hidden {hidden}")
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """Each row, transformed on its own."""
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))
