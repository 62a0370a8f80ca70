"""Every constant of the prediction, with its source. Nothing here is measured by this project unless it says so."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from megatron_dla.gpus import GPUS

NEVER = 1 << 30  # see `kernels.dla.triton_layout`
OF_ARCH = {80: "a100", 90: "h100", 100: "b200"}
ARCH = {"a100": 80, "h100": 90, "h200": 90, "b200": 100}

# Shares of a data sheet's rates that are reached. Copies and torch's elementwise kernels: 4.24 of 4.8 TB/s on an H200
# (docs/bench.md). Matrix products of training's sizes: 793 of 989 TFLOP/s for 8192^3 on an H200 (docs/bench.md), less
# for narrow ones.
MEMORY_SHARE, MATRIX_SHARE = 0.85, 0.72
# Bytes a clock that a processor's Triton programs move from and to HBM: a load waits for about 480 clocks, so what is
# in flight limits it before the memory does. fla's linear_attn on an H100 moves 1.34 GB in 0.609 ms (see peers.HELION);
# simple GLA takes an H200, with 1.43 times the memory rate, as long as an H100 (docs/bench.md).
BYTES_A_CLOCK = 9.5
LAUNCH = 2.5e-6  # s between two kernels of a queue that never empties; estimated
SYNC = 20e-6  # s that the GPU idles when the host reads a number back and refills the queue; estimated


@dataclass(frozen=True)
class Latencies:
    """Cycles of one processor, unless it says otherwise.

    memory, l2, l1: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture" (arXiv 2402.13499):
    about 480 cycles to HBM, 260 to L2, 40 to L1. dot: a dependent wgmma (the same paper: 128 cycles for n = 256).
    barrier, reduce: a barrier and a shuffle tree with its way through shared memory, estimated. shuffle, redux: an
    exchange and a sum or minimum of integers inside one warp, an instruction each in what Triton compiles, estimated.
    alu: dependent instructions, estimated.
    l1_bytes: bytes a cycle from L1, of 128 at the peak. integer_share: of the elements of an integer tensor operation
    that cost an instruction, as address arithmetic is shared by the elements of a vector.
    """

    memory: float = 480.0
    l2: float = 270.0
    l1: float = 40.0
    dot: float = 130.0
    barrier: float = 40.0
    reduce: float = 70.0
    shuffle: float = 25.0
    redux: float = 30.0
    alu: float = 10.0
    l1_bytes: float = 64.0
    integer_share: float = 0.2

    def rate(self, label: str) -> float:
        """Of the dense bf16 rate: mma of TF32 runs at half, three products for tf32x3, without tensor cores 1/16."""
        return {"bf16": 0.65, "f16": 0.65, "tf32": 0.3, "tf32x3": 0.1, "ieee": 1 / 32}[label]


@dataclass(frozen=True)
class Assumptions:
    """What the data decides: the inputs of `dla bench kernels` have a boundary every 34 tokens (docs/bench.md). Slots
    are all in use but where a document begins, which has none: nothing in the ledger starts from a cache.

    rounds: iterations of a loop whose length the data decides (boundaries of a tile, and one). until: iterations of one
    that has a bound but may end before, None: it runs to its bound. equal: whether two numbers are the same. opened:
    slots that a block opens. merged: slots from before a block that are merged in it. partly: arguments of which a
    program loads only the slots that a block opened, and the one that was open. first_rows, first_blocks: rows and
    blocks that documents begin with. held, past: of detection, in how many chunks the open slot has a state, and how
    many chunks before them others began in; None: of branches that the data decides, the dearer one is taken.
    """

    rounds: float
    until: float | None = None
    equal: bool = False
    opened: int = 0
    merged: int = 0
    partly: tuple[str, ...] = ()
    held: float | None = None
    past: float | None = None
    first_rows: frozenset[int] = frozenset()
    first_blocks: frozenset[int] = frozenset()

    def loaded(self, argument: str, offset: int | None, env: dict[str, Any]) -> Any:
        """The number that a scalar load of this argument gives, where the ledger assumes one."""
        if argument == "live_count":
            return 0 if offset is not None and offset // env["%H"] in self.first_rows else env.get("%K")
        if argument == "live_death":
            return NEVER
        if argument == "agreed":  # a shard that is run again meets its first run
            return 1
        if argument == "moves" and offset is not None:  # see `slot_columns_kernel`
            first = offset // (4 * env["%H"]) in self.first_blocks
            found = (0, self.opened, self.opened, 0) if first else (env["%K"], self.opened, env["%K"], self.merged)
            return found[offset % 4]
        return None

    def share(self, argument: str, env: dict[str, Any]) -> float:
        """Of a load's elements, those that its mask lets through."""
        return min(1.0, (self.opened + 1) / env["%K"]) if argument in self.partly else 1.0


BOUNDARY_EVERY = 34  # tokens
# With a full cache each slot that opens merges two; some of them opened in the same block. The others, by the tokens of
# a block, for each slot that it opens: counted for the inputs of `dla bench kernels` (Mamba-2, K = 30, 8,192 tokens,
# the second half; fewer with K = 15 and for Gated DeltaNet), 2026-11-30. A test counts them again.
MERGED_FROM_BEFORE = {256: 0.53, 512: 0.39}
# kernel -> boundaries after which a loop with another bound ends: a shard is run again up to its second shared one
STOPS_AFTER = {"repair_kernel": 2}
FULL = ("capacity_kernel",)  # kernels that ask whether the cache is full, which it is
# kernels that load the slots of a block only: argument
PARTLY = {"carry_states_kernel": ("snap",)}
# kernels whose loop of unknown length is over the tiles of a slot's tokens in a block, not over boundaries
TILES_OF_A_SLOT = ("block_states_kernel",)


def fingerprint() -> str:
    """Of all constants of the prediction: predictions made with others must be made again."""
    everything = (
        GPUS,
        MEMORY_SHARE,
        BYTES_A_CLOCK,
        MATRIX_SHARE,
        LAUNCH,
        SYNC,
        Latencies(),
        BOUNDARY_EVERY,
        MERGED_FROM_BEFORE,
        STOPS_AFTER,
        FULL,
        PARTLY,
        TILES_OF_A_SLOT,
    )
    rates = [Latencies().rate(x) for x in ("bf16", "f16", "tf32", "tf32x3", "ieee")]
    return hashlib.sha256(repr((everything, rates)).encode()).hexdigest()[:16]
