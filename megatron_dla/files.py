"""Files that are there as a whole or not at all, checksums, and safetensors files with ordinary permissions.

Needs the standard library alone (safetensors is imported when tensors are written or read): launchers import this.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from megatron_dla.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from torch import Tensor


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CHUNK = 8 << 20  # bytes hashed and written at a time; Python's lock is free meanwhile


@contextmanager
def naming_full_disk(path: Path, size: int = 0) -> Iterator[None]:
    """An OSError of the body for a full disk, or a quota that is used up, names `path` and the bytes that it needs."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        need = f" ({size:,} bytes are needed, {free_bytes(path):,} are free)" if size else ""
        raise OSError(error.errno, f"{os.strerror(error.errno)}{need}", str(path)) from error


def check_out(out: Path | None, option: str = "--out") -> None:
    """Raises UserError where a directory that a command will write to cannot be one; nothing is made."""
    if out is None or out.is_dir():
        return
    if os.path.lexists(out):
        raise UserError(f"{option} {str(out)!r}: is a file, or a link that leads nowhere; give a directory")
    parent = next(path for path in out.absolute().parents if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {str(out)!r}: {str(parent)!r} is not a directory that can be written to")


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that a path is on, whether it exists or not."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


@contextmanager
def atomic_path(path: Path, *, fsync: bool = True) -> Iterator[Path]:
    """A temporary path in the same directory, renamed to `path` if the body succeeds and removed if it does not.

    A reader, on any node, sees the old file or the whole new one.

    Args:
        fsync: the content is on the disk before the rename, and the name after it. False for status files that only
            running processes read.

    Raises:
        OSError: the file cannot be written.
    """
    part = _temporary(path)
    try:
        with naming_full_disk(path):
            yield part
            if fsync:
                fsync_file(part)
            os.replace(part, path)
            if fsync:
                fsync_directory(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, fsync: bool = True) -> None:
    """Replace a file atomically, see `atomic_path`."""
    with atomic_path(path, fsync=fsync) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str, *, fsync: bool = True) -> None:
    """Replace a UTF-8 text file atomically, see `atomic_path`."""
    write_bytes(path, text.encode(), fsync=fsync)


def write_json(path: Path, value: Any, *, indent: int | None = None, fsync: bool = True) -> None:
    """Replace a JSON file, which ends in a newline, atomically, see `atomic_path`."""
    write_text(path, json.dumps(value, indent=indent) + "\n", fsync=fsync)


def create_json(path: Path, value: Any) -> bool:
    """Write a JSON file unless there is one. Of several processes, on any nodes, exactly one gets True."""
    part = _temporary(path)
    try:
        part.write_text(json.dumps(value))
        os.link(part, path)
        return True
    except FileExistsError:
        return False
    finally:
        part.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    # random: several threads, or nodes with equal host names and process ids (containers), may write the same file
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")


def fsync_file(path: Path) -> None:
    """Returns when the file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, also where it is nested too deeply or has too long a number."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def fsync_directory(path: Path) -> None:
    """Returns when the names in the directory are on the disk, as far as its file system can say so."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync names by themselves
            raise
    finally:
        os.close(descriptor)


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's content. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_TENSOR_TYPES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def _entry(x: Tensor, start: int) -> dict[str, Any]:
    """A tensor's part of a safetensors header."""
    kind = _TENSOR_TYPES[str(x.dtype).removeprefix("torch.")]
    return {"dtype": kind, "shape": list(x.shape), "data_offsets": [start, start + x.nbytes]}


