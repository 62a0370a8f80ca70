"""A checkpoint of softmax layers only -> a plain transformers model (Llama, Qwen3, SmolLM3), without custom code.

The tokenizer becomes a `tokenizers` BPE with the same ids. It does not handle a literal U+2581 as ours does, which
sentencepiece writes for a space; every other text gives the same ids.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_dla.checkpoint.find import resolve_checkpoint
from megatron_dla.checkpoint.weights import CheckpointLayout, MergedWeights
from megatron_dla.config import LETTERS, ModelSection, attention_head_dim, layer_letters
from megatron_dla.errors import CheckpointError
from megatron_dla.hf.convert import fresh_directory, tensors_for_disk, tokenizer_file
from megatron_dla.hf.directory import TOKENIZER, write_weights
from megatron_dla.hf.families import FAMILIES

_PROBES = ("", " ", "a  b ", "\n\ttab", "Caf\xe9 \U0001f600 x", "The 12 cats, 3.5!\nNext line.")


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
        tokens = _write_tokenizer(new, source)
        config = _config(layout, family, tokens) | {
            "dtype": str(weights["decoder.final_layernorm.weight"].dtype).split(".")[-1]
        }
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_weights(tensors_for_disk(weights, None, out, dense=True), new)
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
    if unrotated and m.qk_norm:
        raise CheckpointError(f"{where} has layers without RoPE and qk_norm: no plain model has both; omit --plain")
    return "smollm3" if unrotated else "qwen3" if m.qk_norm else "llama"


def _config(layout: CheckpointLayout, family: str, tokens: dict[str, int]) -> dict[str, Any]:
    m: ModelSection = layout.model
    rope: dict[str, Any] = {"rope_type": m.rope_type, "rope_theta": m.rope_theta}
    if m.rope_type != "default":
        rope["factor"] = m.rope_factor
    if m.rope_type == "llama3":
        rope |= {"low_freq_factor": m.rope_low_freq_factor, "high_freq_factor": m.rope_high_freq_factor}
        rope["original_max_position_embeddings"] = m.rope_original_length
    rotary = [int(LETTERS[letter].rotary) for letter in layer_letters(m)]
    config = {
        "architectures": [FAMILIES[family]], "model_type": family, "vocab_size": layout.vocab_size,
        "hidden_size": m.hidden_size, "intermediate_size": m.ffn_hidden_size, "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.attention_heads, "num_key_value_heads": m.attention_groups,
        "head_dim": attention_head_dim(m), "hidden_act": "silu", "rms_norm_eps": m.norm_eps,
        "max_position_embeddings": layout.seq_len, "rope_parameters": rope, "attention_bias": False,
        "tie_word_embeddings": m.tie_embeddings, "bos_token_id": tokens["bos"], "eos_token_id": tokens["eos"],
        "pad_token_id": tokens["eos"],
    }  # fmt: skip
    return config | ({"no_rope_layers": rotary} if family == "smollm3" else {})


def _write_tokenizer(out: Path, source: Path) -> dict[str, int]:
    """tokenizer.json and its configuration; the ids of bos and eos.

    Raises:
        CheckpointError: the ids would differ from the sentencepiece model's.
    """
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    sp = sentencepiece.SentencePieceProcessor(model_file=str(source))
    pieces = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    unk, bos, eos = (sp.id_to_piece(i) for i in (sp.unk_id(), sp.bos_id(), sp.eos_id()))
    core = Tokenizer(models.BPE(pieces, _merges(pieces, sp), unk_token=unk, fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=eos, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    for probe in _PROBES:
        if fast.encode(probe, add_special_tokens=False) != sp.encode(probe):
            raise CheckpointError(f"{str(source)!r}: {probe!r} would get other ids in a plain tokenizer")
    fast.save_pretrained(str(out))
    shutil.copyfile(source, out / TOKENIZER)  # shards for this model are made with it
    return {"bos": sp.bos_id(), "eos": sp.eos_id()}


def _merges(pieces: dict[str, int], sp: Any) -> list[tuple[str, str]]:
    """Pairs in the order in which BPE joins them: by the rank of what they make, then of the parts."""
    found = []
    for piece, rank in pieces.items():
        if len(piece) < 2 or sp.is_byte(rank) or sp.is_control(rank) or sp.is_unknown(rank):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((rank, pieces[left], pieces[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
