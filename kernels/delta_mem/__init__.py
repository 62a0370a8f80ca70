"""δ-mem's online memory: an r x r state that tokens read, then write (see README.md for the mathematics)."""

from .scan import delta_mem_scan

__all__ = ["delta_mem_scan"]
