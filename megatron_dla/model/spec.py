"""Layer specs: Megatron's local TransformerLayer with the DLA mixer, or a softmax core, put in by ModuleSpec."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_dla.config import ModelSection, layer_letters
from megatron_dla.mixers.dla import DLAMixer, DLAMixerSubmodules
from megatron_dla.mixers.norms import HeadNorm, RMSNorm
from megatron_dla.mixers.softmax import CoreAttention


def dla_mixer_spec(model: ModelSection, backend: str = "auto", cp_scheme: str = "heads") -> ModuleSpec:
    """The DLA mixer for the self_attention slot."""
    submodules = DLAMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    return ModuleSpec(
        module=DLAMixer, params={"model": model, "backend": backend, "cp_scheme": cp_scheme}, submodules=submodules
    )


def layer_spec(model: ModelSection, letter: str = "D", backend: str = "auto", cp_scheme: str = "heads") -> ModuleSpec:
    """One TransformerLayer: `D` = DLA mixer, `A`, `N` = softmax attention; SwiGLU MLP in each.

    Whether a softmax layer has rotary positions is in Megatron's config (`no_rope_freq`), by its number.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    if letter == "D":
        spec.submodules.self_attention = dla_mixer_spec(model, backend, cp_scheme)
    else:
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = CoreAttention
        if model.qk_norm:
            attention.q_layernorm = attention.k_layernorm = HeadNorm
    return spec


def block_spec(model: ModelSection, backend: str = "auto", cp_scheme: str = "heads") -> TransformerBlockSubmodules:
    """All layers, by the pattern string."""
    layers = [layer_spec(model, letter, backend, cp_scheme) for letter in layer_letters(model)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
