"""The letters of `model.pattern`: what each puts into a layer, and what its sizes must satisfy.

Pure Python: `dla convert to-hf` copies this file beside the modeling file. The rest of a letter is keyed by it in
`model/parameters.py` (its parameters), `model/spec.py` (its Megatron module) and `hf/layers_dla.py` (its Hugging Face
module).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Letter:
    """The mixer of a layer.

    Attributes:
        label: in messages.
        heads, groups: keys of the model section, its numbers of heads and of key groups; the tensor- and context-
            parallel sizes must divide them.
        hf_module: attribute of a Hugging Face layer that holds it, and so a part of its weights' names; `mixer` for a
            recurrence, whose fp32 parameters are found by it.
        softmax: softmax attention, which keeps keys and values and can carry a δ-mem; else a recurrence.
        rotary: queries and keys are rotated by their positions.
        window: a query sees the last `model.sliding_window` tokens only.
        slots: a recurrence that decides where slots open, with `model.tau` and `model.boundary`.
        states: key of the model section, the states a head that a recurrence keeps; "" = one.
    """

    label: str
    heads: str
    groups: str
    hf_module: str
    softmax: bool = False
    rotary: bool = False
    window: bool = False
    slots: bool = False
    states: str = ""


LETTERS = {
    "D": Letter("DLA", "num_heads", "num_groups", "mixer", slots=True, states="capacity"),
    "A": Letter("softmax attention", "attention_heads", "attention_groups", "self_attn", softmax=True, rotary=True),
    "N": Letter(
        "softmax attention without rotary positions", "attention_heads", "attention_groups", "self_attn", softmax=True
    ),
    "W": Letter(
        "sliding-window softmax attention",
        "attention_heads",
        "attention_groups",
        "self_attn",
        softmax=True,
        rotary=True,
        window=True,
    ),
    "G": Letter("Gated DeltaNet", "num_heads", "num_groups", "mixer"),
    "M": Letter("Mamba-2", "num_heads", "num_groups", "mixer"),
    "L": Letter("Log-Linear Attention", "num_heads", "num_groups", "mixer", states="levels"),
}


def describe_letters() -> str:
    """All letters with their meaning, for messages."""
    return ", ".join(f"{letter} ({mixer.label})" for letter, mixer in LETTERS.items())


__all__ = ["LETTERS", "Letter", "describe_letters"]
