"""A Gated DeltaNet of flash-linear-attention, from its Hugging Face directory, as a DLA model that starts equal to it.

Slot weights start at 1 (`slot_weight_init: backbone`), and slots that are all read with weight 1 are together the one
state of the plain layer. Softmax layers of a hybrid become pattern letter A. A setting that would be computed
differently here is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dla.config import LETTERS, ModelSection, check_model, layer_letters
from megatron_dla.errors import CheckpointError
from megatron_dla.hf.backbones import BackboneInfo
from megatron_dla.hf.directory import CONFIG, DirectoryWeights, read_config
from megatron_dla.hf.mapping import Entry, Renamed, check_names, parameter_tags, softmax_entries
from megatron_dla.mixers.layout import FP32_PARAMETERS, Init, dla_parameters
from megatron_dla.model.parameters import model_parameters

MODEL_TYPE = "gated_deltanet"
# model_type -> why it cannot be imported, for models of fla that have a DLA backbone's name
_OTHERS = {
    "mamba2": "it has no MLPs, biases in its convolutions and one norm over all heads, which DLA layers do not have; "
    "import a gated_deltanet model",
}
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
_MODEL = {
    "embedding.word_embeddings.weight": "model.embeddings.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
# parameters and sections of a mixer; those that are not here begin with their initial values
_MIXER = {
    "gate": "g_proj.weight",
    "value": "v_proj.weight",
    "query": "q_proj.weight",
    "key": "k_proj.weight",
    "step": "a_proj.weight",
    "strength": "b_proj.weight",
    "conv_value": "v_conv1d.weight",
    "conv_query": "q_conv1d.weight",
    "conv_key": "k_conv1d.weight",
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "norm": "o_norm.weight",
    "out_proj.weight": "o_proj.weight",
}


def is_fla(config: Mapping[str, Any]) -> bool:
    """Whether the contents of config.json are of a model that `read_fla` reads, or says why it does not."""
    return config.get("model_type") == MODEL_TYPE or config.get("model_type") in _OTHERS


def read_fla(hf_dir: str | Path, capacity: int, tau: float) -> tuple[ModelSection, BackboneInfo]:
    """Model section and the rest, from config.json and the shapes of the weights.

    Args:
        capacity, tau: of the new model's slots.

    Raises:
        CheckpointError: no such file, another architecture, or a setting that would be computed differently here.
        ConfigError: `capacity` or `tau` is out of range.
    """
    fix = "give a directory that save_pretrained wrote"
    raw, where = read_config(hf_dir, fix), repr(str(Path(hf_dir) / CONFIG))
    if reason := _OTHERS.get(str(raw.get("model_type"))):
        raise CheckpointError(f"{where}: model_type = {raw['model_type']} cannot become a DLA model: {reason}")
    _check_supported(raw, _SUPPORTED, where, "")
    attention = raw.get("attn") or {}
    _check_supported(attention, _SUPPORTED_ATTENTION, where, "attn.")
    shapes = DirectoryWeights(hf_dir).shapes
    try:
        layers, heads = raw["num_hidden_layers"], raw.get("num_v_heads") or raw["num_heads"]
        softmax = attention.get("layers", [])
        section = ModelSection(
            hidden_size=raw["hidden_size"],
            num_layers=layers,
            pattern="".join("A" if n in softmax else "D" for n in range(layers)),
            backbone="gdn",
            num_heads=heads,
            num_groups=raw["num_heads"],
            key_dim=raw["head_dim"],
            value_dim=int(raw["head_dim"] * raw["expand_v"]),
            conv_kernel=raw["conv_size"],
            capacity=capacity,
            tau=tau,
            ffn_hidden_size=shapes["model.layers.0.mlp.up_proj.weight"][0],
            norm_eps=raw["norm_eps"],
            init_std=raw.get("initializer_range", ModelSection.init_std),
            tie_embeddings=raw.get("tie_word_embeddings", False),
            vocab_multiple=raw["vocab_size"],
        )
        if attention:
            section.attention_heads = attention["num_heads"]
            section.attention_groups = attention.get("num_kv_heads") or attention["num_heads"]
            section.rope_theta = float(attention.get("rope_theta", 10000.0))
        info = BackboneInfo(
            "GatedDeltaNetForCausalLM", raw["vocab_size"], raw["max_position_embeddings"], raw.get("dtype") or "float32"
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is damaged ({error!r}): {fix}") from error
    check_model(section)
    return section, info


def _check_supported(found: Mapping[str, Any], wanted: dict[str, tuple[Any, ...]], where: str, prefix: str) -> None:
    for key, values in wanted.items():
        if key in found and found[key] not in values:
            raise CheckpointError(
                f"{where}: {prefix}{key} = {found[key]} is not supported, only {values[0]}: import another model"
            )


def fla_weights(hf_dir: str | Path, section: ModelSection) -> Renamed:
    """Layout-free tensors (see `MergedWeights`) of the directory, each read when it is asked for.

    Raises:
        CheckpointError: no safetensors, or a weight is missing, left over or of another shape; the message names it.
    """
    stored, where = DirectoryWeights(hf_dir), repr(str(hf_dir))
    if section.tie_embeddings:
        stored.leave_out_tied_head(_MODEL["embedding.word_embeddings.weight"])
    dtype = stored["model.norm.weight"].dtype if "model.norm.weight" in stored else torch.float32
    table = _entries(section, dtype)
    check_names(set(stored), {name for entry in table for name in entry.names}, where)
    wanted = _key_shapes(section)
    for entry in table:
        if len(entry.names) != 1:
            continue
        (name,), shape = entry.names, wanted[entry.keys[0]]
        held = stored.shapes[name]
        if held not in (shape, (shape[0], 1, *shape[1:])):
            raise CheckpointError(
                f"{where}: {name} has shape {list(held)}, config.json asks for {list(shape)}: they are of different "
                "models"
            )
    return Renamed(stored, [(entry.names, entry.keys, entry.from_hf) for entry in table])


def _key_shapes(section: ModelSection) -> dict[str, tuple[int, ...]]:
    """Layout-free key -> shape, of the whole model."""
    shapes: dict[str, tuple[int, ...]] = {}
    tags = parameter_tags(section)
    for name, spec in model_parameters(section, section.vocab_multiple).items():
        rows = [n for _, n in spec.sections] or [spec.shape[0]]
        shapes |= {key: (n, *spec.shape[1:]) for key, n in zip(tags[name].keys(name), rows, strict=True)}
    return shapes


def _entries(section: ModelSection, dtype: torch.dtype) -> list[Entry]:
    table = [Entry((key,), (name,)) for key, name in _MODEL.items()]
    if not section.tie_embeddings:
        table.append(Entry(("output_layer.weight",), ("lm_head.weight",)))
    for n, letter in enumerate(layer_letters(section)):
        ours, theirs = f"decoder.layers.{n}", f"model.layers.{n}"
        table += [Entry((f"{ours}.{key}",), (f"{theirs}.{name}",)) for key, name in _LAYER.items()]
        if LETTERS[letter].softmax:
            table += softmax_entries(section, letter, f"{ours}.self_attention", f"{theirs}.attn")
        else:
            table += _mixer(section, f"{ours}.self_attention", f"{theirs}.attn", dtype)
    return table


def _mixer(section: ModelSection, ours: str, theirs: str, dtype: torch.dtype) -> list[Entry]:
    table = []
    for name, spec in dla_parameters(section).items():
        parts = spec.sections or ((name, spec.shape[0]),)
        inits = spec.inits if len(spec.inits) == len(parts) else spec.inits * len(parts)
        kept = torch.float32 if name in FP32_PARAMETERS else dtype
        for (part, rows), init in zip(parts, inits, strict=True):
            names = (f"{theirs}.{_MIXER[part]}",) if part in _MIXER else ()
            make = partial(_read if names else _initial, (rows, *spec.shape[1:]), kept, *(() if names else (init,)))
            table.append(Entry((f"{ours}.{part}",), names, from_hf=make))
    return table


def _read(shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> tuple[Tensor, ...]:
    return (x.view(shape).to(dtype),)  # a convolution has an axis of one channel more


def _initial(shape: tuple[int, ...], dtype: torch.dtype, init: Init) -> tuple[Tensor, ...]:
    return (init(shape, None).to(dtype),)
