"""The typed sections of a run. One YAML file is one run; every default is here, with its unit and its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Backbone = Literal["mamba2", "gdn"]
RopeType = Literal["default", "linear", "llama3"]


@dataclass
class RunSection:
    """Where the run lives and what makes it repeatable."""

    name: str = "run"
    """Directory under `dir`; holds config.yaml, metrics.jsonl, checkpoints/, plots/, hf/."""
    dir: str = "runs"
    seed: int = 1234
    """Initialisation and data order."""


@dataclass
class DataSection:
    """Tokenised WebDataset shards, as `dla data shards` writes them."""

    dir: str = ""
    """Directory that holds index.json, tokenizer.model, train/ and val/."""
    seq_len: int = 2048
    """Tokens a row; a row continues the last document of the one before with an empty memory."""
    num_streams: int = 8
    """Logical readers, fixed for the life of a run: a multiple of the data-parallel size, at most the train shards."""
    verify: Literal["sha256", "size", "none"] = "sha256"
    """What is checked before a shard is first read."""
    reset_at_documents: bool = True
    """Empty convolution, slots and attention at every document start inside a row."""


@dataclass
class ModelSection:
    """A decoder of (mixer + SwiGLU) layers. Sizes are of the whole model, whatever the parallel layout."""

    hidden_size: int = 1536
    num_layers: int = 21
    pattern: str = "D"
    """One letter a layer, repeated to num_layers: D = DLA mixer, A = softmax attention with RoPE, N = without."""
    backbone: Backbone = "mamba2"
    num_heads: int = 48
    """DLA heads H."""
    num_groups: int = 1
    """Query/key groups of the DLA mixer; divides num_heads (Mamba-2: 1; GDN: num_heads)."""
    key_dim: int = 128
    """Dk, per group (Mamba-2's d_state)."""
    value_dim: int = 64
    """Dv, per head."""
    conv_kernel: int = 4
    capacity: int = 30
    """K, slots a head."""
    tau: float = 0.6
    """Boundary threshold on the information score in [0, 2], or its start when learned."""
    tau_mode: Literal["fixed", "learned"] = "fixed"
    merge: Literal["density", "ward"] = "density"
    slot_weight_init: Literal["backbone", "log_linear"] = "backbone"
    """backbone: every slot weight starts at 1, so the layer starts as its plain backbone."""
    ffn_hidden_size: int = 4096
    attention_heads: int = 16
    """Softmax layers only."""
    attention_groups: int = 16
    """Key/value heads of the softmax layers."""
    attention_head_dim: int = 0
    """Channels of a softmax head; 0 = hidden_size / attention_heads."""
    qk_norm: bool = False
    """RMSNorm of each query and key head of the softmax layers, before RoPE."""
    rope_theta: float = 500_000.0
    rope_type: RopeType = "default"
    """How RoPE is stretched: linear (all wavelengths by rope_factor) or llama3 (the long ones)."""
    rope_factor: float = 1.0
    """linear and llama3: how much longer a wavelength becomes."""
    rope_low_freq_factor: float = 1.0
    """llama3: wavelengths over rope_original_length / this are stretched whole."""
    rope_high_freq_factor: float = 4.0
    """llama3: wavelengths under rope_original_length / this are left alone."""
    rope_original_length: int = 8192
    """llama3: tokens a row before the stretch."""
    tie_embeddings: bool = False
    vocab_multiple: int = 128
    """The tokenizer's vocabulary is padded up to a multiple of this."""
    norm_eps: float = 1e-5
    init_std: float = 0.006
    dt_min: float = 0.001
    """Range of the initial time step (log-uniform): its softplus bias starts there."""
    dt_max: float = 0.1
    a_min: float = 1.0
    """Range of the initial decay rate A (uniform)."""
    a_max: float = 16.0


@dataclass
class ParallelSection:
    """How one model is spread; the rest of the processes are data-parallel."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer, by heads and columns."""
    sequence_parallel: bool = False
    """Megatron sequence parallelism between the tensor-parallel regions (needs tensor_model_parallel_size > 1)."""
    context_parallel_size: int = 1
    """Processes that share each row: every one holds a contiguous part of its tokens."""
    cp_scheme: Literal["heads", "chain"] = "heads"
    """heads: all-to-all to heads around the recurrence. chain: the slot memory is handed from rank to rank."""


@dataclass
class OptimizerSection:
    """AdamW with warm-up and cosine decay. Norms, biases and per-head scalars get no weight decay."""

    lr: float = 3e-4
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of lr."""
    warmup_steps: int = 1024
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    """Global gradient norm; 0 = off."""
    tau_lr_ratio: float = 1.0
    """Learning rate of a learned tau as a share of lr."""


@dataclass
class TrainingSection:
    """Length, batch and rhythm of the run, in optimizer steps and rows."""

    steps: int = 1000
    global_batch_size: int = 32
    """Rows an optimizer step, over all processes."""
    micro_batch_size: int = 4
    """Rows a forward pass of one process; the rest is gradient accumulation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on CUDA, fp32 on a CPU."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 0, 1, 2 or 3; 1 or 2 in bf16."""
    tau_gate: Literal["hard", "annealed"] = "hard"
    """How a learned tau is trained: hard slots with a straight-through gradient, or soft gates that cool down first."""
    tau_anneal_share: float = 0.8
    """annealed: share of the steps with soft gates (quadratic in seq_len); the rest trains hard, as inference is."""
    tau_temperature_start: float = 0.3
    """annealed: width of the gate's sigmoid at the first step; falls geometrically to tau_temperature_end."""
    tau_temperature_end: float = 0.03
    offload_optimizer: bool = False
    """Keep optimizer state and update in host memory (needs zero_stage >= 1): saves 12 bytes a parameter, slower."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing. selective: convolution, gates and recurrence of each mixer (and the softmax core);
    full: whole layers. Decisions are kept, never taken again."""
    log_every: int = 10
    eval_every: int = 500
    """Steps between validations; the first is before step 1, the last after the end. 0 = never."""
    eval_rows: int = 0
    """Held-out rows a validation reads; 0 = all."""
    save_every: int = 500
    """Steps between checkpoints; the last step always saves. 0 = only the last."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; 0 = all."""
    resume: bool = True
    """Go on from the newest complete checkpoint of this run's directory."""


@dataclass
class DebugSection:
    """Checks that cost time."""

    check_replicas: int = 0
    """At the start and every so many steps, parameters that several ranks hold must be equal bit for bit; 0 = off."""


@dataclass
class RunConfig:
    """A whole run."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    debug: DebugSection = field(default_factory=DebugSection)
