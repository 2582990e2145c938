"""A layer's cache split by heads: some keep every token, the others what a policy says."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from regard.attention.attend import attend
from regard.llm.cache import GrowingStore, KVLayer
from regard.llm.visible import Visible

Selection = slice | Int[Tensor, " chosen"] | None


class SplitLayer(KVLayer):
    """The cache of one layer in which some KV heads keep all tokens; a policy writes what the others do.

    `attend` of a policy ends in `attend_split`, which sends every KV head, with its query heads, to its part.
    """

    def __init__(self, keeps_all: Sequence[bool]) -> None:
        super().__init__()
        self.whole = selection([head for head, keeps in enumerate(keeps_all) if keeps])
        """The KV heads that keep all tokens; None where there is none."""
        self.reduced = selection([head for head, keeps in enumerate(keeps_all) if not keeps])
        """The other KV heads; None where there is none."""
        self.full = GrowingStore()

    @abstractmethod
    def attend_reduced(
        self,
        query: Float[Tensor, "batch heads queries dim"],
        key: Float[Tensor, "batch kv_heads queries dim"],
        value: Float[Tensor, "batch kv_heads queries dim_v"],
        visible: Visible,
        scale: float,
    ) -> Float[Tensor, "batch heads queries dim_v"]:
        """The attention of the heads that do not keep all tokens; stores of the new tokens what they keep."""

    def attend_whole(
        self,
        query: Float[Tensor, "batch heads queries dim"],
        key: Float[Tensor, "batch kv_heads queries dim"],
        value: Float[Tensor, "batch kv_heads queries dim_v"],
        visible: Visible,
        scale: float,
    ) -> Float[Tensor, "batch heads queries dim_v"]:
        """The attention of the heads that keep all tokens; stores the new ones."""
        keys, values = self.full.append(key, value)
        return attend(query, keys, values, mask=visible.over(), scale=scale)

    def attend_split(
        self,
        query: Float[Tensor, "batch heads queries dim"],
        key: Float[Tensor, "batch kv_heads queries dim"],
        value: Float[Tensor, "batch kv_heads queries dim_v"],
        visible: Visible,
        scale: float,
    ) -> Float[Tensor, "batch heads queries dim_v"]:
        """The attention of all heads, each computed by its part."""
        if self.reduced is None:
            return self.attend_whole(query, key, value, visible, scale)
        if self.whole is None:
            return self.attend_reduced(query, key, value, visible, scale)
        grouped = query.unflatten(1, (key.shape[1], -1))
        out = grouped.new_empty(*grouped.shape[:-1], value.shape[-1])
        for heads, part in ((self.whole, self.attend_whole), (self.reduced, self.attend_reduced)):
            of_part = grouped[:, heads]
            answer = part(of_part.flatten(1, 2), key[:, heads], value[:, heads], visible, scale)
            out[:, heads] = answer.view(*of_part.shape[:-1], -1)
        return out.flatten(1, 2)

    @override
    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back. Raises ValueError where the reduced heads have dropped what must come back."""
        removed = min(abs(tokens_to_remove), self.seen)
        if self.reduced is not None and removed:
            self.crop_reduced(removed)
        if self.whole is not None:
            self.full.crop(removed)
        self.seen -= removed

    @abstractmethod
    def crop_reduced(self, tokens: int) -> None:
        """Takes the last tokens back from what the reduced heads hold; raises ValueError where that cannot be done."""


def selection(heads: list[int]) -> Selection:
    """An index that picks the heads: a slice, which copies nothing, where they are evenly spaced; None for no head."""
    if not heads:
        return None
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if heads == list(range(heads[0], heads[-1] + 1, step)):
        return slice(heads[0], heads[-1] + 1, step)
    return torch.tensor(heads)
