"""Continuous batching: many requests on one model, each with a state of constant size in a fixed pool."""

from megatron_dla.serving.engine.config import EngineConfig
from megatron_dla.serving.engine.engine import Engine
from megatron_dla.serving.engine.handle import Completion, Handle
from megatron_dla.serving.engine.request import (
    EngineClosedError,
    EngineFullError,
    Event,
    Request,
    SamplingParams,
    TokenLogprob,
)  # fmt: skip
from megatron_dla.serving.engine.stats import SequenceBytes, Stats

__all__ = [
    "Completion", "Engine", "EngineClosedError", "EngineConfig", "EngineFullError", "Event", "Handle", "Request",
    "SamplingParams", "SequenceBytes", "Stats", "TokenLogprob",
]  # fmt: skip
