"""The model's own visibility rule and the batch's padding, evaluated wherever a cache still holds keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from regard.attention.masks import Mask, causal

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) absolute indices, broadcastable -> True where the query may see the key."""


class Visible:
    """Which positions the queries of one forward pass may see.

    Positions count every token of the padded sequence from 0, as transformers' masks do; the queries are the last
    `queries` of the `seen` positions so far. A model with sliding-window layers hands each layer its own rule.
    """

    def __init__(self, rule: Rule, first: int, queries: int, padding: Bool[Tensor, "batch seen"] | None, device: Any):
        self.rule = rule
        self.first = first
        """Position of the first query."""
        self.queries = queries
        self.padding = padding
        """False at padding tokens; None where no row has any."""
        self.device = device
        self._over: dict[int, Mask | Tensor | None] = {}

    @property
    def seen(self) -> int:
        """Positions so far, the queries included."""
        return self.first + self.queries

    @property
    def plain(self) -> bool:
        """Whether the rule is causal attention without padding, so that a query sees all that came before it."""
        return self.padding is None and self.rule is causal_mask_function

    def left_padding(self) -> Int[Tensor, " batch"] | None:
        """Padding tokens before each row's first token; None where no row has any."""
        if self.padding is None:
            return None
        return (self.padding.cumsum(1) == 0).sum(1)

    def over(self, start: int = 0) -> Mask | Bool[Tensor, "rows heads queries keys"] | None:
        """The mask over the consecutive positions from `start` to the last query: None where nothing is hidden.

        A causal mask without padding comes as `causal()`, for which attention has a faster path than for a tensor.
        """
        if start not in self._over:
            if self.plain:
                self._over[start] = None if self.queries == 1 else causal()
            else:
                mask = self.at(torch.arange(start, self.seen, device=self.device))
                self._over[start] = None if self.queries == 1 and bool(mask.all()) else mask
        return self._over[start]

    def at(
        self, positions: Int[Tensor, " keys"] | Int[Tensor, "rows heads keys"]
    ) -> Bool[Tensor, "rows heads queries keys"]:
        """The mask over keys held at any positions, in any order; an empty slot has position -1 and is hidden."""
        keys = positions[None, None, None, :] if positions.ndim == 1 else positions[:, :, None, :]
        rows = 1 if self.padding is None else self.padding.shape[0]
        row = torch.arange(max(rows, keys.shape[0]), device=self.device)[:, None, None, None]
        head = torch.arange(keys.shape[1], device=self.device)[None, :, None, None]
        query = torch.arange(self.first, self.seen, device=self.device)[None, None, :, None]
        held = keys.clamp(min=0)
        mask = self.rule(row, head, query, held) & (keys >= 0)
        if self.padding is not None:
            mask = mask & self.padding[row, held]
        return mask.expand(torch.broadcast_shapes(mask.shape, (1, 1, self.queries, keys.shape[-1])))
