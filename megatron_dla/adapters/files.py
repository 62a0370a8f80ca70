"""An adapter as a directory: our safetensors form, or the published pair of files.

    adapter_model.safetensors + adapter_config.json     peft_type "DELTA_MEM", our whole config, base model
    delta_mem_config.json + delta_mem_adapter.pt        the published form (`upstream`); names no base model

PEFT itself cannot load the first: the correction depends on a state, so there is nothing to merge. A directory may hold
both; then the first is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_dla.adapters import upstream
from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.fingerprint import Fingerprint
from megatron_dla.errors import CheckpointError, ConfigError
from megatron_dla.files import atomic_path, check_weight, load_tensors, parse_json, save_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE = "DELTA_MEM"
Format = Literal["safetensors", "upstream"]


@dataclass
class Adapter:
    """What a directory holds.

    Attributes:
        tensors: by layer number and published name. base: None where the files do not name it.
    """

    config: DeltaMemConfig
    tensors: dict[int, dict[str, Tensor]]
    base: Fingerprint | None = None

    def sha256(self) -> str:
        """Of config and values (as fp32): the same for copies in other formats and for wider dtypes."""
        return adapter_sha256(self.config, self.tensors)


def empty_adapter() -> Adapter:
    """An adapter of no layers, which leaves any model as it is."""
    return Adapter(DeltaMemConfig(layers_to_transform=()), {})


def adapter_sha256(config: DeltaMemConfig, tensors: Mapping[int, Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for layer in sorted(tensors):
        for name in sorted(tensors[layer]):
            x = tensors[layer][name].detach().cpu().float().contiguous()
            digest.update(f"{layer}.{name}{list(x.shape)}".encode())
            digest.update(x.numpy().tobytes())
    return digest.hexdigest()


def write_adapter(
    directory: str | Path,
    adapter: Adapter,
    *,
    formats: Iterable[Format] = ("safetensors",),
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a directory, each file atomically, the configs last. Returns it.

    Args:
        dtype: of the stored tensors (fp32, bf16); None = as they are. Writing bf16 rounds.

    Raises:
        CheckpointError: there is an adapter already, or a file cannot be written; no new one is left then.
        ConfigError: the published form cannot hold this config.
    """
    directory, formats = Path(directory), tuple(formats)
    values = upstream.to_upstream(adapter.config) if "upstream" in formats else {}
    taken = [name for name in (CONFIG, WEIGHTS, upstream.CONFIG, upstream.WEIGHTS) if (directory / name).exists()]
    if taken and not overwrite:
        raise CheckpointError(f"{str(directory / taken[0])!r} exists: give a new directory, or allow overwriting")
    tensors = {
        layer: {name: x.detach().cpu().to(dtype or x.dtype).contiguous() for name, x in named.items()}
        for layer, named in adapter.tensors.items()
    }
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        if "upstream" in formats:
            with atomic_file(directory / upstream.WEIGHTS) as path:
                upstream.save_weights(tensors, path)
            _write_json(directory / upstream.CONFIG, values)
        if "safetensors" in formats:
            flat = {
                upstream.tensor_key(layer, name): x for layer, named in tensors.items() for name, x in named.items()
            }
            with atomic_file(directory / WEIGHTS) as path:
                save_tensors(flat, path, {"format": "pt"})
            base = adapter.base
            _write_json(directory / CONFIG, {
                "peft_type": PEFT_TYPE,
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base.name if base else None,
                "base_model_sha256": base.sha256 if base else None,
                "r": adapter.config.rank,
                "alpha": adapter.config.alpha,
                "delta_mem": adapter.config.to_dict(),
                "sha256": adapter_sha256(adapter.config, tensors),
            })  # fmt: skip
    except CheckpointError:  # weights without their config
        for name in {CONFIG, WEIGHTS, upstream.CONFIG, upstream.WEIGHTS} - set(taken):
            (directory / name).unlink(missing_ok=True)
        if made:
            directory.rmdir()
        raise
    return directory


def read_adapter(directory: str | Path) -> Adapter:
    """The adapter in a directory, of either form. No pickled code is run.

    Raises:
        CheckpointError: no adapter there, a damaged file, or one with an unsupported setting.
    """
    directory = Path(directory)
    if (directory / CONFIG).is_file():
        return _read_safetensors(directory)
    if not (directory / upstream.CONFIG).is_file():
        raise CheckpointError(f"{str(directory)!r} is not a δ-mem adapter: want {CONFIG} or {upstream.CONFIG} in it")
    where = repr(str(directory / upstream.CONFIG))
    config = upstream.from_upstream(_read_json(directory / upstream.CONFIG), where)
    tensors = upstream.load_weights(directory / upstream.WEIGHTS)
    for layer, named in tensors.items():
        for key, x in named.items():
            check_weight(upstream.tensor_key(layer, key), x, repr(str(directory)), "use an intact copy")
    upstream.drop_inactive(tensors, config, repr(str(directory / upstream.WEIGHTS)))
    return Adapter(config, tensors)


def _read_safetensors(directory: Path) -> Adapter:
    values, where = _read_json(directory / CONFIG), repr(str(directory / CONFIG))
    if values.get("peft_type") != PEFT_TYPE:
        raise CheckpointError(f"{where}: peft_type = {values.get('peft_type')!r}: only {PEFT_TYPE} adapters are loaded")
    try:
        config = DeltaMemConfig.from_dict(values["delta_mem"])
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is damaged ({error})") from error
    path = directory / WEIGHTS
    try:
        flat, _ = load_tensors(path)
    except Exception as error:
        raise CheckpointError(f"{str(path)!r} is missing or damaged ({error})") from error
    base = _base(values, where)
    for key, x in flat.items():
        check_weight(key, x, repr(str(path)), "use an intact copy")
    adapter = Adapter(config, upstream.by_layer(flat, path), base)
    if "sha256" in values and values["sha256"] != adapter.sha256():  # older versions wrote none
        raise CheckpointError(f"the content of {str(path)!r} does not match sha256 in {CONFIG}: use an intact copy")
    return adapter


def _base(values: dict[str, Any], where: str) -> Fingerprint | None:
    """The base model that a config names; None where it says null twice (converted from the published form)."""
    keys = ("base_model_sha256", "base_model_name_or_path")
    if missing := [key for key in keys if key not in values]:
        raise CheckpointError(f"{where} has no {missing[0]}: it would fit any base model; use an intact copy")
    sha, name = (values[key] for key in keys)
    if sha is None and name is None:
        return None
    if not isinstance(sha, str) or not sha or not isinstance(name, str):
        raise CheckpointError(f"{where}: base_model_sha256 = {sha!r}, base_model_name_or_path = {name!r}: want both")
    return Fingerprint(name, sha)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("not an object")
        return values
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged ({error})") from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_file(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """`atomic_path`. Raises CheckpointError where the file cannot be written."""
    try:
        with atomic_path(path) as part:
            yield part
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be written ({error})") from error
