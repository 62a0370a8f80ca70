"""Layer specs: Megatron's local TransformerLayer with the mixer of each letter, put in by ModuleSpec."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_dla.config import ModelSection, layer_letters
from megatron_dla.mixers.dla import DLAMixer, DLAMixerSubmodules
from megatron_dla.mixers.log_linear import LogLinearMixer
from megatron_dla.mixers.norms import HeadNorm, RMSNorm
from megatron_dla.mixers.plain import GDNMixer, Mamba2Mixer
from megatron_dla.mixers.softmax import CoreAttention


def dla_mixer_spec(
    model: ModelSection, attention: ModuleSpec, backend: str, cp_scheme: str, module: type[DLAMixer] = DLAMixer
) -> ModuleSpec:
    """The DLA mixer, or a variant of it, in place of the attention."""
    submodules = DLAMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    return ModuleSpec(
        module=module, params={"model": model, "backend": backend, "cp_scheme": cp_scheme}, submodules=submodules
    )


def softmax_spec(
    model: ModelSection, attention: ModuleSpec, backend: str, cp_scheme: str, window: int | None = None
) -> ModuleSpec:
    """Megatron's self-attention with our core and norms.

    Whether a layer has rotary positions is in Megatron's config (`no_rope_freq`), by its number.
    """
    attention.submodules.core_attention = ModuleSpec(module=CoreAttention, params={"window": window})
    if model.qk_norm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = HeadNorm
    return attention


def _window_spec(model: ModelSection, attention: ModuleSpec, backend: str, cp_scheme: str) -> ModuleSpec:
    return softmax_spec(model, attention, backend, cp_scheme, model.sliding_window)


# by letter: (model section, Megatron's spec of the self-attention, kernel backend, context-parallel scheme) -> mixer
MIXER_SPECS: dict[str, Callable[[ModelSection, ModuleSpec, str, str], ModuleSpec]] = {
    "D": dla_mixer_spec,
    "A": softmax_spec,
    "N": softmax_spec,
    "W": _window_spec,
    "G": partial(dla_mixer_spec, module=GDNMixer),
    "M": partial(dla_mixer_spec, module=Mamba2Mixer),
    "L": partial(dla_mixer_spec, module=LogLinearMixer),
}


def layer_spec(model: ModelSection, letter: str = "D", backend: str = "auto", cp_scheme: str = "heads") -> ModuleSpec:
    """One TransformerLayer: the mixer of the letter in the self_attention slot, and a SwiGLU MLP if it has one."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if not model.ffn_hidden_size:
        layer.pre_mlp_layernorm, layer.mlp, layer.mlp_bda = IdentityOp, IdentityOp, IdentityFuncOp
    layer.self_attention = MIXER_SPECS[letter](model, layer.self_attention, backend, cp_scheme)
    return spec


def block_spec(model: ModelSection, backend: str = "auto", cp_scheme: str = "heads") -> TransformerBlockSubmodules:
    """All layers, by the pattern string."""
    layers = [layer_spec(model, letter, backend, cp_scheme) for letter in layer_letters(model)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
