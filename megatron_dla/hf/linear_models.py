"""Plain linear-attention models, from their Hugging Face directories, as DLA models that start equal to them.

Slot weights start at 1 (`slot_weight_init: backbone`), and slots that are all read with weight 1 are together the one
state of the plain layer. A setting that would be computed differently here is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_dla.config import DataSection, ModelSection, check_model, layer_letters
from megatron_dla.errors import CheckpointError
from megatron_dla.hf.backbones import BackboneInfo
from megatron_dla.hf.directory import CONFIG, DirectoryWeights, read_config
from megatron_dla.hf.gated_deltanet import GATED_DELTANET
from megatron_dla.hf.linear_family import Family
from megatron_dla.hf.mamba2 import MAMBA2
from megatron_dla.hf.mapping import Entry, Renamed, check_names, parameter_tags
from megatron_dla.model.parameters import model_parameters

LINEAR_FAMILIES: dict[str, Family] = {"gated_deltanet": GATED_DELTANET, "mamba2": MAMBA2}
"""model_type -> how it is read."""


def is_linear(config: Mapping[str, Any]) -> bool:
    """Whether the contents of config.json are of a model that `read_linear` reads."""
    return config.get("model_type") in LINEAR_FAMILIES


def read_linear(hf_dir: str | Path, capacity: int, tau: float) -> tuple[ModelSection, BackboneInfo]:
    """Model section and the rest, from config.json and the shapes of the weights.

    Args:
        capacity, tau: of the new model's slots.

    Raises:
        CheckpointError: no such file, another architecture, or a setting that would be computed differently here.
        ConfigError: `capacity` or `tau` is out of range.
    """
    fix = "give a directory that save_pretrained wrote"
    raw, where = read_config(hf_dir, fix), repr(str(Path(hf_dir) / CONFIG))
    shapes = DirectoryWeights(hf_dir).shapes
    try:
        family = LINEAR_FAMILIES[raw["model_type"]]
        section = family.section(raw, shapes, where)
        section.capacity, section.tau = capacity, tau
        section.vocab_multiple = raw["vocab_size"]
        section.tie_embeddings = raw.get("tie_word_embeddings", False)
        section.init_std = raw.get("initializer_range", ModelSection.init_std)
        length = raw.get("max_position_embeddings", DataSection.seq_len)  # Mamba-2's has no such key
        info = BackboneInfo(family.architecture, raw["vocab_size"], length, raw.get("dtype") or "float32")
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is damaged ({error!r}): {fix}") from error
    check_model(section)
    return section, info


def linear_weights(hf_dir: str | Path, section: ModelSection) -> Renamed:
    """Layout-free tensors (see `MergedWeights`) of the directory, each read when it is asked for.

    Raises:
        CheckpointError: no safetensors, or a weight is missing, left over or of another shape; the message names it.
    """
    family = LINEAR_FAMILIES[read_config(hf_dir)["model_type"]]
    stored, where = DirectoryWeights(hf_dir), repr(str(hf_dir))
    if section.tie_embeddings:
        stored.leave_out_tied_head(family.embedding)
    dtype = stored[family.final_norm].dtype if family.final_norm in stored else torch.float32
    table = _entries(section, family, dtype)
    check_names(set(stored), {name for entry in table for name in entry.names}, where)
    wanted = _key_shapes(section)
    for entry in table:
        if len(entry.names) != 1:
            continue
        (name,), shapes = entry.names, [wanted[key] for key in entry.keys]
        held, shape = stored.shapes[name], (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if held not in (shape, (shape[0], 1, *shape[1:])):
            raise CheckpointError(
                f"{where}: {name} has shape {list(held)}, config.json asks for {list(shape)}: they are of different "
                "models"
            )
    return Renamed(stored, [(entry.names, entry.keys, entry.from_hf) for entry in table])


def _entries(section: ModelSection, family: Family, dtype: torch.dtype) -> list[Entry]:
    table = [
        Entry(("embedding.word_embeddings.weight",), (family.embedding,)),
        Entry(("decoder.final_layernorm.weight",), (family.final_norm,)),
    ]
    if not section.tie_embeddings:
        table.append(Entry(("output_layer.weight",), ("lm_head.weight",)))
    for number, letter in enumerate(layer_letters(section)):
        table += family.layer(section, number, letter, dtype)
    return table


def _key_shapes(section: ModelSection) -> dict[str, tuple[int, ...]]:
    """Layout-free key -> shape, of the whole model."""
    shapes: dict[str, tuple[int, ...]] = {}
    tags = parameter_tags(section)
    for name, spec in model_parameters(section, section.vocab_multiple).items():
        rows = [n for _, n in spec.sections] or [spec.shape[0]]
        shapes |= {key: (n, *spec.shape[1:]) for key, n in zip(tags[name].keys(name), rows, strict=True)}
    return shapes


__all__ = ["LINEAR_FAMILIES", "is_linear", "linear_weights", "read_linear"]
