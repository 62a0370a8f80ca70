"""Angles of rotary positions (copied into every exported directory)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_frequencies(
    dim: int,
    theta: float,
    rope_type: str = "default",
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_length: int = 8192,
) -> Tensor:
    """fp32 [dim / 2], radians a token: theta^(-2 i / dim), stretched by `rope_type`.

    `linear` (position interpolation, arXiv 2306.15595) divides all of them by `factor`. `llama3` (arXiv 2407.21783)
    divides those that turn fewer than `low_freq_factor` times in `original_length` tokens, leaves those alone that turn
    more than `high_freq_factor` times, and goes linearly from one to the other in between.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope_type == "linear":
        return frequencies / factor
    if rope_type == "llama3":
        turns = original_length * frequencies / (2 * math.pi)
        kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / factor)
    return frequencies
