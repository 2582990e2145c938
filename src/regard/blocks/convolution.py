"""A causal short convolution that can be carried on token by token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.blocks.sequence_mixer import SequenceMixer


class CausalConvolution(SequenceMixer):
    """A depthwise convolution along the tokens in which an output sees its own token and the `kernel - 1` before it.

    The state is the last `kernel - 1` inputs (zeros before the first token), oldest first, so a sequence may be fed
    in chunks of any length. Activation and gates are the caller's.
    """

    def __init__(self, dim: int, kernel: int, bias: bool = False):
        super().__init__()
        if dim < 1 or kernel < 1:
            raise ValueError(f"dim and kernel must be at least 1, got dim {dim} and kernel {kernel}")
        self.dim, self.past = dim, kernel - 1
        self.conv = nn.Conv1d(dim, dim, kernel, groups=dim, bias=bias)

    def initial(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "batch past dim"]:
        """The inputs before the first token: zeros."""
        weight = self.conv.weight
        return torch.zeros(batch, self.past, self.dim, device=device or weight.device, dtype=dtype or weight.dtype)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], state: Float[Tensor, "batch past dim"] | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch past dim"]]:
        """The convolved tokens, and the inputs that the next token will still see."""
        if state is None:
            state = self.initial(x.shape[0], x.device, x.dtype)
        if x.shape[1] == 0:  # torch refuses an input shorter than the kernel
            return x, state
        seen = torch.cat([state, x], dim=1)
        return self.conv(seen.mT).mT, seen[:, seen.shape[1] - self.past :]
