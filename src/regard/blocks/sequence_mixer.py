"""The contract of a causal sequence mixer, which every room of that kind follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

State = Any
"""A NamedTuple of batch-first tensors, accumulators in fp32. A rolling state carries `seen`: positions need it."""


class SequenceMixer(nn.Module, ABC):
    """Mixes tokens along a sequence, whole or in chunks of any length, carrying a state between chunks.

    The laws, held by `tests/laws/test_mixers.py` for the examples of every room that provides a mixer: feeding a
    sequence in any chunks (lengths 0 and 1 included) equals feeding it whole, in outputs and in the final state;
    `forward(x)` equals `forward(x, initial)`; no output depends on a later token; gradients flow through the state.
    A mixer that breaks one of them says so in `exempt`, and is held to the rest. One batch has one length.
    """

    exempt: frozenset[str] = frozenset()
    """Names out of {"chunk_invariance", "causality"} of the laws that the paper's mechanism does not obey."""

    @abstractmethod
    def initial(self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        """The state before any token; it may be learnt."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "batch tokens dim"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], State]:
        """The mixed tokens, and the state after the last of them."""
