"""Attention as an RNN: softmax attention with a learnt constant query; a scan to train, O(1) per token to stream."""

from collections.abc import Callable
from typing import Any

from regard.blocks.sequence_mixer import SequenceMixer
from regard.papers.aaren.mixer import Aaren, AarenAttention, read_in_blocks
from regard.papers.aaren.model import AarenStack, StackConfig, TransformerStack, published

__all__ = [
    "EXAMPLES",
    "MIXERS",
    "Aaren",
    "AarenAttention",
    "AarenStack",
    "StackConfig",
    "TransformerStack",
    "published",
    "read_in_blocks",
]

MIXERS: dict[str, Callable[[int], SequenceMixer]] = {"aaren": lambda dim: AarenAttention(dim)}

EXAMPLES: dict[str, Callable[[], Any]] = {
    "AarenAttention": lambda: AarenAttention(dim=16, num_heads=4),
    "AarenStack": lambda: AarenStack(published["tiny"]),
    "TransformerStack": lambda: TransformerStack(published["tiny"]),
}
