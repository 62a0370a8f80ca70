"""Parameters and floating-point operations of a model section, without building it."""

from __future__ import annotations

from megatron_dla.config import ModelSection, attention_head_dim, layer_letters, softmax_layers


def mixer_parameters(m: ModelSection) -> int:
    """Parameters of one DLA mixer."""
    inner, qk, H = m.num_heads * m.value_dim, m.num_groups * m.key_dim, m.num_heads
    delta = m.backbone == "gdn"
    projections = m.hidden_size * (3 * inner + 2 * qk + H * (1 + delta) + H * m.capacity)  # gate, value, out
    scalars = 2 * H + (0 if delta else H) + 2 * H * m.capacity + (H if m.tau_mode == "learned" else 0)
    return projections + (inner + 2 * qk) * m.conv_kernel + scalars + m.value_dim


def attention_parameters(m: ModelSection) -> int:
    """Parameters of one softmax attention layer."""
    head = attention_head_dim(m)
    return m.hidden_size * head * (2 * m.attention_heads + 2 * m.attention_groups) + 2 * head * m.qk_norm


def count_parameters(m: ModelSection, vocab_size: int) -> int:
    """Parameters of the whole model; `vocab_size` is the padded vocabulary."""
    letters = layer_letters(m)
    mixers = letters.count("D") * mixer_parameters(m) + softmax_layers(m) * attention_parameters(m)
    layers = m.num_layers * (3 * m.hidden_size * m.ffn_hidden_size + 2 * m.hidden_size)
    embeddings = vocab_size * m.hidden_size * (1 if m.tie_embeddings else 2)
    return mixers + layers + embeddings + m.hidden_size


def parameters_per_rank(m: ModelSection, vocab_size: int, tensor: int) -> int:
    """Parameters of one tensor-parallel rank (context- and data-parallel ranks hold the same)."""
    letters = layer_letters(m)
    replicated = (2 * len(letters) + 1) * m.hidden_size + letters.count("D") * m.value_dim  # norms
    replicated += softmax_layers(m) * 2 * attention_head_dim(m) * m.qk_norm
    if m.num_groups % tensor:  # fewer groups than ranks
        replicated += letters.count("D") * 2 * m.num_groups * m.key_dim * (m.hidden_size + m.conv_kernel)
    return replicated + (count_parameters(m, vocab_size) - replicated) // tensor


def flops_per_token(m: ModelSection, vocab_size: int, seq_len: int) -> float:
    """Model FLOPs of forward and backward for one token (multiply-add = 2), recomputation not counted.

    Matrix parameters cost 6 FLOP each; DLA reads up to `capacity` states of Dk x Dv per head (an upper bound: only
    live slots are read) and writes one; softmax attention is causal.
    """
    letters = layer_letters(m)
    matrices = count_parameters(m, vocab_size) - (0 if m.tie_embeddings else vocab_size * m.hidden_size)
    slots = min(m.capacity, seq_len)
    recurrence = 2 * m.num_heads * m.key_dim * m.value_dim * (slots + 1)
    softmax = 2 * 2 * m.attention_heads * attention_head_dim(m) * seq_len / 2
    return 6.0 * matrices + 3 * (letters.count("D") * recurrence + softmax_layers(m) * softmax)
