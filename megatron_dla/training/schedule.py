"""Learning-rate schedule: linear warm-up, then cosine decay."""

from __future__ import annotations

import math

from megatron_dla.config import OptimizerSection


def lr_factor(step: int, section: OptimizerSection, total_steps: int) -> float:
    """Share of the peak learning rate for the optimizer step after `step` finished ones."""
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    span = max(1, total_steps - section.warmup_steps)
    progress = min(1.0, (step - section.warmup_steps) / span)
    return section.min_lr_ratio + (1 - section.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
