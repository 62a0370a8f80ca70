"""The typed sections of a run. One YAML file is one run; every default is here, with its unit, range and reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from megatron_dla.config.paths import expand

Backbone = Literal["mamba2", "gdn"]
RopeType = Literal["default", "linear", "llama3"]

# Upper bounds lie far above any model or run: a value beyond them is a typing error, or could not start
Directory = Annotated[str, AfterValidator(expand)]
"""A path or URL; ~ and environment variables are replaced when it is read."""
Number = Annotated[int, Field(ge=1, lt=2**31)]
"""Of steps, rows or tokens."""
NumberOrNone = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[int, Field(ge=0, lt=2**60)]
Width = Annotated[int, Field(ge=1, le=2**20)]
"""Of a matrix."""
Heads = Annotated[int, Field(ge=1, le=2**16)]
Ranks = Annotated[int, Field(ge=1, le=2**16)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e9)]
Factor = Annotated[float, Field(gt=0, le=1e6)]


@dataclass
class RunSection:
    """Output directory and seed."""

    name: str = "run"
    """Directory under `dir`; holds config.yaml, metrics.jsonl, checkpoints/, plots/, hf/."""
    dir: Directory = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234
    """Initialisation and data order."""


@dataclass
class SourceSection:
    """One source of a mixture."""

    __pydantic_config__ = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    dir: Directory = ""
    weight: Weight = 1.0
    max_epochs: NumberOrNone = 0
    max_tokens: Tokens = 0


@dataclass
class StageSection:
    """Weights from a number of tokens on."""

    __pydantic_config__ = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    from_tokens: Annotated[Tokens, Field(ge=1)]
    weights: dict[str, Weight]


@dataclass
class DataSection:
    """Tokenised WebDataset shards, as `dla data shards` writes them: set `dir` or `sources`."""

    dir: Directory = ""
    """Directory that `dla data shards` or `dla data merge` wrote, or its URL: https://, s3://, gs://."""
    sources: dict[str, SourceSection] = field(default_factory=dict)
    """A mixture, name: {dir, weight: 1.0, max_epochs: 0, max_tokens: 0}. Weights are shares of the tokens; a source
    ends after max_epochs passes or max_tokens tokens (0 = never), and the others share its part."""
    stages: tuple[StageSection, ...] = ()
    """Later weights of the sources: [{from_tokens: 800000000000, weights: {name: 1.0}}]; names left out have 0."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: rows are cut from the joined documents. best_fit: no document that fits into a row is cut, for some
    padding."""
    seq_len: Annotated[int, Field(ge=1, le=2**24)] = 2048
    """Tokens a row. A document cut at a row's end continues in the next row with an empty memory."""
    num_streams: Annotated[int, Field(ge=1, le=2**20)] = 8
    """Logical readers, constant over a run: a multiple of the data-parallel size, at most the train shards."""
    verify: Literal["sha256", "size", "none"] = "sha256"
    """Check of each shard before its first read."""
    prefetch_rows: Annotated[int, Field(ge=0, le=2**20)] = 64
    """Rows that a thread of each rank reads ahead, rounded up to whole steps; 0 = off. 20 bytes a token."""
    cache_dir: Directory = ""
    """Where shards at URLs are kept: best a disk of the node, whose ranks share it. (none) = ~/.cache/megatron-dla."""
    cache_gb: Annotated[float, Field(gt=0, le=1e9)] = 50.0
    """Size of the shards in cache_dir, in 1e9 bytes; those that were not used for longest make room."""
    reset_at_documents: bool = True
    """Reset convolution, slots and attention at every document start inside a row."""


