"""Launch configurations of the Triton kernels: built-in defaults, and measured ones per GPU from `kernels/tuned/`.

Nothing is tuned at run time: a configuration is looked up in a file that `dla bench kernels --tune` wrote once, so
step 1 is as fast as step 1000 and two runs on one machine launch the same code. A kernel's module calls `register`
once and `launch_config` at each launch:

    register("output", {"num_warps": 8, "num_stages": 3}, candidates=[{"num_warps": 4}, ...], operation="forward")
    kernel[grid](..., **launch_config("output", dtype=q.dtype, dk=Dk, dv=Dv, capacity=K, device=q.device))

A configuration may change how a kernel rounds, and the partition kernels' rounding decides borderline boundaries.
That can never make forward and recomputation disagree: the partition is computed once, saved, and given to both.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Config = dict[str, int]
DIRECTORY = Path(__file__).resolve().parents[1] / "tuned"
FALLBACK: Config = {"num_warps": 4, "num_stages": 2}
OPERATIONS = ("partition", "forward", "backward", "decode")
_ENTRY = {"kernel": str, "dtype": str, "dk": int, "dv": int, "capacity": int, "config": dict}


@dataclass(frozen=True)
class Tunable:
    """What a kernel's module says about it: its default, what `--tune` may try, and the operation that is timed."""

    default: Config
    candidates: tuple[Config, ...]
    operation: str


KERNELS: dict[str, Tunable] = {}
_forced: dict[str, Config] = {}


def register(kernel: str, default: Mapping[str, int], candidates: Sequence[Mapping[str, int]] = (), *, operation: str):
    """Declare a kernel; a candidate names only what differs from `default`.

    Raises:
        ValueError: `operation` is none of `OPERATIONS`, or a candidate sets something that `default` does not.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"register({kernel!r}): operation must be one of {OPERATIONS}, got {operation!r}")
    for candidate in candidates:
        if unknown := set(candidate) - set(default):
            raise ValueError(f"register({kernel!r}): a candidate sets {sorted(unknown)}, which the default lacks")
    full = tuple({**default, **candidate} for candidate in candidates)
    KERNELS[kernel] = Tunable(dict(default), full, operation)
    _lookup.cache_clear()


def gpu_slug(name: str) -> str:
    """`NVIDIA H200` -> `nvidia-h200`: the file name of a GPU's configurations."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def _device_slug(index: int) -> str:
    return gpu_slug(torch.cuda.get_device_name(index))


def _slug(device: torch.device | str | int | None) -> str | None:
    """The GPU's slug, None for a CPU (the interpreter) or where no GPU is there."""
    device = torch.device("cuda" if device is None else device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return _device_slug(torch.cuda.current_device() if device.index is None else device.index)


def tuned_path(slug: str) -> Path:
    """Where the configurations of a GPU stand."""
    return DIRECTORY / f"{slug}.json"


@functools.cache
def load_entries(path: Path) -> tuple[dict[str, Any], ...]:
    """The entries of a tuned file, read once; () where there is no file.

    Raises:
        ValueError: the file is damaged; the message names it and the fix.
    """
    if not path.is_file():
        return ()
    try:
        entries = json.loads(path.read_text())["entries"]
        for entry in entries:
            for key, kind in _ENTRY.items():
                if not isinstance(entry[key], kind):
                    raise TypeError(f"{key} = {entry[key]!r}")
            if not all(type(x) is int for x in entry["config"].values()):
                raise TypeError(f"config = {entry['config']!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error!r}): remove it, or write it again with `dla bench kernels --tune`"
        ) from error
    return tuple(entries)


def _bucket(dim: int) -> int:
    """Head dims are padded to a power of two in the kernels, at least 16: one entry serves all that pad alike."""
    return max(16, 1 << (dim - 1).bit_length())


def _best_entry(entries: Sequence[dict[str, Any]], kernel: str, dtype: str, dk: int, dv: int, capacity: int):
    """The entry measured at the smallest capacity that is at least the asked one: it surely fits the hardware."""
    fits = [
        e
        for e in entries
        if (e["kernel"], e["dtype"]) == (kernel, dtype)
        and (_bucket(e["dk"]), _bucket(e["dv"])) == (_bucket(dk), _bucket(dv))
        and e["capacity"] >= capacity
    ]
    return min(fits, key=lambda e: e["capacity"], default=None)


@functools.cache
def _lookup(kernel: str, dtype: str, dk: int, dv: int, capacity: int, slug: str | None) -> Config:
    """`launch_config` with a hashable key; forget the answers with `reload`."""
    default = KERNELS[kernel].default if kernel in KERNELS else FALLBACK
    found = None if slug is None else _best_entry(load_entries(tuned_path(slug)), kernel, dtype, dk, dv, capacity)
    if found is None:
        return dict(default)
    return {**default, **{name: value for name, value in found["config"].items() if name in default}}


def launch_config(
    kernel: str, *, dtype: torch.dtype, dk: int, dv: int, capacity: int, device: torch.device | str | int | None = None
) -> Config:
    """Keyword arguments of a launch (`num_warps`, `num_stages` and the block sizes that the kernel registered).

    Args:
        kernel: the registered name; an unknown one gets `FALLBACK`.
        dtype: of q, k and v. dk, dv: head dims. capacity: K.
        device: where it runs; anything but a CUDA device gets the default.

    Deterministic: the same arguments give the same answer for the life of the process. A name in the file that the
    kernel no longer registers is ignored.
    """
    if kernel in _forced:
        return dict(_forced[kernel])
    return dict(_lookup(kernel, dtype_name(dtype), dk, dv, capacity, _slug(device)))


@contextmanager
def forced(kernel: str, config: Mapping[str, int]) -> Iterator[None]:
    """Launch `kernel` with `config` inside the block: for `--tune` and for tests only."""
    before = _forced.get(kernel)
    _forced[kernel] = dict(config)
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


def reload() -> None:
    """Read the files again (after `--tune` wrote one)."""
    load_entries.cache_clear()
    _lookup.cache_clear()
