"""The model section in the config.json of an exported directory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dla.config import ModelSection, layer_letters
from megatron_dla.config.checks import check_model
from megatron_dla.config.load import from_dict
from megatron_dla.errors import CheckpointError
from megatron_dla.hf.directory import CONFIG, read_config

_EXPORT_AGAIN = "export the model again"
_RENAMED = {"tie_embeddings": "tie_word_embeddings"}
# fields that the first exports did not have; they mean the defaults
_ADDED = (
    "attention_head_dim",
    "qk_norm",
    "sliding_window",
    "rope_type",
    "rope_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_length",
    "conv_bias",
    "gated_norm",
    "boundary",
    "boundary_rate",
    "boundary_every",
    "control_seed",
    "levels",
    "slot_weights",
)


def section_fields(section: ModelSection) -> dict[str, Any]:
    """Every field of a model section as config.json has it, so that `read_section` gets the same section back."""
    fields = {_RENAMED.get(name, name): value for name, value in asdict(section).items() if name != "pattern"}
    return {"layer_letters": layer_letters(section), **fields}


def read_section(hf_dir: Path) -> tuple[ModelSection, dict[str, Any]]:
    """Model section and raw config.json of an exported directory. Raises CheckpointError where it is not one."""
    config = read_config(hf_dir, _EXPORT_AGAIN)
    if config.get("model_type") != "dla":
        raise CheckpointError(f"{str(hf_dir)!r}: model_type is {config.get('model_type')!r}, this reads 'dla' only")
    try:
        defaults = asdict(ModelSection())
        config = {name: defaults[name] for name in _ADDED} | config
        names = {name: _RENAMED.get(name, name) for name in defaults if name != "pattern"}
        fields = {name: config[theirs] for name, theirs in names.items()}
        section = from_dict({"model": {"pattern": config["layer_letters"], **fields}}).model
        check_model(section)
        config["training_length"] = config.get("training_length") or config["max_position_embeddings"]  # older exports
        config["tokenizer_size"] = config.get("tokenizer_size") or config["vocab_size"]  # older exports
        for name in ("vocab_size", "training_length", "tokenizer_size"):
            if type(config[name]) is not int or config[name] < 1:
                raise TypeError(f"{name} = {config[name]!r}")
        for name, value in fields.items():  # a config file's "1e-5" is read as a number; transformers would keep text
            if isinstance(value, str) and not isinstance(getattr(section, name), str):
                raise TypeError(f"{names[name]} = {value!r} is text, not a number")
        return section, config
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(hf_dir / CONFIG)!r} is damaged ({error}): {_EXPORT_AGAIN}") from error
