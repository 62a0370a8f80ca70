"""Files of a run directory, read whatever is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_dla.files import parse_json


def number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf"):
        return float(value)
    return None


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The mappings of a JSON-lines file, and the number of other lines; without the file ([], 0)."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return [], 0
    found, unreadable = [], 0
    for line in filter(str.strip, text.splitlines()):
        try:
            value = parse_json(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            unreadable += 1
    return found, unreadable


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}