@dataclass
class ModelSection:
    """A decoder of (mixer + SwiGLU) layers. Sizes are of the whole model, independent of the parallel layout."""

    hidden_size: Width = 1536
    num_layers: Annotated[int, Field(ge=1, le=4096)] = 21
    pattern: Annotated[str, Field(max_length=4096)] = "D"
    """One letter a layer, repeated to num_layers: D = DLA mixer, A = softmax attention with RoPE, N = without,
    W = with RoPE in a sliding window, G = Gated DeltaNet, M = Mamba-2, L = Log-Linear Attention."""
    backbone: Backbone = "mamba2"
    num_heads: Heads = 48
    """Heads H of the recurrent mixers (D, L, G, M)."""
    num_groups: Heads = 1
    """Query/key groups of the recurrent mixers; divides num_heads (Mamba-2: 1; GDN: num_heads)."""
    key_dim: Annotated[int, Field(ge=1, le=2**14)] = 128
    """Dk, per group (Mamba-2's d_state)."""
    value_dim: Annotated[int, Field(ge=1, le=2**14)] = 64
    """Dv, per head."""
    conv_kernel: Annotated[int, Field(ge=1, le=256)] = 4
    conv_bias: bool = False
    """A bias in the short convolutions, before their SiLU (published Mamba-2 models have it)."""
    gated_norm: Literal["head", "group"] = "head"
    """Channels that the gated RMSNorm averages over. head: a head's, with one weight for all heads. group: those of all
    heads of a query/key group, with a weight a channel, as in Mamba-2; with fewer groups than tensor-parallel ranks it
    takes a small all-reduce."""
    capacity: Annotated[int, Field(ge=2, le=2**14)] = 30
    """K, slots a head."""
    tau: Annotated[float, Field(ge=0, le=3)] = 0.6
    """Boundary threshold on the information score in [0, 2], or its initial value when learned."""
    tau_mode: Literal["fixed", "learned", "calibrated"] = "fixed"
    """learned: by gradient, see the section tau. calibrated: set for each head in the first tau.calibration_steps steps
    so that a share boundary_rate of the tokens opens a slot, then kept."""
    boundary: Literal["information", "random", "every"] = "information"
    """What opens a slot. information: a score of at least tau. Controls: random, a share boundary_rate of the positions
    (a head's own); every, each boundary_every-th token of a document."""
    boundary_rate: Annotated[float, Field(gt=0, le=1)] = 0.03125
    """boundary=random, tau_mode=calibrated: share of the tokens that open a slot, first tokens of documents aside."""
    boundary_every: Number = 32
    """every: tokens from one boundary to the next."""
    merge: Literal["density", "ward", "equal_counts", "oldest", "random"] = "density"
    """Neighbours that merge when all slots are in use: those with the least information a token (density), whose union
    raises the squared error least (ward; token by token, slow), or controls: with the fewest tokens (equal_counts), the
    oldest, or random ones."""
    control_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of random boundaries and random merges."""
    levels: Annotated[int, Field(ge=2, le=64)] = 15
    """States a head of L layers. Level 0 holds the token, level l 2^(l-1) or none, the last all that is older;
    15 is as published for rows of 16,384 tokens."""
    slot_weights: Literal["recency", "content"] = "recency"
    """What the weight with which a token reads a slot depends on. recency: how many slots are newer. content: also how
    well the slot's keys match the query, by a sharpness a head that starts at 0; without a learned tau, and with
    cp_scheme=heads."""
    slot_weight_init: Literal["backbone", "log_linear"] = "backbone"
    """backbone: all slot weights are 1 at the start, which makes the layer equal to its plain backbone."""
    ffn_hidden_size: Annotated[int, Field(ge=0, le=2**22)] = 4096
    """Inner size of the SwiGLU MLPs; 0 = layers without MLP (Mamba-2)."""
    attention_heads: Heads = 16
    """Softmax layers only."""
    attention_groups: Heads = 16
    """Key/value heads of the softmax layers."""
    attention_head_dim: Annotated[int, Field(ge=0, le=2**14)] = 0
    """Channels of a softmax head; 0 = hidden_size / attention_heads."""
    sliding_window: Number = 512
    """Tokens that a query of a W layer sees, itself included."""
    qk_norm: bool = False
    """RMSNorm of each query and key head of the softmax layers, before RoPE."""
    rope_theta: Annotated[float, Field(ge=1, le=1e15)] = 500_000.0
    rope_type: RopeType = "default"
    """RoPE scaling: linear (all wavelengths times rope_factor) or llama3 (only the long ones)."""
    rope_factor: Factor = 1.0
    """linear and llama3: scaling factor of a wavelength."""
    rope_low_freq_factor: Factor = 1.0
    """llama3: wavelengths above rope_original_length / this are scaled fully."""
    rope_high_freq_factor: Factor = 4.0
    """llama3: wavelengths below rope_original_length / this are unchanged."""
    rope_original_length: Number = 8192
    """llama3: context length before scaling."""
    tie_embeddings: bool = False
    vocab_multiple: Annotated[int, Field(ge=1, le=2**24)] = 128
    """The vocabulary is padded to a multiple of this."""
    norm_eps: Annotated[float, Field(gt=1e-30, le=1)] = 1e-5
    init_std: Annotated[float, Field(gt=1e-30, le=100)] = 0.006
    dt_min: Annotated[float, Field(ge=1e-12, le=1e6)] = 0.001
    """Range of the initial time step dt (log-uniform), which sets dt_bias."""
    dt_max: Annotated[float, Field(ge=1e-12, le=1e6)] = 0.1
    a_min: Annotated[float, Field(ge=1e-12, le=1e6)] = 1.0
    """Range of the initial decay rate A (uniform)."""
    a_max: Annotated[float, Field(ge=1e-12, le=1e6)] = 16.0


@dataclass
class ParallelSection:
    """Model-parallel sizes; the remaining processes are data-parallel."""

    tensor_model_parallel_size: Ranks = 1
    """Ranks that shard each layer by heads and columns."""
    sequence_parallel: bool = False
    """Megatron sequence parallelism between the tensor-parallel regions (needs tensor_model_parallel_size > 1)."""
    context_parallel_size: Ranks = 1
    """Ranks that shard each row: each holds a contiguous part of its tokens."""
    cp_scheme: Literal["heads", "chain"] = "heads"
    """heads: all-to-all to heads around the recurrence. chain: each rank sends the slot memory to the next."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that share one model replica; the data-parallel size is world size / this."""
        return self.tensor_model_parallel_size * self.context_parallel_size


