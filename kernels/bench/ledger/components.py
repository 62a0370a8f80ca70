"""Which part of the step an operation belongs to, by the function on the call stack that caused it."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

PROJECTIONS, CONVOLUTION, GATES = "projections", "convolution", "gates and slot weights"
PARTITION, SCANS, LOCAL, OUTPUT, BACKWARD = "partition", "scans", "chunk-local stage", "output", "backward passes"
GATED_NORM, NORM, MLP = "gated norm", "layer norm", "MLP"
SOFTMAX, LOSS = "softmax attention", "loss"
OPTIMIZER, COMMUNICATION, OTHER = "optimizer", "communication", "embedding and residuals"
AUTOGRAD = "autograd"  # not a component: what is called here belongs where the forward operation does

# in the order of the table
COMPONENTS = (
    PROJECTIONS, CONVOLUTION, GATES, PARTITION, LOCAL, SCANS, OUTPUT, BACKWARD, GATED_NORM, NORM, MLP, SOFTMAX, LOSS,
    OPTIMIZER, COMMUNICATION, OTHER,
)  # fmt: skip
MIXER = (PROJECTIONS, CONVOLUTION, GATES, PARTITION, LOCAL, SCANS, OUTPUT, BACKWARD, GATED_NORM)
FUSIBLE = (PROJECTIONS, CONVOLUTION, GATES, GATED_NORM, NORM, MLP)  # beside their matrix products

# end of a module's name, function (or Class.method) -> component; the innermost frame that is named here decides
FUNCTIONS = {
    ("mixers.functional", "short_convolution"): CONVOLUTION,
    ("mixers.functional", "slot_weights"): GATES,
    ("mixers.functional", "mamba2_inputs"): GATES,
    ("mixers.functional", "gdn_inputs"): GATES,
    ("mixers.functional", "clamp_tau"): GATES,
    ("mixers.functional", "gated_head_norm"): GATED_NORM,
    ("mixers.functional", "gated_group_norm"): GATED_NORM,
    ("kernels.fused.inputs", "_RecurrenceInputs.backward"): CONVOLUTION,
    ("kernels.fused.norm", "_GatedNorm.backward"): GATED_NORM,
    ("kernels.fused.packed", "_Split.backward"): PROJECTIONS,
    ("kernels.fused.loss", "_CrossEntropy.backward"): LOSS,
    ("mixers.around", "recurrence_inputs"): CONVOLUTION,
    ("mixers.around", "with_skip"): GATES,
    ("mixers.around", "gated_head_norm"): GATED_NORM,
    ("mixers.dla", "DLAMixer._norm"): GATED_NORM,
    ("mixers.dla", "DLAMixer._inputs"): CONVOLUTION,
    ("mixers.dla", "DLAMixer._recur"): CONVOLUTION,
    ("mixers.dla", "DLAMixer._project"): PROJECTIONS,
    ("mixers.dla", "DLAMixer._shared_query_key"): PROJECTIONS,
    ("mixers.dla", "DLAMixer._partition"): PARTITION,
    ("mixers.dla", "DLAMixer.forward"): PROJECTIONS,
    ("mixers.norms", "RMSNorm.forward"): NORM,
    ("mixers.softmax", "CoreAttention.forward"): SOFTMAX,
    ("kernels.dla.attention", "partition"): PARTITION,
    ("kernels.dla.attention", "dla_attention"): OUTPUT,
    ("kernels.dla.triton_chunk", "TritonDLA.forward"): OUTPUT,
    ("kernels.dla.triton_chunk", "TritonDLA.backward"): BACKWARD,
    ("transformer.attention", "SelfAttention.get_query_key_value_tensors"): SOFTMAX,
    ("transformer.attention", "Attention.forward"): SOFTMAX,
    ("transformer.mlp", "MLP.forward"): MLP,
    ("transformer.transformer_layer", "TransformerLayer.forward"): OTHER,
    ("gpt.gpt_model", "GPTModel.forward"): OTHER,
    ("gpt.gpt_model", "GPTModel._postprocess"): LOSS,
    ("language_module.language_module", "LanguageModule.compute_language_model_loss"): LOSS,
    ("training.step", "train_step"): LOSS,
    ("ledger.step", "CountedEngine.step"): OPTIMIZER,
    ("ledger.step", "CountedEngine.accumulate"): OPTIMIZER,
    ("torch.autograd", "backward"): AUTOGRAD,
}

# a kernel's own place, before the function that launches it
KERNELS = {
    "state_scan_kernel": SCANS,
    "reverse_scan_kernel": SCANS,
    "slot_scan_kernel": SCANS,
    "slot_reverse_kernel": SCANS,
    "line_kernel": LOCAL,
    "block_states_kernel": SCANS,
    "carry_states_kernel": SCANS,
    "carry_gradients_kernel": SCANS,
    "decay_cumsum_kernel": LOCAL,
    "live_anchor_kernel": LOCAL,
    "live_table_kernel": LOCAL,
    "slot_columns_kernel": LOCAL,
    "tile_counts_kernel": LOCAL,
    "inverse_kernel": LOCAL,
    "local_forward_kernel": LOCAL,
    "compose_kernel": LOCAL,
    "transition_kernel": LOCAL,
}


def _named(code: CodeType, module: str) -> str | None:
    for (ending, name), component in FUNCTIONS.items():
        if code.co_qualname == name and module.endswith(ending):
            return component
    return None


_of_code: dict[CodeType, str | None] = {}


def component_of(frame: FrameType | None = None) -> str | None:
    """The component of the calling code; None where no function on the stack is listed."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code not in _of_code:
            _of_code[code] = _named(code, frame.f_globals.get("__name__", ""))
        if (found := _of_code[code]) is not None:
            return found
        frame = frame.f_back
    return None


def of_kernel(name: str, caller: str | None) -> str:
    """The component of a Triton launch; in the partition and in a backward pass, that of the caller."""
    if caller in (PARTITION, BACKWARD) and KERNELS.get(name) != SCANS:
        return caller
    return KERNELS.get(name) or caller or OTHER
