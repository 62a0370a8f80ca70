"""A full-attention model of the Llama family, from its Hugging Face directory into our Megatron model.

config.json is read by transformers' own classes (they know each family's defaults), weights tensor by tensor, so that a
rank never holds more of the model than its part and one layer's matrix. A setting that would be computed differently
here is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_dla.checkpoint.weights import split_merged
from megatron_dla.config import (
    ModelSection,
    ParallelSection,
    attention_head_dim,
    check_context_parallel,
    check_model,
    check_tensor_parallel,
)
from megatron_dla.errors import CheckpointError
from megatron_dla.hf import mapping
from megatron_dla.hf.directory import CONFIG, DirectoryWeights, read_config
from megatron_dla.hf.families import FAMILIES, check_family, unsupported
from megatron_dla.parallel.tags import get_tag

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from megatron_dla.adapters.config import DeltaMemConfig

_ROPE_TYPES = ("default", "linear", "llama3")
# buffers that old versions of transformers saved
_IGNORED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class BackboneInfo:
    """Properties of a backbone that are not in the model section.

    Attributes:
        architecture: transformers' class. vocab_size: rows of the embedding.
        max_length: tokens a row that it was trained for. dtype: of the stored weights, as config.json names it.
    """

    architecture: str
    vocab_size: int
    max_length: int
    dtype: str


def read_backbone(hf_dir: str | Path) -> tuple[ModelSection, BackboneInfo]:
    """Model section (pattern of A, N and W: rotary, NoPE and windowed layers) and the rest, from config.json alone.

    `vocab_multiple` is the vocabulary itself, so that no padded row enters a softmax that the model never saw.

    Raises:
        CheckpointError: no such file, another architecture, or a setting that would be computed differently here.
    """
    fix = "give a directory that save_pretrained wrote"
    raw, path = read_config(hf_dir, fix), Path(hf_dir) / CONFIG
    try:
        kind = check_family(raw, repr(str(path)))
        config = _transformers_config(kind, raw, path)
        _check_supported(config, raw, path)
        section = _section(config)
        check_model(section)
        stored = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        return section, BackboneInfo(FAMILIES[kind], config.vocab_size, config.max_position_embeddings, stored)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged ({error}): {fix}") from error


def _transformers_config(kind: str, raw: dict[str, Any], path: Path) -> Any:
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind].from_dict(raw)
    except Exception as error:  # huggingface_hub's validation has errors of its own
        reason = " ".join(str(error).split())
        message = f"{str(path)!r}: transformers rejects it ({reason}): correct that value, or fetch the file again"
        raise CheckpointError(message) from error


def _check_supported(config: Any, raw: dict[str, Any], path: Path) -> None:
    """CheckpointError for each property that would be computed differently here."""
    rope, where = config.rope_parameters, repr(str(path))
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method")
        raise unsupported(where, "quantization_config.quant_method", method, "dense weights", "dequantise it, or ")
    if "?" in _letters(config):
        fix = "set use_sliding_window to false and remove layer_types, the same for rows within a window, or "
        kinds = getattr(config, "layer_types", None)
        raise unsupported(where, "layer_types", kinds, "full attention, and sliding windows with rotary positions", fix)
    found = {
        "hidden_act": (config.hidden_act, ("silu",)),
        "attention_bias": (getattr(config, "attention_bias", False), (False,)),
        "mlp_bias": (getattr(config, "mlp_bias", False), (False,)),
        "rope_type": (rope["rope_type"], _ROPE_TYPES),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), (1.0,)),
    }
    for key, (value, choices) in found.items():
        if value not in choices:
            raise unsupported(where, key, value, ", ".join(str(x).lower() for x in choices))


def _letters(config: Any) -> str:
    """The pattern; ? = a kind of layer that has no letter."""
    layers = config.num_hidden_layers
    rotary = getattr(config, "no_rope_layers", None) or [1] * layers
    kinds = getattr(config, "layer_types", None)
    if not kinds:  # Mistral has no layer_types: every layer is of one kind
        window = config.model_type == "mistral" and config.sliding_window is not None
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    letters = {("full_attention", True): "A", ("full_attention", False): "N", ("sliding_attention", True): "W"}
    return "".join(letters.get((kind, bool(r)), "?") for kind, r in zip(kinds[:layers], rotary[:layers], strict=True))


def _section(config: Any) -> ModelSection:
    rope, heads, hidden = config.rope_parameters, config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    section = ModelSection(
        hidden_size=hidden,
        num_layers=config.num_hidden_layers,
        pattern=_letters(config),
        ffn_hidden_size=config.intermediate_size,
        attention_heads=heads,
        attention_groups=config.num_key_value_heads,
        attention_head_dim=0 if head_dim * heads == hidden else head_dim,
        qk_norm=config.model_type == "qwen3",
        rope_theta=float(rope["rope_theta"]),
        rope_type=rope["rope_type"],
        tie_embeddings=bool(config.tie_word_embeddings),
        vocab_multiple=config.vocab_size,
        norm_eps=config.rms_norm_eps,
    )
    if "W" in section.pattern:
        section.sliding_window = config.sliding_window
    if rope["rope_type"] != "default":
        section.rope_factor = float(rope["factor"])
    if rope["rope_type"] == "llama3":
        section.rope_low_freq_factor = float(rope["low_freq_factor"])
        section.rope_high_freq_factor = float(rope["high_freq_factor"])
        section.rope_original_length = int(rope["original_max_position_embeddings"])
    return section


def _shapes(m: ModelSection, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every weight."""
    head, hidden = attention_head_dim(m), m.hidden_size
    inner, kv, ffn = m.attention_heads * head, m.attention_groups * head, m.ffn_hidden_size
    by_ending = {
        "embed_tokens": (vocab_size, hidden),
        "lm_head": (vocab_size, hidden),
        "q_proj": (inner, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, inner),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
        "q_norm": (head,),
        "k_norm": (head,),
    }
    names = (name for entry in mapping.entries(m, dense=True) for name in entry.names)
    return {name: by_ending.get(name.split(".")[-2], (hidden,)) for name in names}


