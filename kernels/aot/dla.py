"""The configurations of the DLA operator to compile: forward, backward, partition and decode.

First what `configs/*.yaml` launch, read from the files: their head dims and capacity, the dtypes that the mixer feeds,
and a rank's share of the heads under tensor parallelism. A kernel is compiled anew for a number of heads that 16
divides, for one, and for any other, so one share of each kind a backbone is enough, and configs that differ in nothing
else are compiled once. Then shapes that users may choose.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dla.config import LETTERS, ModelSection, RunConfig, layer_letters, load_config
from megatron_dla.kernels.dla import Partition, SlotCache, decode_step, dla_attention, partition
from megatron_dla.kernels.dla.rules import Controls
from megatron_dla.resources import resource

ALL = (80, 90, 100)
HOPPER = (90,)
SHIPPED = resource("configs")
RANKS = range(1, 9)  # that share a layer's heads: a node's


@dataclass(frozen=True)
class Config:
    """One use of the operator. `learned`: tau has a gradient; `cached`: memory comes in and goes out; `control`:
    boundaries and merges at random."""

    name: str
    dtype: torch.dtype
    key_dim: int
    value_dim: int
    delta: bool
    capacity: int = 30
    heads: int = 16
    groups: int | None = None  # of queries and keys; None: a key of their own for Gated DeltaNet's heads, one for all
    learned: bool = False
    cached: bool = False
    control: bool = False
    documents: tuple[int, ...] = ()
    tokens: int = 256
    tau: float = 1.2  # one slot: above 2, which no score reaches
    mixed: bool = False  # fp32 queries and keys beside 16-bit values, as after an L2 norm in fp32
    archs: tuple[int, ...] = ALL
    quick: bool = False  # in `--quick` as well


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

OTHERS = (
    Config("gdn-bf16-256", BF16, 256, 256, True, archs=HOPPER),
    Config("mamba2-bf16-256-K64", BF16, 256, 256, False, capacity=64, archs=HOPPER),
    Config("gdn-bf16-128", BF16, 128, 128, True, learned=True),
    Config("gdn-mixed-128", BF16, 128, 128, True, mixed=True, tokens=2048),
    Config("mamba2-bf16-128", BF16, 128, 128, False, learned=True, tokens=4352, quick=True),
    Config("gdn-fp32-128", FP32, 128, 128, True, archs=HOPPER),
    Config("gdn-fp32-64", FP32, 64, 64, True, groups=4, quick=True),
    Config("mamba2-bf16-96x160-odd", BF16, 96, 160, False, tokens=250, archs=HOPPER),
    Config("gdn-bf16-64-K15-cache", BF16, 64, 64, True, capacity=15, groups=4, cached=True, tokens=2048, archs=HOPPER),
    Config("gdn-mixed-128-K1", BF16, 128, 128, True, capacity=1, tau=3.0, mixed=True, tokens=2048),  # letter G
    Config("mamba2-bf16-64-K15", BF16, 64, 64, False, capacity=15),
    Config("mamba2-bf16-128x64-K1", BF16, 128, 64, False, capacity=1, tau=3.0, tokens=2048),  # letter M
    Config("gdn-bf16-128-controls", BF16, 128, 128, True, control=True, tokens=2048, archs=HOPPER),
    Config("mamba2-bf16-128x64-K64-cache", BF16, 128, 64, False, capacity=64, cached=True, archs=HOPPER),
    Config("gdn-fp16-64", FP16, 64, 64, True, documents=(70, 133), archs=HOPPER),
    Config("mamba2-fp16-128", FP16, 128, 128, False, archs=HOPPER),
    Config("mamba2-fp32-64", FP32, 64, 64, False),
)


def _kind(heads: int) -> str:
    """Numbers of heads of a kind launch the same kernels."""
    return "one" if heads == 1 else "sixteens" if heads % 16 == 0 else "other"


def kernels_of(one: Config) -> tuple[Any, ...]:
    """What decides which kernels a shipped config launches: equal for two configs, all kernels are."""
    group = one.heads // (one.groups or 1)
    shape = one.delta, one.key_dim, one.value_dim, one.capacity, one.learned
    return *shape, _kind(one.heads), _kind(group)


@cache
def shipped() -> tuple[Config, ...]:
    """What the shipped configs for GPUs launch on one rank, each set of kernels once; in `--quick` those of the
    letter D without tensor parallelism."""
    found: list[Config] = []
    kinds, shapes = set(), set()
    for path, m, letter in shipped_layers():
        delta, heads, groups = m.backbone == "gdn", m.num_heads, m.num_groups
        capacity = getattr(m, LETTERS[letter].states)
        one = Config(
            path.stem, BF16, m.key_dim, m.value_dim, delta, capacity, heads, groups,
            learned=m.tau_mode == "learned" and letter == "D", quick=letter == "D",
            # enough blocks for shards of the partition
            tokens=2048 if delta else 4352,
        )  # fmt: skip
        for tensor in (n for n in RANKS if heads % n == 0 and (groups % n == 0 or n % groups == 0)):
            share = replace(
                one, name=f"{one.name}-tp{tensor}", heads=heads // tensor, groups=max(1, groups // tensor),
                quick=one.quick and tensor == 1,
            )  # fmt: skip
            shape = kernels_of(share)
            kind = delta, *shape[-2:]
            if kind not in kinds or (tensor == 1 and shape not in shapes):
                found.append(share)
                kinds.add(kind)
                shapes.add(shape)
    return tuple(found)


def shipped_layers() -> Iterator[tuple[Path, ModelSection, str]]:
    """Letters with several states of the shipped pretraining configs for GPUs; configs with a letter D come first."""
    others = ("study_", "ablation_", "delta_mem_")
    paths = [path for path in sorted(SHIPPED.glob("*.yaml")) if not path.stem.startswith(others)]
    runs = [(path, run) for path in paths if isinstance(run := load_config(path), RunConfig)]
    for path, run in sorted(runs, key=lambda one: "D" not in layer_letters(one[1].model)):
        if run.training.device == "cuda":
            for letter in sorted(set(layer_letters(run.model))):
                if LETTERS[letter].states:
                    yield path, run.model, letter


def configs() -> tuple[Config, ...]:
    """All of them, the longest first, so that two processes end together."""
    return tuple(sorted((*shipped(), *OTHERS), key=lambda c: (not c.delta, -c.key_dim * c.value_dim)))


def names(arch: int, quick: bool = False) -> list[str]:
    """`quick`: what the shipped configs launch, and every other kernel in one configuration."""
    return [config.name for config in configs() if arch in config.archs and (config.quick or not quick)]


def _inputs(config: Config) -> dict[str, Any]:
    """Zeros in the dtypes of the mixer's: nothing is executed."""
    low, heads, T = config.dtype, config.heads, config.tokens
    qk = FP32 if config.mixed else low
    groups = config.groups or (heads if config.delta else 1)

    def new(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.zeros(1, T, *shape, dtype=dtype)

    x = {
        "q": new(groups, config.key_dim, dtype=qk),
        "k": new(groups, config.key_dim, dtype=qk),
        "v": new(heads, config.value_dim, dtype=low),
        "g": new(heads),
        "slot_weights": new(heads, config.capacity),
    }
    if config.delta:
        x["beta"] = new(heads)
    return {name: value.requires_grad_() for name, value in x.items()}


def _decided(config: Config) -> Partition:
    """The decisions to follow; any will do: one slot, opened by the first token."""
    shape = 1, config.tokens, config.heads
    numbers = torch.zeros(shape, dtype=torch.int32)
    start = torch.zeros(shape, dtype=torch.bool)
    start[:, 0] = True
    return Partition(
        start=start, death=numbers + config.tokens, score=torch.zeros(shape), lo=numbers if config.learned else None,
        cache_death=torch.zeros(1, config.heads, config.capacity, dtype=torch.int32),
    )  # fmt: skip


def exercise(name: str, backend: str = "triton") -> None:
    """Every launch of the configuration `name`."""
    config = next(c for c in configs() if c.name == name)
    x = _inputs(config)
    tau: Any = torch.full((config.heads,), config.tau, requires_grad=True) if config.learned else config.tau
    ends = torch.tensor([0, *config.documents, config.tokens], dtype=torch.int32) if config.documents else None
    shape = (1, config.heads, config.capacity, config.key_dim, config.value_dim)
    memory = SlotCache.empty(*shape) if config.cached else None
    rule: dict[str, Any] = dict(tau=tau, capacity=config.capacity)
    if config.control:
        rule |= dict(merge="random", controls=Controls("random"))
    packed: dict[str, Any] = dict(rule, cu_seqlens=ends, cache=memory)

    def train() -> None:
        kwargs = dict(packed, partition=_decided(config), return_cache=config.cached)
        out, final = dla_attention(**x, **kwargs, backend=backend)
        outs = [out] if final is None else [out, final.states]
        torch.autograd.backward(outs, [torch.ones_like(y) for y in outs])

    def decide() -> None:
        partition(x["k"], x["v"], x["g"], x.get("beta"), **packed, backend=backend)

    def decode() -> None:
        one: dict[str, Any] = {key: value.detach()[:, :1] for key, value in x.items()}
        fixed = dict(rule, tau=tau.detach() if config.learned else tau, backend=backend)
        decode_step(**one, **fixed, cache=SlotCache.empty(*shape))

    failed = []
    for part in (train, decide, decode):
        try:
            part()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            failed.append(f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
    if failed:
        raise RuntimeError("; ".join(failed))
