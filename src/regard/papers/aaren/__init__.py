"""Attention as an RNN: softmax attention with a learnt constant query; a scan to train, O(1) per token to stream."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from regard.blocks.sequence_mixer import SequenceMixer
from regard.papers.aaren.heads import (
    DecisionModel,
    DecisionModelConfig,
    EventModel,
    EventModelConfig,
    Forecaster,
    ForecasterConfig,
    NextEvent,
    SeriesClassifier,
    SeriesClassifierConfig,
)
from regard.papers.aaren.mixer import Aaren, AarenAttention, read_in_blocks
from regard.papers.aaren.model import AarenStack, StackConfig, StackState, TransformerStack, published

__all__ = [
    "EXAMPLES",
    "MIXERS",
    "Aaren",
    "AarenAttention",
    "AarenStack",
    "DecisionModel",
    "DecisionModelConfig",
    "EventModel",
    "EventModelConfig",
    "Forecaster",
    "ForecasterConfig",
    "NextEvent",
    "SeriesClassifier",
    "SeriesClassifierConfig",
    "StackConfig",
    "StackState",
    "TransformerStack",
    "published",
    "read_in_blocks",
]

MIXERS: dict[str, Callable[[int], SequenceMixer]] = {"aaren": lambda dim: AarenAttention(dim)}

_TINY = asdict(published["tiny"])

EXAMPLES: dict[str, Callable[[], Any]] = {
    "AarenAttention": lambda: AarenAttention(dim=16, num_heads=4),
    "AarenStack": lambda: AarenStack(published["tiny"]),
    "TransformerStack": lambda: TransformerStack(published["tiny"]),
    "SeriesClassifier": lambda: SeriesClassifier(SeriesClassifierConfig(**_TINY, features=2)),
    "Forecaster": lambda: Forecaster(ForecasterConfig(**_TINY, horizon=4)),
    "EventModel": lambda: EventModel(EventModelConfig(**_TINY, marks=3)),
    "DecisionModel": lambda: DecisionModel(DecisionModelConfig(**_TINY, state_dim=3, action_dim=2)),
}
