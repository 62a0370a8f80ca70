"""Dynamic Linear Attention: kernels and their float64 oracle (see README.md for the mathematics)."""

from .attention import decode_step, dla_attention, kernels_missing, partition
from .cache import Partition, SlotCache, beyond_kernels

__all__ = [
    "Partition",
    "SlotCache",
    "beyond_kernels",
    "decode_step",
    "dla_attention",
    "kernels_missing",
    "partition",
]
