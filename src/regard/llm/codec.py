"""How a cache stores keys and values: as they come, or as small integers with a scale for every token and head."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from typing_extensions import override

BITS = 8, 4
"""Bits of a stored number, where it is not stored as it comes."""


class Codec(ABC):
    """Turns the vector of one token and head into a row of a buffer, and back.

    Every row stands for itself, so that a policy may move, gather and drop rows without knowing what is in them.
    """

    @abstractmethod
    def encode(self, vectors: Float[Tensor, "*slots dim"]) -> Shaped[Tensor, "*slots stored"]:
        """The rows that stand for the vectors."""

    @abstractmethod
    def decode(self, rows: Shaped[Tensor, "*slots stored"], dtype: torch.dtype) -> Float[Tensor, "*slots dim"]:
        """The vectors, as far as the rows tell them."""

    @abstractmethod
    def row_bytes(self, dim: int, itemsize: int) -> int:
        """Bytes of a row that stands for `dim` numbers of `itemsize` bytes."""


class AsIs(Codec):
    """Rows are the vectors themselves."""

    @override
    def encode(self, vectors: Float[Tensor, "*slots dim"]) -> Shaped[Tensor, "*slots stored"]:
        return vectors

    @override
    def decode(self, rows: Shaped[Tensor, "*slots stored"], dtype: torch.dtype) -> Float[Tensor, "*slots dim"]:
        return rows

    @override
    def row_bytes(self, dim: int, itemsize: int) -> int:
        return dim * itemsize


class Integers(Codec):
    """Rows are unsigned integers of `bits` bits, and the scale and smallest value of the row behind them.

    The format is PyTorch's for embedding tables: 8 bits with two fp32 numbers, 4 bits with two fp16 numbers, so that
    64 channels take 72 or 36 bytes. The largest error of a row is half a step: (its largest - its smallest) / 510, or
    / 30, and what rounding the two numbers adds.

    Raises ValueError where there is no such number of bits, and on an odd dimension at 4 bits.
    """

    def __init__(self, bits: int) -> None:
        if bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits}")
        self.bits = bits

    @override
    def encode(self, vectors: Float[Tensor, "*slots dim"]) -> Shaped[Tensor, "*slots stored"]:
        self.row_bytes(vectors.shape[-1], vectors.itemsize)
        table = vectors.reshape(-1, vectors.shape[-1]).float().cpu().contiguous()
        if not len(table):
            stored = self.row_bytes(vectors.shape[-1], vectors.itemsize)
            return vectors.new_empty(*vectors.shape[:-1], stored, dtype=torch.uint8)
        pack = (
            torch.ops.quantized.embedding_bag_byte_prepack
            if self.bits == 8
            else torch.ops.quantized.embedding_bag_4bit_prepack
        )
        rows: Tensor = pack(table)
        return rows.view(*vectors.shape[:-1], -1).to(vectors.device)

    @override
    def decode(self, rows: Shaped[Tensor, "*slots stored"], dtype: torch.dtype) -> Float[Tensor, "*slots dim"]:
        table = rows.reshape(-1, rows.shape[-1]).cpu().contiguous()
        if not len(table):
            dim = rows.shape[-1] - 8 if self.bits == 8 else 2 * (rows.shape[-1] - 4)
            return rows.new_empty(*rows.shape[:-1], dim, dtype=dtype)
        unpack = (
            torch.ops.quantized.embedding_bag_byte_unpack
            if self.bits == 8
            else torch.ops.quantized.embedding_bag_4bit_unpack
        )
        vectors: Tensor = unpack(table)
        return vectors.view(*rows.shape[:-1], -1).to(rows.device, dtype)

    @override
    def row_bytes(self, dim: int, itemsize: int) -> int:
        if self.bits == 8:
            return dim + 8
        if dim % 2:
            raise ValueError(f"keys and values at 4 bits must have an even number of channels, got {dim}")
        return dim // 2 + 4


AS_IS = AsIs()
"""The codec of every cache that is not told otherwise."""
