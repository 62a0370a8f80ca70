"""Mutations of bytes, JSON values, tensors and arrays, each drawn from a `random.Random`."""

from __future__ import annotations

import copy
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e-300, 1e308, -1e308,
    float("nan"), float("inf"), "", " ", "0", "4", "nan", "None", "/", "..", "a/b", "\0", "\x1b[31m", "é" * 300,
    "\ud800", "x" * 100_000, [], {}, [None], [0], [[]], [{}], {"": 0}, {"a": {"a": {}}},
]  # fmt: skip


def mutate_bytes(random: random.Random, data: bytes) -> bytes:
    """Flips, cuts, zeros, repeats and inserts some bytes, or replaces all of them."""
    n = len(data)
    at, length = random.randrange(n + 1), random.choice((1, 8, 64, 512))
    match random.randrange(9):
        case 0:
            flipped = bytearray(data)
            for _ in range(random.choice((1, 1, 4, 32))):
                flipped[random.randrange(n)] ^= 1 << random.randrange(8)
            return bytes(flipped)
        case 1:
            return data[:at]
        case 2:
            return data[:at] + bytes(n - at)
        case 3:
            return data[:at] + data[at : at + length] + data[at:]
        case 4:
            return data[:at] + random.randbytes(length) + data[at:]
        case 5:
            return data[:at] + data[at + length :]
        case 6:
            return data[:at] + b"\xff" * length + data[at + length :]
        case 7:
            return random.choice((b"", b"\0", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000))
        case _:
            return data + random.choice((data, b"\n", b"\0" * 4096, random.randbytes(64)))


def mutate_value(random: random.Random, value: Any) -> Any:
    """A copy of nested dictionaries and lists with one place changed: another value, less, more, another type."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                collect(node[key])

    collect(value)
    if not places or random.random() < 0.02:
        return random.choice(HOSTILE)
    node, key = random.choice(places)
    match random.randrange(8):
        case 0:
            del node[key]
        case 1:
            node[key] = [node[key]]
        case 2:
            node[key] = str(node[key])
        case 3 if isinstance(node, dict):
            node[f"{key}x"] = node.pop(key)
        case 3:
            node.append(copy.deepcopy(node[key]))
        case 4 if isinstance(node[key], (int, float)):
            node[key] = random.choice((-node[key], node[key] + 1, node[key] * 1000, node[key] / 3, node[key] - 1))
        case _:
            node[key] = random.choice(HOSTILE)
    return value


def mutate_json(random: random.Random, data: bytes) -> bytes:
    """A JSON file with one value changed, or with its bytes."""
    if random.random() < 0.25:
        return mutate_bytes(random, data)
    return json.dumps(mutate_value(random, json.loads(data))).encode(errors="surrogatepass")


Change = Callable[[torch.Tensor], torch.Tensor]
CHANGES: dict[str, Change] = {  # by what must be refused, since the values then mean nothing
    "nan": lambda x: x.clone().flatten().index_fill(0, torch.tensor([x.numel() // 2]), float("nan")).view_as(x),
    "inf": lambda x: x.clone().flatten().index_fill(0, torch.tensor([0]), float("inf")).view_as(x),
    "int32": lambda x: x.to(torch.int32),
    "int8": lambda x: x.to(torch.int8),
    "transposed": lambda x: x.mT.contiguous(),
    "one row less": lambda x: x[1:].clone(),
    "flat": lambda x: x.flatten(),
    "one more dimension": lambda x: x[None],
    "empty": lambda x: x[:0].clone(),
}


def mutate_tensors(random: random.Random, data: bytes, scratch: Path) -> tuple[bytes, bool]:
    """A safetensors file with one tensor changed, missing or renamed, or with its header or bytes.

    Returns:
        The file, and whether reading it must fail.
    """
    scratch.write_bytes(data)
    tensors = load_file(scratch)
    name = random.choice(sorted(key for key, x in tensors.items() if x.is_floating_point()))
    x, choice = tensors[name], random.randrange(16)
    if choice < 3:
        return mutate_bytes(random, data), False
    if choice < 5:
        size = int.from_bytes(data[:8], "little")
        header = mutate_json(random, data[8 : 8 + size])
        return len(header).to_bytes(8, "little") + header + data[8 + size :], False
    if choice == 5:
        del tensors[name]
    elif choice == 6:
        tensors[f"{name}x"] = tensors.pop(name)
    elif choice == 7:
        tensors[name] = x.to(random.choice((torch.float64, torch.bfloat16, torch.float16)))
    else:
        kind = random.choice(sorted(CHANGES))
        if kind in ("transposed", "flat") and (x.dim() < 2 or x.shape[-1] == x.shape[-2]):
            kind = "nan"
        tensors[name] = CHANGES[kind](x)
    save_file(tensors, scratch, {"format": "pt"})
    return scratch.read_bytes(), choice != 7


def mutate_array(random: random.Random, data: bytes) -> bytes:
    """An .npy file of another shape, dtype or content, or with changed bytes."""
    x = np.load(io.BytesIO(data))
    made: list[Callable[[], np.ndarray]] = [
        lambda: np.array(5, x.dtype),
        lambda: x[None],
        lambda: x[:0],
        lambda: x.astype(np.float64),
        lambda: x.astype(np.int64) * -1,
        lambda: x.astype(np.uint64) + 2**63,
        lambda: np.array([str(v) for v in x.ravel()[:9]]),
        lambda: x.astype(bool),
        lambda: x[::-1],
        lambda: np.asfortranarray(np.stack([x, x])),
        lambda: np.zeros((0, 3), x.dtype),
        lambda: np.full_like(x, np.iinfo(x.dtype).max) if x.dtype.kind in "iu" else x,
    ]
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    out = io.BytesIO()
    np.save(out, random.choice(made)())
    return out.getvalue()


def mutate_tar(random: random.Random, data: bytes) -> bytes:
    """A shard with a member changed, missing, repeated, renamed or of another kind, or with changed bytes."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]  # type: ignore[union-attr]
    at = random.randrange(len(members))
    name, content = members[at]
    kind = tarfile.REGTYPE
    match random.randrange(9):
        case 0:
            return mutate_bytes(random, data)
        case 1:
            del members[at]
        case 2:
            members.insert(at, members[at])
        case 3:
            members[at] = (random.choice(("../x", "/etc/x", "a\n.npy", name + "x", "x." + name, "é.npy")), content)
        case 4:
            kind = random.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE))
        case _:
            change = mutate_array if name.endswith(".npy") else mutate_json
            members[at] = (name, change(random, content))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i, (name, content) in enumerate(members):
            info = tarfile.TarInfo(name)
            if i == at and kind != tarfile.REGTYPE:
                info.type, info.linkname, content = kind, "elsewhere", b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()
