"""Tiny full-attention models of transformers with random weights, one for each thing that an import can get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# with head size 8 and theta 1e4 one wavelength is left alone, one lies in between, two are stretched
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "llama, one key head, tied, wide heads": (
        "Llama",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 12},
    ),
    "llama3 scaling": ("Llama", {"num_key_value_heads": 4, "rope_parameters": LLAMA3}),
    "linear scaling": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 5}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, window in one layer": ("Qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3, one key head, tied": ("Qwen3", {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "smollm3": (
        "SmolLM3",
        {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
    ),
}


def write_tiny(directory: Path, family: str, **changes: Any) -> Any:
    """Save a random model of a family and return it, in eval mode, fp32."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.ndim > 1 else 1 + 0.3 * noise)
    model.save_pretrained(directory)
    return model


def token_rows() -> tuple[Tensor, Tensor, list[int]]:
    """Ids [2, 32], a cotangent of the logits, and document starts over the flattened rows."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, SIZES["vocab_size"], (2, 32), generator=generator)
    return ids, torch.randn(2, 32, SIZES["vocab_size"], generator=generator), [0, 11, 32, 33, 64]


def logits_and_gradient(model: Any, ids: Tensor, cotangent: Tensor, documents: list[int]) -> tuple[Tensor, Tensor]:
    """transformers' logits [B, S, vocab], each document read alone, and the embedding output's gradient [B, S, d]."""
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    bounds = documents or [row * ids.shape[1] for row in range(ids.shape[0] + 1)]
    pieces = [
        model(inputs_embeds=x.flatten(0, 1)[None, start:end]).logits[0]
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]
    logits = torch.cat(pieces).unflatten(0, ids.shape)
    (gradient,) = torch.autograd.grad(logits, x, cotangent)
    return logits.detach(), gradient
