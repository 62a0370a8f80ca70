"""What a measurement was made on. Standard library only."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def machine() -> str:
    """Cores that this process may use, processor, system."""
    return f"{len(os.sched_getaffinity(0))} cores of {processor()}, {platform.platform()}"


def made_here() -> dict[str, str]:
    """Machine and date (UTC) of a measurement."""
    return {"machine": machine(), "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
