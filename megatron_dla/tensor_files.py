"""Safetensors files that others can read."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file that is on the disk on return, with the mode that the umask gives: safetensors makes it 600."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    os.chmod(path, mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())