def _content(x: Tensor) -> memoryview:
    import torch

    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def save_tensors(
    tensors: dict[str, Tensor],
    path: Path,
    metadata: dict[str, str] | None = None,
    *,
    private: bool = False,
    after_chunk: Callable[[int], None] | None = None,
) -> str:
    """Write a safetensors file that is on the disk on return; not atomic by itself (`atomic_path`).

    No copy is made of a contiguous CPU tensor. The bytes are hashed on their way to the file.

    Args:
        private: readable by its owner alone (0600). False: as the umask says.
        after_chunk: called with the file's descriptor after each piece of at most 8 MB.

    Returns:
        The file's SHA-256 in hex.

    Raises:
        OSError: the file cannot be written. It names the file and its size where the disk is full.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps all of them aligned
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        header[name] = _entry(tensors[name], end)
        end = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    digest = hashlib.sha256()
    with naming_full_disk(path, 8 + len(text) + end), _create(path, private) as file:
        head = memoryview(len(text).to_bytes(8, "little") + text)
        for data in chain([head], (_content(tensors[name]) for name in names)):
            for start in range(0, len(data), CHUNK):
                chunk = data[start : start + CHUNK]
                digest.update(chunk)
                file.write(chunk)
                if after_chunk:
                    after_chunk(file.fileno())
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _create(path: Path, private: bool) -> BinaryIO:
    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags, 0o600 if private else 0o666)
        if private:
            os.fchmod(descriptor, 0o600)  # of a file that was there
        return descriptor

    return open(path, "wb", opener=opener)


class TensorWriter:
    """Writes a safetensors file one tensor after another; room for the header is left at the start.

    Args:
        names: of all tensors that may be added. Tensors of wider dtypes should come first, for their alignment.

    Raises:
        OSError: the file cannot be written.
    """

    FLOATS: ClassVar = ("F64", "F32", "BF16", "F16")

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        longest = {"dtype": "BF16", "shape": [2**40] * 4, "data_offsets": [2**60, 2**60]}
        room = len(json.dumps(self._header | dict.fromkeys(names, longest)).encode())
        self._start = 8 + -(-room // 8) * 8
        self._path, self._file = path, path.open("wb")
        self._file.seek(self._start)
        self.nbytes = 0

    def __enter__(self) -> TensorWriter:
        return self

    def add(self, name: str, x: Tensor) -> None:
        self._header[name] = _entry(x, self.nbytes)
        self.nbytes += x.nbytes
        with naming_full_disk(self._path, self._start + self.nbytes):
            self._file.write(_content(x))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The header, padded with spaces, which the format allows; the file is on the disk on return. After an error
        there is no header, so that nothing reads the file."""
        with naming_full_disk(self._path, self._start + self.nbytes), self._file:
            if kind is None:
                header = json.dumps(self._header).encode().ljust(self._start - 8)
                self._file.seek(0)
                self._file.write(len(header).to_bytes(8, "little") + header)
                self._file.flush()
                os.fsync(self._file.fileno())


def compact(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy where it shares a larger storage, which a file or a variable would keep alive."""
    return x if x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes else x.contiguous().clone()


def check_weight(name: str, x: Tensor, where: str, fix: str) -> Tensor:
    """`x`, which is the tensor `name` of the file or directory `where`.

    Raises:
        CheckpointError: it is no weight (float64, float32, bfloat16, float16), or has values that are not finite.
    """
    import torch

    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(f"{where}: {name} holds {str(x.dtype).removeprefix('torch.')}, not float weights: {fix}")
    if not torch.isfinite(x).all():
        raise CheckpointError(f"{where}: {name} has values that are not finite (NaN or infinite): {fix}")
    return x


def open_tensors(path: Path) -> Any:
    """An open safetensors file, whose `get_tensor` reads one tensor into memory of its own.

    Read instead of mapped: the pages of a mapped file would count as this process's memory.

    Raises:
        OSError, safetensors.SafetensorError: the file is missing or damaged.
    """
    from safetensors import safe_open

    return safe_open(path, framework="pt", backend="pread")


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, copied: the file may be overwritten afterwards.

    Raises:
        OSError, safetensors.SafetensorError: the file is missing or damaged.
    """
    with open_tensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a mapping)
