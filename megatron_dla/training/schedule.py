"""Schedules over steps: the learning rate and the temperature of annealed soft gates."""

from __future__ import annotations

import math

from megatron_dla.config import OptimizerSection, TauSection


def lr_factor(step: int, section: OptimizerSection, total_steps: int) -> float:
    """Factor on the peak learning rate for the optimizer step after `step` finished ones: linear warm-up, then cosine
    decay."""
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    span = max(1, total_steps - section.warmup_steps)
    progress = min(1.0, (step - section.warmup_steps) / span)
    return section.min_lr_ratio + (1 - section.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def gate_temperature(step: int, section: TauSection, total_steps: int) -> float | None:
    """Temperature of the soft gates for the optimizer step after `step` finished ones; None = hard slots.

    Falls geometrically from start to end over the first `anneal_share` of the steps.
    """
    soft_steps = round(section.anneal_share * total_steps)
    if section.gate != "annealed" or step >= soft_steps:
        return None
    ratio = section.temperature_end / section.temperature_start
    return section.temperature_start * ratio ** (step / max(1, soft_steps - 1))