@dataclass
class OptimizerSection:
    """AdamW with warm-up and cosine decay. Norms, biases and per-head scalars get no weight decay."""

    lr: Annotated[float, Field(gt=0, le=1000)] = 3e-4
    min_lr_ratio: Share = 0.1
    """Final learning rate as a share of lr."""
    warmup_steps: NumberOrNone = 100
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.1
    clip_grad: Weight = 1.0
    """Global gradient norm; 0 = off."""
    tau_lr_ratio: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Learning rate of a learned tau as a share of lr."""


@dataclass
class TrainingSection:
    """Length, batch, device and intervals of the run, in optimizer steps and rows."""

    steps: Number = 1000
    global_batch_size: Annotated[int, Field(ge=1, le=2**24)] = 32
    """Rows an optimizer step, over all processes."""
    micro_batch_size: Annotated[int, Field(ge=1, le=2**24)] = 4
    """Rows a forward pass of one process; the rest is gradient accumulation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on CUDA, fp32 on a CPU. Of the backbone under an adapter, whose parameters and states are fp32."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO stage: 0, 1, 2 or 3; 1 or 2 in bf16, 0 to 2 under an adapter (a few MB)."""
    offload_optimizer: bool = False
    """Optimizer state and step in host memory (needs zero_stage >= 1): saves 12 bytes a parameter of GPU memory."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing. selective: convolution, gates and recurrence of each mixer (and the softmax core);
    full: whole layers. Slot boundaries and merges are stored, not recomputed."""
    keep_states: bool = False
    """Keep each layer's slot states of the forward pass for the backward one, which computes them again otherwise (the
    kernels on a GPU only), and Gated DeltaNet's inverses: faster, for key_dim x value_dim x slots x heads x 2 bytes a
    layer and 512 tokens in bf16, and 320 bytes a token and head of Gated DeltaNet with key_dim 128."""
    log_every: Number = 10
    eval_every: NumberOrNone = 500
    """Steps between validations; the first is before step 1, the last after the end. 0 = never."""
    eval_rows: NumberOrNone = 0
    """Held-out rows a validation reads; 0 = all (under an adapter always)."""
    save_every: NumberOrNone = 500
    """Steps between checkpoints; the last step always saves. 0 = only the last."""
    patience: NumberOrNone = 0
    """Validations without a lower val_loss after which the run ends, with a checkpoint. 0 = never."""
    keep_checkpoints: NumberOrNone = 2
    """Newest checkpoints to keep; 0 = all. `checkpoint` keeps more."""
    resume: bool = True
    """Resume from the newest complete checkpoint in the run's directory."""


