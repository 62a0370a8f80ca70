"""Dynamic Linear Attention: kernels and their float64 oracle (see README.md for the mathematics)."""

from .attention import decode_step, dla_attention, partition
from .cache import Partition, SlotCache

__all__ = ["Partition", "SlotCache", "decode_step", "dla_attention", "partition"]
