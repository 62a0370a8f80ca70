"""Metrics sinks: one console line and one JSON object per log step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_dla.errors import UserError
from megatron_dla.files import parse_json, write_text
from megatron_dla.metrics.meters import clock


def console_line(m: dict[str, Any], total_steps: int) -> str:
    """step/total, loss, grad norm, lr, tokens/s, MFU on known GPUs, share of time waiting for data, boundary rate,
    memory, ETA."""
    done = 100 * m["step"] / total_steps
    parts = [f"step {m['step']:>{len(str(total_steps))}}/{total_steps} ({done:.0f}%)"]
    if "loss" in m:
        norm = "-" if m["grad_norm"] is None or not math.isfinite(m["grad_norm"]) else f"{m['grad_norm']:.3f}"
        parts += [f"loss {m['loss']:.4f}", f"grad {norm}", f"lr {m['lr']:.2e}", f"{m['tokens_per_s']:,.0f} tok/s"]
        if "mfu" in m:
            parts.append(f"MFU {m['mfu']:.1%}")
        parts.append(f"data {m['data_wait_share']:.1%}")
        if m.get("boundary_rate") is not None:
            parts.append(f"boundaries {m['boundary_rate']:.3f}")
        if "gate" in m:
            parts.append(f"gate {m['gate']:.4f}")
        parts += [f"{m['memory_gb']:.2f} GB", f"eta {clock(m['eta_s'])}"]
    if "val_loss" in m:
        rate = f" ({m['val_bpb']:.4f} bits/byte)" if "val_bpb" in m else ""
        parts.append(f"val loss {m['val_loss']:.4f}{rate}")
    return " | ".join(parts)


class JsonlSink:
    """Appends to metrics.jsonl; on resume, drops the lines of steps that will be repeated.

    A line that could not be written as a whole (a full disk) is taken back by the next one.

    Attributes:
        last_step: the last one logged before, dropped or not; -1 without any.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, resumed_step: int | None) -> None:
        self.path = path
        self._keep(-1 if resumed_step is None else resumed_step)

    def _keep(self, last: int) -> None:
        path = self.path
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        steps = [_step(line) for line in lines]
        self.last_step = max((step for step in steps if step is not None), default=-1)
        kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= last]
        write_text(path, "".join(line + "\n" for line in kept))
        self._size = path.stat().st_size

    def write(self, metrics: dict[str, Any]) -> None:
        """Raises OSError where it cannot be written."""
        line = json.dumps({key: _finite(value) for key, value in metrics.items()}) + "\n"
        with self.path.open("ab") as file:
            file.truncate(self._size)
            file.write(line.encode())
        self._size += len(line.encode())

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps, which will be repeated. Raises OSError."""
        self._keep(step)

    def close(self, failed: bool = False) -> None:
        """Nothing is open."""


def _finite(value: Any) -> Any:
    """None for nan and inf, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> int | None:
    """None for a line that was cut short, whose step will be repeated."""
    try:
        step = parse_json(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All objects of a metrics.jsonl; a truncated last line is skipped.

    Raises:
        UserError: another line is none.
    """
    lines = [(number, line) for number, line in enumerate(path.read_bytes().splitlines(), 1) if line]
    if lines and not lines[-1][1].endswith(b"}"):
        lines.pop()
    found = []
    for number, line in lines:
        try:
            found.append(parse_json(line) | {})
            if type(found[-1].get("step")) is not int:
                raise ValueError("no step")
        except (ValueError, TypeError) as error:
            raise UserError(f"{str(path)!r}: line {number} is damaged ({error}): remove it") from error
    return found
