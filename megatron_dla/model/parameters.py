"""Every parameter of the Megatron model by name, without building it: shape, tensor-parallel cut, initial values.

Megatron's own modules are tagged and initialised from this table; counts, tags of a converted checkpoint and the
memory estimate are sums and views of it.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_dla.config import ModelSection, attention_head_dim, layer_letters
from megatron_dla.mixers.layout import (
    ParamSpec,
    dla_parameters,
    gdn_parameters,
    log_linear_parameters,
    mamba2_parameters,
    normal,
    ones,
    output_std,
    packed,
)


def softmax_parameters(m: ModelSection, tensor_parallel: int = 1) -> dict[str, ParamSpec]:
    """One softmax attention layer; `linear_qkv` packs [query heads of the group, key, value] for each key group."""
    head = attention_head_dim(m)
    inner, kv = m.attention_heads * head, m.attention_groups * head
    table = {
        "linear_qkv.weight": ParamSpec((inner + 2 * kv, m.hidden_size), (normal(m.init_std),)),
        "linear_proj.weight": ParamSpec((m.hidden_size, inner), (normal(output_std(m)),), dim=1),
    }
    norm = ParamSpec((head,), (ones,), "replicated_sum")
    return table | ({"q_layernorm.weight": norm, "k_layernorm.weight": norm} if m.qk_norm else {})


# of a layer's mixer (`self_attention` in Megatron), by its letter and the tensor-parallel size
MIXER_PARAMETERS: dict[str, Callable[[ModelSection, int], dict[str, ParamSpec]]] = {
    "D": dla_parameters,
    "A": softmax_parameters,
    "N": softmax_parameters,
    "W": softmax_parameters,
    "G": gdn_parameters,
    "M": mamba2_parameters,
    "L": log_linear_parameters,
}


def layer_parameters(m: ModelSection, letter: str, tensor_parallel: int = 1) -> dict[str, ParamSpec]:
    """Name within the layer -> parameter."""
    ffn, project = m.ffn_hidden_size, normal(m.init_std)
    norm = ParamSpec((m.hidden_size,), (ones,), "replicated")
    mixer = MIXER_PARAMETERS[letter](m, tensor_parallel)
    table = {"input_layernorm.weight": norm, **{f"self_attention.{name}": spec for name, spec in mixer.items()}}
    if not ffn:
        return table
    return table | {
        "pre_mlp_layernorm.weight": norm,
        "mlp.linear_fc1.weight": packed(m.hidden_size, [("gate", ffn, project), ("up", ffn, project)]),
        "mlp.linear_fc2.weight": ParamSpec((m.hidden_size, ffn), (normal(output_std(m)),), dim=1),
    }


def model_parameters(m: ModelSection, vocab_size: int, tensor_parallel: int = 1) -> dict[str, ParamSpec]:
    """Name -> parameter of the whole model; `vocab_size` is the padded vocabulary."""
    embedding = ParamSpec((vocab_size, m.hidden_size), (normal(m.init_std),))
    table = {"embedding.word_embeddings.weight": embedding}
    for n, letter in enumerate(layer_letters(m)):
        layer = layer_parameters(m, letter, tensor_parallel)
        table |= {f"decoder.layers.{n}.{name}": spec for name, spec in layer.items()}
    table["decoder.final_layernorm.weight"] = ParamSpec((m.hidden_size,), (ones,), "replicated")
    return table if m.tie_embeddings else table | {"output_layer.weight": embedding}
