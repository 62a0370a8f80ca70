"""The typed sections of a run that trains a δ-mem adapter on a frozen backbone (a YAML file with `delta_mem`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.config.schema import DebugSection, OptimizerSection, ParallelSection, RunSection


@dataclass
class BackboneSection:
    """The frozen model."""

    dir: str = ""
    """Hugging Face directory (Llama, Qwen3, SmolLM families) with its tokenizer."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on CUDA, fp32 on a CPU. Adapter parameters, gates and states are fp32 always."""


@dataclass
class EpisodeSection:
    """What is written into the memory, and what is asked of it. Set `train` or `documents`."""

    train: str = ""
    """JSONL of {"messages": [...]} or {"context", "question", "answer"}: one episode a line."""
    valid: str = ""
    """The same, held out; "" = no validation."""
    documents: str = ""
    """Directory of tokenised shards (`dla data shards`, with the backbone's tokenizer): plain text, a loss on every
    token, the memory emptied at each document."""
    num_streams: int = 8
    """Logical readers of `documents`, fixed for the life of a run."""
    write_length: int = 8192
    """Tokens written before the question, the last ones of the context."""
    read_length: int = 512
    """Tokens of question and answer."""
    recent_messages: int = 1
    """Messages before the answer that stand in the read segment."""
    row_length: int = 0
    """Tokens a row: several episodes may share one; 0 = write_length + read_length."""


@dataclass
class AdapterTrainingSection:
    """Length, batch and rhythm, in optimizer steps and rows."""

    steps: int = 70
    global_batch_size: int = 32
    """Rows an optimizer step, over all processes."""
    micro_batch_size: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    zero_stage: int = 1
    """0, 1 or 2: the adapter is a few MB, ZeRO-3 would only cut it up."""
    offload_optimizer: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    gate_weight: float = 0.0
    """Weight of (mean gate of the tokens written in a micro batch - gate_target)^2, averaged over layers; 0 = off."""
    gate_target: float = 0.05
    log_every: int = 1
    eval_every: int = 0
    """Steps between validations on episodes.valid; the first is before step 1, the last after the end. 0 = never."""
    save_every: int = 0
    """Steps between checkpoints; the last step always saves."""
    keep_checkpoints: int = 2
    resume: bool = True


@dataclass
class AdapterRunConfig:
    """A whole run."""

    run: RunSection = field(default_factory=RunSection)
    backbone: BackboneSection = field(default_factory=BackboneSection)
    delta_mem: DeltaMemConfig = field(default_factory=DeltaMemConfig)
    episodes: EpisodeSection = field(default_factory=EpisodeSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    optimizer: OptimizerSection = field(
        default_factory=lambda: OptimizerSection(lr=2e-4, min_lr_ratio=0.0, warmup_steps=7, weight_decay=0.0)
    )
    training: AdapterTrainingSection = field(default_factory=AdapterTrainingSection)
    debug: DebugSection = field(default_factory=DebugSection)
