"""The models of transformers that can carry a memory, and the error messages for all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dla.errors import CheckpointError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""model_type -> transformers' class."""
# their frequencies depend on the longest row so far and are stored in the model, which all sessions share
_CHANGING_ROPE = ("dynamic", "longrope")


def supported() -> str:
    """The architectures, for messages."""
    return ", ".join(f"{name} (model_type {kind})" for kind, name in FAMILIES.items())


def unsupported(where: str, key: str, value: Any, choices: str, fix: str = "") -> CheckpointError:
    """The error about one key of a configuration.

    Args:
        choices: the values that would do. fix: an alternative to using another model.
    """
    value = str(value).lower() if isinstance(value, bool) else value
    return CheckpointError(
        f"{where}: {key} = {value} is not supported, only {choices}: {fix}use another model of {supported()}"
    )


def check_family(config: Mapping[str, Any], where: str) -> str:
    """The model_type of a config.json's contents. Raises CheckpointError, with the list, for one that is not here."""
    kind = config.get("model_type")
    architecture = (config.get("architectures") or [FAMILIES.get(str(kind), "unknown")])[0]
    if FAMILIES.get(str(kind)) != architecture:
        raise CheckpointError(
            f"{where}: model_type = {kind} with architecture {architecture} is not supported: use a model of one of "
            f"{supported()}"
        )
    return str(kind)


def check_servable(config: Mapping[str, Any], where: str) -> None:
    """Whether transformers' own model can carry a memory and be shared by sessions.

    Biases, sliding windows and the other RoPE types are computed by transformers and need no support here;
    `hf.backbones`, which builds the model in Megatron, is stricter.

    Raises:
        CheckpointError: another architecture, quantised weights, or RoPE that changes with the length of a row.
    """
    check_family(config, where)
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise unsupported(where, "quantization_config.quant_method", method, "dense weights", "dequantise it, or ")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type in _CHANGING_ROPE:
        raise unsupported(where, "rope_type", rope_type, "default, linear, llama3 or yarn, which no row changes")
    if (part := rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0) != 1.0:
        raise unsupported(where, "partial_rotary_factor", part, "1.0")
