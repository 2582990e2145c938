"""Multi-query associative recall: look up, among pairs read earlier, the value of a key that comes again."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

IGNORED = -100
"""The label of positions that ask nothing; `torch.nn.functional.cross_entropy` leaves it out."""


def mqar(
    count: int,
    pairs: int,
    length: int = 128,
    vocab: int = 512,
    power: float = 0.01,
    generator: torch.Generator | None = None,
) -> tuple[Int64[Tensor, "count length"], Int64[Tensor, "count length"]]:
    """Token sequences, and the label of each position: the value to recall where a key is asked for, else -100.

    A sequence begins with its pairs, key then value. The rest is cut into slots of two positions; each key comes
    again at the first position of a slot of its own, drawn with a weight of `i ** (power - 1)` for slot i = 1, 2 ...,
    and every other position holds a random token. Keys are out of [1, vocab / 2) and values out of [vocab / 2, vocab),
    without repetition within a sequence.

    Raises ValueError where the pairs do not fit the length or the vocabulary.

    Source: "Zoology" (Arora et al., 2023), section 4 and appendix C; used by Based (2024), figure 2.
    """
    if count < 1 or pairs < 1:
        raise ValueError(f"count and pairs must be at least 1, got count {count} and pairs {pairs}")
    if length % 2 or length < 4 * pairs:
        raise ValueError(f"length must be even and at least 4 * pairs = {4 * pairs}, got {length}")
    if vocab % 2 or vocab // 2 - 1 < pairs:
        raise ValueError(f"vocab must be even and at least 2 * pairs + 2 = {2 * pairs + 2}, got {vocab}")

    def draw(first: int, last: int) -> Int64[Tensor, "count pairs"]:
        return torch.rand(count, last - first, generator=generator).argsort(dim=1)[:, :pairs] + first

    keys, values = draw(1, vocab // 2), draw(vocab // 2, vocab)
    slots = length // 2 - pairs
    weight = torch.arange(1, slots + 1, dtype=torch.float64) ** (power - 1)
    slot = weight.expand(count, slots).multinomial(pairs, generator=generator)
    asked = 2 * pairs + 2 * slot

    tokens = torch.randint(vocab, (count, length), generator=generator)
    tokens[:, : 2 * pairs] = torch.stack([keys, values], dim=2).flatten(1)
    tokens.scatter_(1, asked, keys)
    labels = torch.full_like(tokens, IGNORED).scatter_(1, asked, values)
    return tokens, labels
