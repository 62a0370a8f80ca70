"""Parameters and floating-point operations of a model section, without building it."""

from __future__ import annotations

import math

from megatron_dla.config import LETTERS, ModelSection, attention_head_dim, layer_letters
from megatron_dla.model.parameters import model_parameters


def count_parameters(m: ModelSection, vocab_size: int) -> int:
    """Parameters of the whole model; `vocab_size` is the padded vocabulary."""
    return parameters_per_rank(m, vocab_size, 1)


def parameters_per_rank(m: ModelSection, vocab_size: int, tensor: int) -> int:
    """Parameters of one tensor-parallel rank (context- and data-parallel ranks hold the same)."""
    return sum(math.prod(spec.local_shape(tensor)) for spec in model_parameters(m, vocab_size, tensor).values())


def recurrent_states(m: ModelSection, letter: str) -> int:
    """States [Dk, Dv] that a head of the letter's mixer keeps at most."""
    mixer = LETTERS[letter]
    return 0 if mixer.softmax else getattr(m, mixer.states) if mixer.states else 1


def core_flops(m: ModelSection, letter: str, seq_len: int) -> float:
    """Forward FLOPs of a mixer for one token, besides its matrices.

    A recurrence reads every state it can hold (an upper bound: only live slots are read) and writes one; softmax
    attention is causal, so it reads half of the keys on average, or those of its window.
    """
    if LETTERS[letter].softmax:
        window = min(m.sliding_window, seq_len) if LETTERS[letter].window else seq_len
        keys = window - window**2 / (2 * seq_len)  # the first tokens have fewer before them
        return 2 * 2 * m.attention_heads * attention_head_dim(m) * keys
    return 2 * m.num_heads * m.key_dim * m.value_dim * (min(recurrent_states(m, letter), seq_len) + 1)


def flops_per_token(m: ModelSection, vocab_size: int, seq_len: int) -> float:
    """Model FLOPs of forward and backward for one token (multiply-add = 2), recomputation not counted.

    Parameters cost 6 FLOP each, an untied embedding none.
    """
    matrices = count_parameters(m, vocab_size) - (0 if m.tie_embeddings else vocab_size * m.hidden_size)
    return 6.0 * matrices + 3 * sum(core_flops(m, letter, seq_len) for letter in layer_letters(m))
