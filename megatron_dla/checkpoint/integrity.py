"""Whether a checkpoint is whole: its marker, `complete.json`, holds size and SHA-256 of every other file, and its own.

That the marker is written last says that a save was finished. The checksums say what has happened to the files since:
damaged blocks, truncated copies, files of another step. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dla.checkpoint.find import COMPLETE, LAYOUT
from megatron_dla.errors import CheckpointError, UserError
from megatron_dla.files import file_sha256, fsync_directory, fsync_file, parse_json, write_text

FORMAT_VERSION = 2  # of layout.json; checkpoints of version 1 have no checksums
DATA_STATE = "data_state.json"
FilesRecord = dict[str, dict[str, Any]]
"""{path inside the checkpoint: {"size": bytes, "sha256": hex}}."""


def file_record(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """A file's entry in the marker; `sha256` where it is known already. Raises OSError."""
    return {"size": path.stat().st_size, "sha256": sha256 or file_sha256(path)}


def _digest(marker: Mapping[str, Any]) -> str:
    values = {key: value for key, value in marker.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _names(directory: Path) -> list[str]:
    """Files that a checkpoint is read from, but its marker; not what editors, NFS or a user left beside them."""
    parts = {".safetensors", ".pt"}
    found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(
        str(path)
        for path in found
        if not path.name.startswith(".") and (path.suffix in parts or str(path) in (LAYOUT, DATA_STATE))
    )


def seal(directory: Path, values: Mapping[str, Any], known: FilesRecord | None = None) -> None:
    """Make a directory a complete checkpoint: sync what is in it to the disk, then write the marker.

    Args:
        values: what the marker says beside checksums; `step` at least. known: records of files that are synced and
            hashed already.

    Raises:
        OSError: something cannot be written.
    """
    files = dict(known or {})
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = str(path.relative_to(directory))
        if name not in files and name != COMPLETE:
            fsync_file(path)
            files[name] = file_record(path)
    for folder in {directory, *((directory / name).parent for name in files)}:
        fsync_directory(folder)
    marker = {**values, "files": dict(sorted(files.items()))}
    write_text(directory / COMPLETE, json.dumps(marker | {"sha256": _digest(marker)}, indent=1))


def read_marker(directory: Path) -> dict[str, Any]:
    """The contents of `complete.json`, `files` among them unless an older version wrote it.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = directory / COMPLETE
    try:
        marker = parse_json(path.read_bytes())
        step = marker["step"]
        if type(step) is not int or not 0 <= step < 2**31:
            raise ValueError(f"step is {step!r}")
        if ("files" in marker or "sha256" in marker) and marker.get("sha256") != _digest(marker):
            raise ValueError("its content does not match its checksum")
        return marker
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is missing or damaged ({error!r}): use another checkpoint") from error


def _has_checksums(directory: Path) -> bool:
    """By layout.json, so that a marker which lost them does not pass for an older one."""
    try:
        return parse_json((directory / LAYOUT).read_bytes())["format_version"] >= FORMAT_VERSION
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False  # damaged: its own record in the marker says so


def _fault(directory: Path, name: str, record: Mapping[str, Any], content: bool) -> str:
    path = directory / name
    try:
        size = path.stat().st_size
        if size != record["size"]:
            return f"{name} has {size:,} bytes of {record['size']:,}"
        if content and file_sha256(path) != record["sha256"]:
            return f"the content of {name} does not match its checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return ""


def find_faults(
    directory: Path, names: Collection[str] | None = None, *, content: bool = True, rank: int = 0, size: int = 1
) -> list[str]:
    """What is wrong with a checkpoint, one text a file; empty: it is whole, or without checksums (an older one).

    Args:
        names: of the files to look at; None = all. content: False compares sizes, and hashes layout.json only.
        rank, size: hash the rank-th of `size` shares of about equal bytes; the union over ranks is the verdict.
    """
    try:
        marker = read_marker(directory)
    except CheckpointError as error:
        return [str(error.__cause__ and f"{COMPLETE} is damaged: {error.__cause__}")]
    files: FilesRecord | None = marker.get("files")
    match = re.fullmatch(r"step_(\d+)", directory.name)
    other = [f"{COMPLETE} is of step {marker['step']}"] if match and int(match[1]) != marker["step"] else []
    if files is None:
        return [f"{COMPLETE} has no checksums"] if _has_checksums(directory) else other
    faults = []
    if names is None:
        faults += other
        faults += [f"{name} is not part of it" for name in _names(directory) if name not in files]
    wanted = {name: record for name, record in files.items() if names is None or name in names}
    mine = _share(wanted, rank, size)
    return faults + [
        fault
        for name, record in wanted.items()
        if (fault := _fault(directory, name, record, name == LAYOUT or (content and name in mine)))
    ]


def _share(files: FilesRecord, rank: int, size: int) -> set[str]:
    """Largest files first, each to the rank with the least to read."""
    shares: list[set[str]] = [set() for _ in range(size)]
    loads = [0] * size
    for name in sorted(files, key=lambda name: (-files[name]["size"], name)):
        least = loads.index(min(loads))
        shares[least].add(name)
        loads[least] += files[name]["size"]
    return shares[rank]


@contextmanager
def naming_values(path: Path) -> Iterator[None]:
    """CheckpointError where what a file holds cannot be used, though its checksum is right: a tool wrote it so."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{str(path)!r} holds wrong or missing values ({error!r}): restore it, or delete this checkpoint to resume "
            "from an older one"
        ) from error


def damaged_error(directory: Path, faults: list[str], fix: str) -> CheckpointError:
    return CheckpointError(f"{describe_damage(directory, faults)}: {fix}")


def describe_damage(directory: Path, faults: list[str]) -> str:
    more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{str(directory)!r} is damaged ({faults[0]}{more})"


def newest_whole(
    steps: Sequence[Path], fall_back: bool, faults_of: Callable[[Path], list[str]]
) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest of a run's checkpoints without faults, and those newer than it with theirs; None: there are none.

    Args:
        steps: of `step_directories`. fall_back: whether an older one may be used. faults_of: `find_faults`; `steps` and
            its result are the same on every rank.

    Raises:
        CheckpointError: the newest is damaged and there is no older one, or it may not be used.
    """
    damaged: dict[Path, list[str]] = {}
    for path in reversed(steps):
        if not (faults := faults_of(path)):
            return path, damaged
        damaged[path] = faults
        if not fall_back:
            raise damaged_error(path, faults, "restore it, or set checkpoint.damaged=fallback to use an older one")
    if damaged:
        path = next(iter(damaged))
        raise damaged_error(path, damaged[path], "there is no other one; restore it, or delete it to start anew")
    return None, damaged