@dataclass
class CheckpointSection:
    """How checkpoints are written, kept beside the newest (training.keep_checkpoints), and verified."""

    background: bool = True
    """Training goes on while a checkpoint is written, for a copy of the state in host memory. The last checkpoint and
    the one at a stop are waited for."""
    max_failures: Number = 3
    """Saves in a row that may fail (a full disk) before the run ends with an error; each is a warning."""
    keep_every: NumberOrNone = 0
    """Also keep the checkpoints whose step is a multiple; 0 = none."""
    keep_best: NumberOrNone = 0
    """Also keep so many with the lowest val_loss, of steps that are both validated and saved."""
    permanent: tuple[Number, ...] = ()
    """Steps that are saved and never deleted."""
    damaged: Literal["fallback", "refuse"] = "fallback"
    """At a start whose newest checkpoint does not match its checksums: use the one before, or end with an error."""


@dataclass
class AnomalySection:
    """Losses and gradients that are not finite, and spikes of the loss: what a run does about them (docs/resume.md)."""

    non_finite: Literal["skip", "stop"] = "skip"
    """skip: the step counts, its update is left out. stop: the run ends."""
    spike: Literal["off", "report", "skip", "rewind"] = "report"
    """A loss above the median of the last ones by more than spike_threshold: a line and a record. skip: no update.
    rewind: back to the last checkpoint, and on without the batch (skip where there is none yet)."""
    max_rewinds: Number = 3
    """Of a run; at the next one it ends."""
    max_consecutive: Number = 5
    """Skipped steps in a row after which the run ends; spikes in a row that are only reported begin a new window."""
    window: Annotated[int, Field(ge=3, le=2**16)] = 128
    """Losses that a new one is compared with. Spikes are not among them."""
    min_losses: Annotated[int, Field(ge=3, le=2**16)] = 32
    """Losses in the window before the first comparison."""
    spike_threshold: Factor = 20.0
    """In median absolute deviations of the window, each at least 0.1% of the median."""


@dataclass
class TauSection:
    """How a tau that is not fixed is found (model.tau_mode)."""

    gate: Literal["hard", "annealed"] = "hard"
    """hard: hard slots with a straight-through gradient. annealed: soft gates that cool down first."""
    anneal_share: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """annealed: share of the steps with soft gates (quadratic in seq_len); the rest trains hard, as inference is."""
    temperature_start: Annotated[float, Field(ge=1e-6, le=1e3)] = 0.3
    """annealed: width of the gate's sigmoid at the first step; falls geometrically to temperature_end."""
    temperature_end: Annotated[float, Field(ge=1e-6, le=1e3)] = 0.03
    calibration_steps: Number = 100
    """calibrated: first steps of the run, after each of which tau moves to where that step's scores have the rate."""


@dataclass
class WandbSection:
    """Weights & Biases (the package wandb, in the extra `logging`)."""

    project: str = ""
    """(none) = no W&B."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """offline: files in the run directory, which `wandb sync` uploads."""
    entity: str = ""
    """User or team; (none) = the account's default."""
    tags: tuple[str, ...] = ()

    @property
    def used(self) -> bool:
        return bool(self.project) and self.mode != "disabled"


@dataclass
class LoggingSection:
    """Where metrics go beside metrics.jsonl and the terminal, under torchtitan's names."""

    tensorboard: bool = False
    """Event files in tensorboard/ of the run directory (the package tensorboard, in the extra `logging`)."""
    wandb: WandbSection = field(default_factory=WandbSection)


@dataclass
class DebugSection:
    """Checks that slow a run down."""

    check_replicas: NumberOrNone = 0
    """Compare replicated parameters bit for bit between ranks at the start and every n steps; 0 = off."""


@dataclass
class RunConfig:
    """A whole run."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    anomalies: AnomalySection = field(default_factory=AnomalySection)
    tau: TauSection = field(default_factory=TauSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    debug: DebugSection = field(default_factory=DebugSection)