def read_weights(hf_dir: str | Path, section: ModelSection, vocab_size: int) -> Mapping[str, Tensor]:
    """Layout-free tensors (see `MergedWeights`) of a Hugging Face directory, each read when it is asked for.

    Raises:
        CheckpointError: no safetensors, or a weight is missing, left over or of another shape; the message names it.
    """
    stored, where = DirectoryWeights(hf_dir), repr(str(hf_dir))
    for name in [name for name in stored if name.endswith(_IGNORED)]:
        stored.leave_out(name)
    if section.tie_embeddings:
        stored.leave_out_tied_head("model.embed_tokens.weight")
    weights = mapping.from_hf_names(stored, section, dense=True, what=where)
    for name, shape in _shapes(section, vocab_size).items():
        if stored.shapes[name] != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(stored.shapes[name])}, config.json asks for {list(shape)}: they are "
                "of different models"
            )
    return weights


def build_backbone(
    hf_dir: str | Path,
    parallel: ParallelSection,
    *,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    recompute: str = "none",
    keep_states: bool = False,
    delta_mem: DeltaMemConfig | None = None,
) -> tuple[GPTModel, ModelSection]:
    """The frozen Megatron model of a Hugging Face directory, this rank's part, in eval mode; its section.

    Megatron's groups must exist (`parallel.groups`). Called as `build_model`'s: logits [B, S, vocab / TP] without
    labels. No parameter requires a gradient, but gradients flow through the model to its inputs and adapters.

    Args:
        seq_len: tokens of a whole row. dtype: of the weights here, whatever is stored.
        delta_mem: puts memories beside the attention; they are left unset (`adapters.delta_mem.initialise_memories`).

    Raises:
        CheckpointError: see `read_backbone` and `read_weights`.
        ConfigError: a parallel size that does not divide the model; the message has those that do.
    """
    section, info = read_backbone(hf_dir)
    check_tensor_parallel(section, parallel.tensor_model_parallel_size, parallel.sequence_parallel, seq_len)
    check_context_parallel(section, parallel, seq_len)
    weights = read_weights(hf_dir, section, info.vocab_size)
    from megatron_dla.model.gpt import build_model
    from megatron_dla.parallel.groups import process_groups

    model = build_model(
        section, parallel, vocab_size=info.vocab_size, seq_len=seq_len, seed=None, dtype=dtype, device=device,
        recompute=recompute, keep_states=keep_states, delta_mem=delta_mem,
    )  # fmt: skip
    tp = process_groups().tp
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".delta_mem." in name:
                continue
            local = split_merged(weights, {name: get_tag(parameter)}, tp.rank(), tp.size())
            parameter.copy_(local[name])
    return model.eval().requires_grad_(False), section
