"""A checkpoint of softmax layers only -> transformers' own model (Llama, Mistral, Qwen3, SmolLM3), no custom code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dla.checkpoint.find import resolve_checkpoint
from megatron_dla.checkpoint.weights import CheckpointLayout, MergedWeights
from megatron_dla.config import LETTERS, ModelSection, attention_head_dim, layer_letters
from megatron_dla.errors import CheckpointError
from megatron_dla.hf.convert import fresh_directory, tokenizer_file, write_state
from megatron_dla.hf.families import FAMILIES
from megatron_dla.hf.fast_tokenizer import SpecialTokens, write_tokenizer


def to_plain(
    checkpoint_dir: str | Path, out_dir: str | Path, *, tokenizer: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Write a directory that `AutoModelForCausalLM.from_pretrained(out_dir)` loads, in the checkpoint's dtype.

    Args:
        checkpoint_dir, tokenizer, overwrite: as `convert.to_hf`.

    Raises:
        CheckpointError: the model has DLA layers, or none of the families describes it; see also `to_hf`.
    """
    checkpoint, out = resolve_checkpoint(checkpoint_dir), Path(out_dir)
    layout = CheckpointLayout.load(checkpoint)
    family = _family(layout, checkpoint)
    source = tokenizer_file(checkpoint, tokenizer, layout)
    with fresh_directory(out, overwrite, "config.json") as new:
        weights = MergedWeights(checkpoint)
        tokens = write_tokenizer(new, source, layout.vocab_size)
        config = _config(layout, family, tokens) | {
            "dtype": str(weights["decoder.final_layernorm.weight"].dtype).split(".")[-1]
        }
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_state(weights, new, out.name, dense=True)
    return out


def _family(layout: CheckpointLayout, checkpoint: Path) -> str:
    """model_type of the section. Raises CheckpointError where there is none."""
    m, where = layout.model, repr(str(checkpoint))
    mixers = [LETTERS[letter] for letter in layer_letters(m)]
    unrotated = not all(mixer.rotary for mixer in mixers)
    if layout.adapter:
        raise CheckpointError(f"{where} holds a δ-mem adapter: use `dla convert adapter`")
    if recurrent := [mixer.label for mixer in mixers if not mixer.softmax]:
        raise CheckpointError(f"{where} has {recurrent[0]} layers, which no plain model has: omit --plain")
    if not m.ffn_hidden_size:
        raise CheckpointError(f"{where} has no MLPs (ffn_hidden_size = 0), which every plain model has: omit --plain")
    if unrotated and m.qk_norm:
        raise CheckpointError(f"{where} has layers without RoPE and qk_norm: no plain model has both; omit --plain")
    if (windows := {mixer.window for mixer in mixers}) == {False}:
        return "smollm3" if unrotated else "qwen3" if m.qk_norm else "llama"
    if not m.qk_norm and (unrotated or len(windows) > 1):
        raise CheckpointError(
            f"{where} has layers with a sliding window beside others and no qk_norm: no plain model has both; "
            "omit --plain"
        )
    return "qwen3" if m.qk_norm else "mistral"


def _config(layout: CheckpointLayout, family: str, tokens: SpecialTokens) -> dict[str, Any]:
    m: ModelSection = layout.model
    rope: dict[str, Any] = {"rope_type": m.rope_type, "rope_theta": m.rope_theta}
    if m.rope_type != "default":
        rope["factor"] = m.rope_factor
    if m.rope_type == "llama3":
        rope |= {"low_freq_factor": m.rope_low_freq_factor, "high_freq_factor": m.rope_high_freq_factor}
        rope["original_max_position_embeddings"] = m.rope_original_length
    mixers = [LETTERS[letter] for letter in layer_letters(m)]
    config = {
        "architectures": [FAMILIES[family]], "model_type": family, "vocab_size": layout.vocab_size,
        "hidden_size": m.hidden_size, "intermediate_size": m.ffn_hidden_size, "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.attention_heads, "num_key_value_heads": m.attention_groups,
        "head_dim": attention_head_dim(m), "hidden_act": "silu", "rms_norm_eps": m.norm_eps,
        "max_position_embeddings": layout.seq_len, "rope_parameters": rope, "attention_bias": False,
        "tie_word_embeddings": m.tie_embeddings, "bos_token_id": None, "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
    }  # fmt: skip
    if family == "smollm3":
        config["no_rope_layers"] = [int(mixer.rotary) for mixer in mixers]
    if any(mixer.window for mixer in mixers):
        config["sliding_window"] = m.sliding_window
    if "sliding_window" in config and family == "qwen3":
        config["use_sliding_window"] = True
        config["layer_types"] = ["sliding_attention" if mixer.window else "full_attention" for mixer in mixers]
    return config
