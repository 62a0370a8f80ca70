"""Tiles and warps of every kernel, by dtype and head dims: fixed tables, never tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl

from ..common.launch import compute_capability, power_of_two
from ..common.tuned import launch_config, register

TILE = 64  # tokens a tile
PRECISION = "tf32x3"  # of products of fp32 operands: as good as fp32
WIDE_TILE = 32  # with operands of 4 bytes, and for Gated DeltaNet before Hopper: it has them inside a tile
TILES = 8  # tiles a block
WIDE_TILES = 4  # with operands of 4 bytes: decays inside a block cost digits
DETECT_TILE = 32  # tokens a chunk of the detection pass: its C x C arrays stay in registers
WINDOW_ROWS = 64  # at least so many blocks (and segment ends) have their slot states in memory at once,
WINDOW_BYTES = 4 << 30  # and as many as take so many bytes

# kernel (`.256`: for dk > 128; `.v64`: for dv <= 64, where a loop over value
# dims that runs once holds more registers; `.sm80`: on GPUs before Hopper, where operands take up registers; `.sm100`:
# from Blackwell on): (BK, BV, warps, stages) for bf16 and for operands of 4 bytes, and its operation
LAUNCH = {
    "block_states": ((128, 128, 8, 2), (64, 64, 8, 1), "forward"),
    "block_states.v64": ((128, 64, 8, 1), (64, 64, 8, 1), "forward"),
    "carry": ((1, 2048, 1, 1), (1, 1024, 1, 1), "forward"),  # BV: for all slots together, here and in the next lines
    "slots_gdn": ((128, 128, 8, 2), (32, 64, 4, 1), "forward"),
    "slots_gdn.256": ((256, 64, 8, 2), (32, 64, 4, 1), "forward"),
    "slots_gdn_reverse": ((128, 128, 8, 2), (32, 64, 4, 1), "backward"),
    "slots_gdn_reverse.sm80": ((128, 64, 8, 1), (32, 64, 4, 1), "backward"),
    "slots_gdn_reverse.256": ((128, 128, 8, 1), (32, 64, 4, 1), "backward"),
    "slots_gdn_reverse.256.sm80": ((128, 32, 8, 1), (32, 64, 4, 1), "backward"),
    "slots_gdn_reverse.256.sm100": ((128, 64, 8, 1), (32, 64, 4, 1), "backward"),
    "scan_gdn": ((128, 32, 8, 1), (32, 32, 8, 1), "forward"),
    "read_slots": ((128, 64, 8, 2), (64, 64, 8, 1), "forward"),
    "read_slots.256": ((256, 64, 8, 2), (64, 64, 8, 1), "forward"),
    "read_slots.256.sm80": ((64, 64, 8, 2), (64, 64, 8, 1), "forward"),
    "output": ((128, 64, 4, 2), (64, 64, 8, 1), "forward"),
    "output.256": ((64, 64, 8, 2), (64, 64, 8, 1), "forward"),
    "output.sm80": ((128, 64, 8, 2), (64, 64, 8, 1), "forward"),
    "state_gradient": ((64, 256, 4, 2), (32, 64, 8, 1), "backward"),  # BV: for all slots of a program together
    "state_gradient.sm80": ((64, 128, 8, 2), (32, 64, 8, 1), "backward"),
    "slot_query_gradient": ((64, 128, 4, 2), (32, 32, 8, 1), "backward"),
    "slot_query_gradient.sm80": ((32, 32, 8, 1), (32, 32, 8, 1), "backward"),
    "slot_query_gradient.sm100": ((64, 128, 4, 1), (32, 32, 8, 1), "backward"),
    "slot_query_gradient.256": ((64, 64, 4, 2), (32, 32, 8, 1), "backward"),
    "slot_query_gradient.256.sm100": ((64, 64, 4, 1), (32, 32, 8, 1), "backward"),
    "pairs_backward": ((128, 128, 4, 2), (32, 32, 8, 1), "backward"),
    "pairs_backward.sm80": ((32, 64, 4, 1), (32, 32, 8, 1), "backward"),
    "pairs_backward.sm100": ((128, 64, 8, 2), (32, 32, 8, 1), "backward"),
    "group_gradient": ((128, 64, 8, 2), (64, 64, 8, 1), "backward"),
    "key_gradient": ((64, 64, 4, 2), (64, 64, 8, 1), "backward"),
    "key_gradient.sm80": ((64, 64, 8, 2), (64, 64, 8, 1), "backward"),
    "token_gradient": ((128, 128, 8, 2), (64, 64, 8, 1), "backward"),
    "token_gradient.sm100": ((128, 128, 8, 1), (64, 64, 8, 1), "backward"),
    "value_gradient": ((64, 128, 4, 2), (64, 64, 8, 1), "backward"),
    "value_gradient.sm80": ((32, 64, 8, 2), (64, 64, 8, 1), "backward"),
    "dphi": ((64, 64, 4, 2), (64, 64, 8, 1), "backward"),
    "dphi.sm80": ((64, 64, 8, 2), (32, 32, 8, 1), "backward"),
    "inverse": ((64, 64, 4, 1), (64, 64, 4, 1), "forward"),
    "local": ((64, 64, 4, 1), (32, 32, 8, 1), "forward"),
    "local_pairs": ((64, 64, 8, 2), (32, 32, 8, 1), "backward"),
    "local_pairs.sm80": ((32, 64, 8, 1), (32, 32, 8, 1), "backward"),
    "local_inverse_backward": ((64, 64, 8, 2), (32, 32, 8, 1), "backward"),
    "local_gradient": ((64, 64, 4, 1), (64, 64, 8, 1), "backward"),
    "compose": ((128, 64, 8, 2), (64, 64, 8, 2), "forward"),
    "compose_backward": ((128, 64, 8, 2), (16, 64, 8, 1), "backward"),
    "compose_backward_keys": ((128, 64, 8, 2), (32, 64, 8, 1), "backward"),
    "compose_backward.sm80": ((64, 64, 8, 1), (16, 64, 8, 1), "backward"),
    "compose_backward_keys.sm80": ((64, 64, 8, 1), (32, 64, 8, 1), "backward"),
    "compose_backward.sm100": ((64, 64, 8, 1), (16, 64, 8, 1), "backward"),
    "compose_backward_keys.sm100": ((64, 64, 8, 1), (32, 64, 8, 1), "backward"),
    "compose_backward.256": ((64, 64, 8, 1), (16, 64, 8, 1), "backward"),
    "compose_backward_keys.256": ((64, 64, 8, 1), (32, 64, 8, 1), "backward"),
    "compose.256": ((128, 64, 8, 1), (64, 64, 8, 2), "forward"),
    "transition_backward": ((64, 64, 4, 1), (32, 32, 8, 1), "backward"),
    "transition": ((64, 64, 4, 1), (64, 64, 4, 1), "forward"),
    "transition.sm80": ((32, 32, 8, 1), (32, 32, 8, 1), "forward"),
    "detect_pairs": ((64, 64, 4, 1), (32, 32, 8, 1), "partition"),
    "detect": ((32, 128, 4, 1), (32, 32, 8, 1), "partition"),
    "detect.sm80": ((32, 128, 4, 1), (16, 16, 8, 1), "partition"),
    "detect_gdn": ((32, 64, 4, 1), (32, 64, 8, 1), "partition"),
    "detect_gdn.v64": ((32, 64, 4, 1), (16, 16, 8, 1), "partition"),
    "detect_gdn.sm80": ((32, 64, 8, 1), (32, 64, 8, 1), "partition"),
    "detect_gdn.v64.sm80": ((32, 64, 8, 1), (32, 64, 8, 1), "partition"),
    "detect_gdn.256": ((32, 64, 4, 1), (32, 16, 8, 1), "partition"),
    "detect_gdn.256.sm80": ((32, 64, 8, 1), (32, 16, 8, 1), "partition"),
    "repair_rest": ((32, 16, 8, 1), (32, 16, 8, 1), "partition"),
    "repair_rest.sm80": ((32, 32, 8, 1), (32, 16, 8, 1), "partition"),
    "repair_rest_gdn": ((32, 16, 8, 1), (32, 16, 8, 1), "partition"),
}
THREE_PROGRAMS = {"maxnreg": 168}  # of four warps on a multiprocessor, for a kernel that waits more than it multiplies
ALL_REGISTERS = {"maxnreg": 255}  # told so, the assembler does not spill to fit more programs on a multiprocessor


def head_values(x: float | torch.Tensor, heads: int, device: torch.device) -> torch.Tensor:
    """A number, or one a head, as contiguous fp32 [H], to be read only; a number costs no copy from the host."""
    if isinstance(x, torch.Tensor):
        return x.to(device, torch.float32).expand(heads).contiguous()
    return _filled(float(x), heads, device)


@lru_cache(maxsize=64)
def _filled(x: float, heads: int, device: torch.device) -> torch.Tensor:
    return torch.full((heads,), x, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class LaunchPlan:
    """How one problem is cut and launched.

    bf16 inputs are multiplied in bf16 with fp32 accumulation. fp16 has too little range for sums over a document, and a
    TF32 product truncates: fp16 inputs are multiplied as fp32 ones, in three TF32 products.
    """

    dtype: torch.dtype
    DK: int
    DV: int
    H: int
    G: int
    K: int
    gdn: bool
    tile: int = TILE
    tiles: int = TILES

    @property
    def group(self) -> int:
        return self.H // self.G

    @property
    def block(self) -> int:
        return self.tile * self.tiles

    @property
    def dot(self):
        """Operand type of the matrix units."""
        return tl.bfloat16 if self.dtype == torch.bfloat16 else tl.float32

    @property
    def state_dtype(self) -> torch.dtype:
        """Type of the state snapshots."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Type of dq (Gated DeltaNet: dQt) on its way between kernels; heads are added up in fp32."""
        return self.state_dtype if self.gdn else torch.float32

    @property
    def wide(self) -> bool:
        """Operands of 4 bytes: smaller tiles."""
        return self.dtype != torch.bfloat16

    @property
    def slots_padded(self) -> int:
        return power_of_two(self.K, 2)

    @property
    def window_rows(self) -> int:
        """Rows whose slot states are in memory at once; their gradients take as much again."""
        element = self.state_dtype.itemsize
        row = self.H * self.K * self.DK * self.DV * element
        # of a token half of the parts of dlam and of At .* M and dAt; Gated DeltaNet's At; Qt and Kh of tiles, of the
        # block, where they pass each tile, and their gradients; what is as large as a tile
        token = 10 * self.K + element * self.block
        if self.gdn:
            local = element * self.block + ((self.tiles + 5) * element + 4) * self.DK + (16 + element) * self.tile
            token += local // 2
        row += self.H * self.block * token
        return max(WINDOW_ROWS, WINDOW_BYTES // row)

    def found(self, kernel: str, device: torch.device) -> dict[str, int]:
        """What the table or a measured file says for these dims, dtype and GPU."""
        name = kernel
        for variant, holds in (
            (".256", self.DK > 128),
            (".v64", self.DV <= 64),
        ):
            if holds and name + variant in LAUNCH:
                name += variant
        capability = compute_capability(device)
        for variant, holds in ((".sm80", capability < 90), (".sm100", capability >= 100)):
            if holds and name + variant in LAUNCH:
                name += variant
        name += ".fp32" if self.wide else ""
        return launch_config(name, dtype=self.dtype, dk=self.DK, dv=self.DV, capacity=self.K, device=device)

    def launch(self, kernel: str, device: torch.device) -> dict[str, int]:
        """Head dims, tiles, warps and stages of one kernel."""
        found = self.found(kernel, device)
        found["BK"] = min(found["BK"], power_of_two(self.DK))
        found["BV"] = min(found["BV"], power_of_two(self.DV))
        return {"DK": self.DK, "DV": self.DV, **found}

    def read_slots(self, device: torch.device) -> dict[str, int]:
        """`launch` of that kernel; BQ queries in a program, as many as are read with one load of the slots."""
        tiles = 2 if self.tiles % 2 == 0 and not self.wide else 1
        return {"BQ": tiles * self.tile, **self.launch("read_slots", device)}

    def slot_query_gradient(self, device: torch.device) -> dict[str, int]:
        """The same; two tiles where they fit in registers: of one head, on Hopper."""
        fits = self.gdn and not self.wide and self.DK <= 128 and 64 < self.DV <= 128
        tiles = 2 if self.tiles % 2 == 0 and fits and 90 <= compute_capability(device) < 100 else 1
        return {"BQ": tiles * self.tile, **self.launch("slot_query_gradient", device)}

    def state_gradient(self, device: torch.device) -> dict[str, int]:
        """`launch` of that kernel; SLOTS of them in a program."""
        found = self.found("state_gradient", device)
        columns, dims = found["BV"], self.launch("state_gradient", device)
        dims["BV"] = min(dims["BV"], 32)  # of more slots: they share what is read
        dims["SLOTS"] = max(1, min(columns // dims["BV"], self.slots_padded))
        return dims

    def detect(self, gdn: bool, device: torch.device) -> dict[str, int]:
        """`launch` of detection; PK key (PV value) dims of a product with earlier tokens: as many as fit."""
        large, hopper = max(self.DK, self.DV) > 128, compute_capability(device) >= 90
        most = 16 if self.wide else 128 if hopper and not large else 32 if gdn or not large else 16
        dims = {"PK": min(most, power_of_two(self.DK)), "PV": min(most, power_of_two(self.DV))}
        return {**self.launch("detect_gdn" if gdn else "detect", device), **dims, **ALL_REGISTERS}

    @property
    def staged(self) -> bool:
        """Whether scans go slot by slot: all slots do not fit in one program, which has all key dims."""
        return self.gdn and self.wide and self.DK > 32

    def scan(self, device: torch.device, reverse: bool = False) -> dict[str, int]:
        """`launch` of a scan of Gated DeltaNet; BH of the reverse one: key dims after the first BK; BX of the other."""
        if self.staged:
            return self.launch("scan_gdn", device)
        found = self.found("slots_gdn_reverse" if reverse else "slots_gdn", device)
        columns = found["BV"] // (2 if self.K > 32 else 1)
        found["BK"] = min(found["BK"], power_of_two(self.DK))
        found["BV"] = max(1, min(columns // self.slots_padded, 8))
        if reverse:
            found["BH"] = power_of_two(self.DK - found["BK"]) if found["BK"] < self.DK else 0
        else:  # before Hopper operands take registers
            found["BX"] = 64 if compute_capability(device) >= 90 else 32
        return {"DK": self.DK, "DV": self.DV, **found, **ALL_REGISTERS}

    def carry(self, device: torch.device) -> dict[str, int]:
        """`launch` of the kernels that go over the blocks with Mamba-2's states."""
        found = self.found("carry", device)
        found["BV"] = max(16, min(found["BV"] // self.slots_padded, 256, power_of_two(self.DK * self.DV)))
        del found["BK"]
        return {"D": self.DK * self.DV, "KP": self.slots_padded, **found, **ALL_REGISTERS}

    def math(self) -> dict:
        return {"GDN": self.gdn, "DOT": self.dot, "PREC": PRECISION}

    def tiled(self) -> dict[str, int]:
        return {"BT": self.tile, "TILES": self.tiles}


for _name, (_bf16, _wide, _operation) in LAUNCH.items():
    for _suffix, _default in (("", _bf16), (".fp32", _wide)):
        _keys = dict(zip(("BK", "BV", "num_warps", "num_stages"), _default, strict=True))
        _candidates = [{"num_warps": w, "num_stages": s} for w in (4, 8) for s in (1, 2, 3)]
        if ".sm" in _name:  # `--tune` measures what the GPU at hand uses
            _candidates = []
        register(_name + _suffix, _keys, _candidates, operation=_operation)
