"""Gated DeltaNet, as flash-linear-attention writes it; softmax layers of a hybrid become pattern letter A."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_dla.config import LETTERS, ModelSection
from megatron_dla.hf.linear_family import Family, check_supported, mixer_entries
from megatron_dla.hf.mapping import Entry, softmax_entries

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_gate": (True,),
    "use_short_conv": (True,),
    "allow_neg_eigval": (False,),
    "conv_bias": (False,),
    "hidden_act": ("swish", "silu"),
    "output_gate_activation": ("swish", "silu"),
    "attnres_block_size": (None,),
}
_SUPPORTED_ATTENTION: dict[str, tuple[Any, ...]] = {
    "qkv_bias": (False,),
    "window_size": (None,),
    "qk_norm": (False,),
    "rope_scaling": (None,),
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_MIXER = {
    "g_proj.weight": ("gate",),
    "v_proj.weight": ("value",),
    "q_proj.weight": ("query",),
    "k_proj.weight": ("key",),
    "a_proj.weight": ("step",),
    "b_proj.weight": ("strength",),
    "v_conv1d.weight": ("conv_value",),
    "q_conv1d.weight": ("conv_query",),
    "k_conv1d.weight": ("conv_key",),
    "A_log": ("A_log",),
    "dt_bias": ("dt_bias",),
    "o_norm.weight": ("norm",),
    "o_proj.weight": ("out_proj.weight",),
}


def _section(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> ModelSection:
    check_supported(raw, _SUPPORTED, where)
    attention = raw.get("attn") or {}
    check_supported(attention, _SUPPORTED_ATTENTION, where, "attn.")
    softmax = attention.get("layers", [])
    section = ModelSection(
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        pattern="".join("A" if n in softmax else "D" for n in range(raw["num_hidden_layers"])),
        backbone="gdn",
        num_heads=raw.get("num_v_heads") or raw["num_heads"],
        num_groups=raw["num_heads"],
        key_dim=raw["head_dim"],
        value_dim=int(raw["head_dim"] * raw["expand_v"]),
        conv_kernel=raw["conv_size"],
        ffn_hidden_size=shapes["model.layers.0.mlp.up_proj.weight"][0],
        norm_eps=raw["norm_eps"],
    )
    if attention:
        section.attention_heads = attention["num_heads"]
        section.attention_groups = attention.get("num_kv_heads") or attention["num_heads"]
        section.rope_theta = float(attention.get("rope_theta", 10000.0))
    return section


def _layer(section: ModelSection, number: int, letter: str, dtype: torch.dtype) -> list[Entry]:
    ours, theirs = f"decoder.layers.{number}", f"model.layers.{number}"
    table = [Entry((f"{ours}.{key}",), (f"{theirs}.{name}",)) for key, name in _LAYER.items()]
    if LETTERS[letter].softmax:
        return table + softmax_entries(section, letter, f"{ours}.self_attention", f"{theirs}.attn")
    return table + mixer_entries(section, f"{ours}.self_attention", f"{theirs}.attn", _MIXER, dtype)


GATED_DELTANET = Family(
    architecture="GatedDeltaNetForCausalLM",
    embedding="model.embeddings.weight",
    final_norm="model.norm.weight",
    section=_section,
    layer=_layer,
)
