"""δ-mem's online memory: an r x r state that tokens read, then write (see README.md for the mathematics)."""

from .scan import BACKENDS, delta_mem_scan, delta_mem_step
from .summary import apply_summary, chunk_summary, compose

__all__ = ["BACKENDS", "apply_summary", "chunk_summary", "compose", "delta_mem_scan", "delta_mem_step"]
