"""Mamba-2, as transformers and flash-linear-attention write it: the same weights, and config.json with other keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from megatron_dla.config import ModelSection
from megatron_dla.hf.linear_family import Family, check_supported, mixer_entries, unsupported
from megatron_dla.hf.mapping import Entry

_SUPPORTED: dict[str, tuple[Any, ...]] = {"use_bias": (False,), "hidden_act": ("silu", "swish")}
# transformers ignores these keys, fla does not. Its two implementations assign heads to several groups differently
_SUPPORTED_FLA: dict[str, tuple[Any, ...]] = {
    "rmsnorm": (True,),
    "rms_norm": (True,),
    "norm_before_gate": (False,),
    "D_has_hdim": (False,),
    "n_groups": (1,),
}
# B is written to the state like a key, C reads it like a query
_MIXER = {
    "in_proj.weight": ("gate", "value", "key", "query", "step"),
    "conv1d.weight": ("conv_value", "conv_key", "conv_query"),
    "conv1d.bias": ("conv_value_bias", "conv_key_bias", "conv_query_bias"),
    "A_log": ("A_log",),
    "dt_bias": ("dt_bias",),
    "D": ("D",),
    "norm.weight": ("norm",),
    "out_proj.weight": ("out_proj.weight",),
}


def _section(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> ModelSection:
    fla = "norm_eps" in raw
    check_supported(raw, _SUPPORTED | (_SUPPORTED_FLA if fla else {}), where)
    for key in ("time_step_limit", "dt_limit"):
        if key in raw and not _unlimited(raw[key]):
            raise unsupported(where, key, raw[key], [0.0, math.inf])
    inner = int(raw["expand"] * raw["hidden_size"])
    return ModelSection(
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        pattern="D" * raw["num_hidden_layers"],
        backbone="mamba2",
        num_heads=inner // raw["head_dim"],
        num_groups=raw["n_groups"],
        key_dim=raw["state_size"],
        value_dim=raw["head_dim"],
        conv_kernel=raw["conv_kernel"],
        conv_bias=raw.get("use_conv_bias", True),
        gated_norm="group",
        ffn_hidden_size=0,
        norm_eps=raw["norm_eps" if fla else "layer_norm_epsilon"],
    )


def _unlimited(limit: Any) -> bool:
    """Whether no time step is clamped; transformers writes infinity as {"__float__": "Infinity"}."""
    low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in limit)
    return low <= 0 and high == math.inf


def _layer(section: ModelSection, number: int, letter: str, dtype: torch.dtype) -> list[Entry]:
    ours, theirs = f"decoder.layers.{number}", f"backbone.layers.{number}"
    norm = Entry((f"{ours}.input_layernorm.weight",), (f"{theirs}.norm.weight",))
    return [norm, *mixer_entries(section, f"{ours}.self_attention", f"{theirs}.mixer", _MIXER, dtype)]


MAMBA2 = Family(
    architecture="Mamba2ForCausalLM",
    embedding="backbone.embeddings.weight",
    final_norm="backbone.norm_f.weight",
    section=_section,
    layer=_layer,
)
