"""The published adapter files: delta_mem_config.json + delta_mem_adapter.pt.

Names of keys and tensors are the published ones; the code is ours. A setting that would be computed differently here is
an error that names it. Not representable there, hence not written: `memory = "static"`, reads between the messages of
one call, and the initial values of an uncoupled keep gate (the trained ones are tensors).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.errors import CheckpointError, ConfigError

CONFIG, WEIGHTS = "delta_mem_config.json", "delta_mem_adapter.pt"
_SAME = {  # ours: published
    "rank": "rank",
    "alpha": "alpha",
    "num_states": "num_state_heads",
    "rowwise_gates": "rankwise_gates",
    "couple_lambda": "couple_lambda",
    "update": "state_update_mode",
    "beta_bias": "beta_bias_init",
    "output_init": "output_init",
    "output_gain": "online_gain",
    "reference_width": "base_slice_ref_width",
}
_WRITE = {"token": "token", "message": "message_mean"}
# published switches that change the mathematics: the value that ours has
_FIXED = {
    "normalize_qk": True,
    "delta_o_rmsnorm": False,
    "trainable_delta_scale": False,
    "num_memory_partitions": 1,
    "num_global_memory_partitions": 0,
    "memory_reader_layers": [],
    "latent_memory_layers": [],
    "memory_readout_mode": "delta",
    "memory_write_source": "learned_hidden",
    "target_modules": ["self_attn"],
    "delta_scale_parameterization": "alpha_over_rank",
}
# published keys without effect while those have these values
_INERT = re.compile(
    r"(global_memory_|memory_partition_|memory_reader_|latent_|delta_scale_|synthetic_memory_|slot_read_)\w+"
    r"|delta_o_rmsnorm_eps|tie_memory_partition_read_write|memory_write_proposals_per_message"
)
_KEY = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.(\w+)")


def tensor_key(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.{name}"


def by_layer(tensors: Mapping[str, Tensor], path: Path) -> dict[int, dict[str, Tensor]]:
    """Flat names -> parameters by layer number. Raises CheckpointError on a name of another kind."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{str(path)!r}: tensor {key!r} is not one of a δ-mem adapter")
        found.setdefault(int(match[1]), {})[match[2]] = value
    return found


def to_upstream(config: DeltaMemConfig) -> dict[str, Any]:
    """Published keys of a config. Raises ConfigError where the format cannot express it."""
    if config.memory != "online":
        raise ConfigError("delta_mem.memory = 'static' has no published form: write the safetensors format")
    if config.max_output_ratio:
        raise ConfigError(
            f"delta_mem.max_output_ratio = {config.max_output_ratio!r} has no published form: write the "
            "safetensors format"
        )
    if config.write == "message" and config.message_read != "pre_call":
        raise ConfigError(
            "delta_mem.message_read = 'streaming' has no published form (its code reads once a call): write the "
            "safetensors format, or set message_read to 'pre_call' and know that it was trained otherwise"
        )
    values = {published: getattr(config, ours) for ours, published in _SAME.items()}
    values["beta_bias_init"] = config.gate_biases[0]
    values |= {
        "delta_heads": [name.removesuffix("_proj") for name in config.target_modules],
        "target_layers": list(config.layers_to_transform or ()),
        "memory_write_granularity": _WRITE[config.write],
    }
    return values | _FIXED


def from_upstream(values: Mapping[str, Any], where: str) -> DeltaMemConfig:
    """Our config of a published one. Keys that are absent have their published defaults, which are ours but for
    `delta_heads` (all four) and `output_init` ("zero").

    Raises:
        CheckpointError: a key is unknown, or asks for something that is not implemented here.
    """
    for key, value in values.items():
        if key in _FIXED and (list(value) if isinstance(value, (list, tuple)) else value) != _FIXED[key]:
            raise CheckpointError(f"{where}: {key} = {value!r} is not supported, only {_FIXED[key]!r}")
        known = key in (*_SAME.values(), *_FIXED, "delta_heads", "target_layers", "memory_write_granularity")
        if not known and not _INERT.fullmatch(key):
            raise CheckpointError(f"{where}: unknown key {key!r}")
    granularity = values.get("memory_write_granularity", "token")
    write = {published: ours for ours, published in _WRITE.items()}.get(granularity)
    if write is None:
        raise CheckpointError(
            f"{where}: memory_write_granularity = {granularity!r} is not supported, only {', '.join(_WRITE.values())}"
        )
    heads = values.get("delta_heads", ["q", "k", "v", "o"])
    heads = [head.strip() for head in heads.split(",")] if isinstance(heads, str) else heads
    ours: dict[str, Any] = {name: values[published] for name, published in _SAME.items() if published in values}
    ours.setdefault("output_init", "zero")
    ours |= {"write": write, "message_read": "pre_call" if write == "message" else "streaming"}
    ours["target_modules"] = tuple(f"{head}_proj" for head in heads if head in "qo")
    ours["layers_to_transform"] = values.get("target_layers") or None
    try:
        ours["lambda_bias"] = -float(ours.get("beta_bias", -1.5))
        return DeltaMemConfig(**ours)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def drop_inactive(tensors: dict[int, dict[str, Tensor]], config: DeltaMemConfig, where: str) -> None:
    """Remove, in place, the steering heads that `config` does not use. Raises CheckpointError if one is not zero."""
    for layer, parameters in tensors.items():
        for head in "qkvo":
            name = f"delta_{head}_proj"
            if f"{head}_proj" in config.target_modules or name not in parameters:
                continue
            if parameters.pop(name).count_nonzero():
                raise CheckpointError(
                    f"{where}: {name} of layer {layer} is not zero, but steering of {head!r} is "
                    + ("switched off in its config" if head in "qo" else "not supported (only q and o are)")
                )


def save_weights(tensors: dict[int, dict[str, Tensor]], path: Path) -> None:
    flat = {tensor_key(layer, name): x.cpu() for layer, named in tensors.items() for name, x in named.items()}
    data = io.BytesIO()  # a few MB; to a file, torch would raise an error of its own where the disk is full
    torch.save(flat, data)
    path.write_bytes(data.getbuffer())


def load_weights(path: Path) -> dict[int, dict[str, Tensor]]:
    """Tensors by layer. Raises CheckpointError on anything but a plain dictionary of tensors: no code is run."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile raise their own
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{str(path)!r} is damaged, or holds more than tensors ({reason})") from error
    plain = isinstance(found, dict) and all(isinstance(x, Tensor) and isinstance(k, str) for k, x in found.items())
    if not plain or not found:
        raise CheckpointError(f"{str(path)!r} is not a δ-mem adapter: want a dictionary of tensors")
    return by_layer(found, path)
