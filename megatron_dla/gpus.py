"""Known GPUs and their peak rates."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        processors: streaming multiprocessors. clock: boost, Hz. dense: FLOP/s of dense bf16 matrix products, the peak
            of MFU. memory: bytes/s of HBM. cache: bytes/s of L2 to all processors. shared: bytes of shared memory a
            processor. l2: bytes.
    """

    name: str
    processors: int
    clock: float
    dense: float
    memory: float
    cache: float
    shared: int
    l2: int

    @property
    def flops_a_clock(self) -> float:
        """Of one processor, dense bf16."""
        return self.dense / self.processors / self.clock


# NVIDIA's data sheets: A100 SXM 80GB, H100 SXM5, H200 SXM, B200 (HGX, dense figures). Processors and clocks: the
# architecture white papers. L2 rates: Chips and Cheese's measurements of A100 and H100 PCIe (about 5.5 TB/s at H100's
# SXM clock); B200 scaled by processors x clock.
GPUS = {
    "a100": Gpu("A100 SXM 80GB", 108, 1.41e9, 312e12, 2.04e12, 4.0e12, 164 << 10, 40 << 20),
    "h100": Gpu("H100 SXM5", 132, 1.755e9, 989e12, 3.35e12, 5.5e12, 228 << 10, 50 << 20),
    "h200": Gpu("H200 SXM", 132, 1.755e9, 989e12, 4.8e12, 5.5e12, 228 << 10, 50 << 20),
    "b200": Gpu("B200", 148, 1.85e9, 2250e12, 8.0e12, 7.0e12, 228 << 10, 126 << 20),
}


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU that a driver calls `device_name`, such as "NVIDIA H100 80GB HBM3"; None where its peak is not listed, as
    of H100's slower builds (PCIe, NVL)."""
    name = device_name.upper()
    if "H100" in name and ("PCIE" in name or "NVL" in name):
        return None
    return next((gpu for key, gpu in GPUS.items() if re.search(rf"\b{key}\b", name, re.IGNORECASE)), None)
