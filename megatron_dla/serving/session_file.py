"""A session as one safetensors file: states (fp32), token ids, metadata, and the key/value cache if wanted.

A checksum over all of it detects damaged and edited files. It is not a signature and does not prevent forgery.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dla.adapters.files import adapter_sha256, atomic_file
from megatron_dla.adapters.fingerprint import Fingerprint
from megatron_dla.adapters.memory import MemoryInputs, MemoryState
from megatron_dla.adapters.messages import Pending
from megatron_dla.errors import CheckpointError
from megatron_dla.files import load_tensors, parse_json, save_tensors
from megatron_dla.hf.directory import fingerprint
from megatron_dla.serving.hf_model import DeltaMemModel, States
from megatron_dla.serving.session import Session, cache_tensors, make_cache

FORMAT = "megatron_dla δ-mem session 2"
_CHECKSUM = "checksum"
_FIX = "use an intact copy, or start a new session with another file name"


def save_session(session: Session, path: str | Path, *, cache: bool = True) -> None:
    """Write the file atomically, readable by its owner alone.

    Args:
        cache: False = without keys and values, whose size grows with the context; loading computes them again.
    """
    model, base = session.model, fingerprint(session.model.base)
    tensors = {
        "ids": torch.tensor(session.ids, dtype=torch.long),
        "message_ids": torch.tensor(session.message_ids, dtype=torch.long),
        **_pack(session.states, "state"),
        **_pack(session.origin, "origin"),
    }
    metadata = {
        "format": FORMAT,
        "adapter_sha256": adapter_sha256(model.config, model.tensors()),
        "base_name": base.name,
        "base_sha256": base.sha256,
        "config": json.dumps(model.config.to_dict()),
        "granularity": model.config.write,
        "layers": json.dumps(model.layers),
        "tokens_seen": str(session.tokens_seen),
        "history": json.dumps(session.history),
    }
    if cache:
        for layer, (keys, values) in enumerate(cache_tensors(session.cache)):
            tensors |= {
                f"cache.{layer}.keys": keys.cpu().contiguous(),
                f"cache.{layer}.values": values.cpu().contiguous(),
            }
    metadata[_CHECKSUM] = _checksum(tensors, metadata)
    with atomic_file(Path(path)) as part:
        save_tensors(tensors, part, metadata, private=True)


def load_session(path: str | Path, model: DeltaMemModel, tokenizer: Any = None) -> Session:
    """The session of a file, on `model`: states bit for bit. Keys and values that are not in the file, or in another
    dtype than the model's, are recomputed from the token ids.

    Raises:
        CheckpointError: the file is missing, damaged, not a session, or of another adapter or base model.
    """
    tensors, metadata = _read(Path(path))
    try:
        base = Fingerprint(metadata["base_name"], metadata["base_sha256"])
        base.check(fingerprint(model.base), f"the session {str(path)!r}")
        if metadata["adapter_sha256"] != adapter_sha256(model.config, model.tensors()):
            raise CheckpointError(
                f"the session {str(path)!r} belongs to another adapter: give the one it was made with"
            )
        session = Session(model, tokenizer)
        session.states = _unpack(tensors, "state", model)
        session.origin = _unpack(tensors, "origin", model)
        session.ids, session.message_ids = tensors["ids"].tolist(), tensors["message_ids"].tolist()
        session.forgotten = int(metadata["tokens_seen"]) - len(session.ids)
        session.history = parse_json(metadata["history"])
        session.cache = _cache(tensors, session)
    except CheckpointError:
        raise
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged(path, str(error)) from error
    return session


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors, metadata = load_tensors(path)
    except Exception as error:  # safetensors raises its own and OSError alike
        raise CheckpointError(f"{str(path)!r} is missing, damaged or not a session ({error}): {_FIX}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{str(path)!r} is not a δ-mem session of this version (format {metadata.get('format')!r}, want "
            f"{FORMAT!r}): {_FIX}"
        )
    if metadata.pop(_CHECKSUM, None) != _checksum(tensors, metadata):
        raise _damaged(path, "its contents do not match its checksum")
    return tensors, metadata


def _damaged(path: str | Path, why: str) -> CheckpointError:
    return CheckpointError(f"{str(path)!r} is a damaged session ({why}): {_FIX}")


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """sha256 over the metadata and each tensor's name, dtype, shape and CRC-32; the cache may be gigabytes, and a CRC
    costs a tenth of a sha256."""
    parts = {
        name: [str(x.dtype), list(x.shape), zlib.crc32(x.contiguous().flatten().view(torch.uint8).numpy().data)]
        for name, x in tensors.items()
    }
    return hashlib.sha256(json.dumps([metadata, parts], sort_keys=True).encode()).hexdigest()


def _pack(states: States, name: str) -> dict[str, Tensor]:
    """One stacked tensor [layers, ...] of each part."""
    order = [states[layer] for layer in sorted(states)]
    parts = {f"{name}.S": [state.S[0] for state in order]}
    for key in ("total", "count", "message"):
        parts[f"{name}.{key}"] = [getattr(state.pending, key)[0] for state in order if state.pending is not None]
    return {key: torch.stack(values).cpu() for key, values in parts.items() if values}


def _unpack(tensors: dict[str, Tensor], name: str, model: DeltaMemModel) -> States:
    states = {}
    for at, (layer, empty) in enumerate(sorted(model.initial_states(1).items())):
        pending = empty.pending
        if pending is not None:
            pending = Pending(*(tensors[f"{name}.{key}"][at][None].to(empty.S.device) for key in vars(pending)))
        S = tensors[f"{name}.S"][at][None].to(empty.S.device)
        if S.shape != empty.S.shape:
            raise ValueError(f"{name} of {list(S.shape)}, want {list(empty.S.shape)}")
        states[layer] = MemoryState(S, pending)
    return states


def _cache(tensors: dict[str, Tensor], session: Session) -> Any:
    """From the file, or by one pass over the tokens (whose states are not used)."""
    model, ids = session.model, session.ids
    if not ids:
        return make_cache([])
    found: list[tuple[Tensor, Tensor]] = []
    while (keys := tensors.get(f"cache.{len(found)}.keys")) is not None:
        found.append((keys.to(model.device), tensors[f"cache.{len(found)}.values"].to(model.device)))
    if found and found[0][0].dtype == model.base.dtype:
        wrong = [x for pair in found for x in pair if x.shape[2] != len(ids)]
        if wrong or len(found) != model.base.config.num_hidden_layers:
            raise ValueError("the cache does not fit the token ids")
        return make_cache(found)
    cache = make_cache([])
    message = torch.tensor([session.message_ids], device=model.device) if session.writes_messages else None
    with torch.no_grad():
        model(
            torch.tensor([ids], device=model.device), states=session.origin, inputs=MemoryInputs(message=message),
            past_key_values=cache, use_cache=True, logits_to_keep=1, control=session.control,
        )  # fmt: skip
    return cache
