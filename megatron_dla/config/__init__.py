"""Typed run configuration: sections, loading with overrides, cross-checks."""

from megatron_dla.config.adapter import AdapterRunConfig
from megatron_dla.config.checks import (
    attention_head_dim,
    check_config,
    check_context_parallel,
    check_model,
    check_precision,
    check_tensor_parallel,
    layer_letters,
    softmax_layers,
)
from megatron_dla.config.load import dump_config, from_dict, load_any, load_config, to_dict
from megatron_dla.config.pattern import LETTERS
from megatron_dla.config.schema import (
    DataSection,
    DebugSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunConfig,
    RunSection,
    TrainingSection,
)

__all__ = [
    "LETTERS",
    "AdapterRunConfig",
    "DataSection",
    "DebugSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "RunConfig",
    "RunSection",
    "TrainingSection",
    "attention_head_dim",
    "check_config",
    "check_context_parallel",
    "check_model",
    "check_precision",
    "check_tensor_parallel",
    "dump_config",
    "from_dict",
    "layer_letters",
    "load_any",
    "load_config",
    "softmax_layers",
    "to_dict",
]
