"""The typed sections of a run that trains a δ-mem adapter on a frozen backbone (a YAML file with `delta_mem`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.config.schema import (
    AnomalySection,
    CheckpointSection,
    DebugSection,
    Directory,
    LoggingSection,
    Number,
    OptimizerSection,
    ParallelSection,
    RunSection,
    Share,
    TrainingSection,
    Weight,
)


@dataclass
class BackboneSection:
    """The frozen model."""

    dir: Directory = ""
    """Hugging Face directory (Llama, Qwen3, SmolLM families) with its tokenizer."""


@dataclass
class EpisodeSection:
    """Training data: set `train` (episodes) or `documents` (plain text)."""

    train: Directory = ""
    """JSONL of {"messages": [...]} or {"context", "question", "answer"}: one episode a line."""
    valid: Directory = ""
    """The same, held out; "" = no validation."""
    documents: Directory = ""
    """Directory of tokenised shards (`dla data shards`, with the backbone's tokenizer): plain text, a loss on every
    token, the memory reset at each document."""
    num_streams: Annotated[int, Field(ge=1, le=2**20)] = 8
    """Logical readers of `documents`, constant over a run."""
    write_length: Annotated[int, Field(ge=2, le=2**24)] = 8192
    """Tokens of the write segment: the last ones of the context."""
    read_length: Annotated[int, Field(ge=2, le=2**24)] = 512
    """Tokens of the read segment: question and answer."""
    recent_messages: Number = 1
    """Messages before the answer that belong to the read segment."""
    in_prompt: Share = 0.0
    """Share of the training episodes whose text stays in the prompt, as where a chat is served: with a part of them the
    adapter learns not to harm answers that the model can read."""
    row_length: Annotated[int, Field(ge=0, le=2**25)] = 0
    """Tokens a row: several episodes may share one; 0 = write_length + read_length."""


@dataclass
class GateLossSection:
    """Auxiliary loss weight * (mean write gate of the tokens written in a micro-batch - target)^2, averaged over
    layers."""

    weight: Weight = 0.0
    """0 = off."""
    target: Share = 0.05


@dataclass
class DistillationSection:
    """A loss that keeps the predictions those of the frozen model, on prompts with their text (`episodes.in_prompt`)
    and on ordinary text ({"text": ...} lines of `episodes.train`)."""

    weight: Weight = 0.0
    """Of the mean KL divergence from the frozen model, in nats a token, beside the loss on the answers; 0 = off."""


def _optimizer() -> OptimizerSection:
    return OptimizerSection(lr=2e-4, min_lr_ratio=0.0, warmup_steps=7, weight_decay=0.0)


def _training() -> TrainingSection:
    return TrainingSection(steps=70, micro_batch_size=1, log_every=1, eval_every=0, save_every=0)


@dataclass
class AdapterRunConfig:
    """A whole run."""

    run: RunSection = field(default_factory=RunSection)
    backbone: BackboneSection = field(default_factory=BackboneSection)
    delta_mem: DeltaMemConfig = field(default_factory=DeltaMemConfig)
    episodes: EpisodeSection = field(default_factory=EpisodeSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    optimizer: OptimizerSection = field(default_factory=_optimizer)
    training: TrainingSection = field(default_factory=_training)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    anomalies: AnomalySection = field(default_factory=AnomalySection)
    gate_loss: GateLossSection = field(default_factory=GateLossSection)
    distillation: DistillationSection = field(default_factory=DistillationSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    debug: DebugSection = field(default_factory=DebugSection)
