"""Typed run configuration: sections, loading with overrides, cross-checks."""

from megatron_dla.config.adapter import AdapterRunConfig
from megatron_dla.config.adapter_checks import check_adapter_config, memory_layers, row_length
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
from megatron_dla.config.load import dump_config, from_dict, load_config, to_dict, to_yaml
from megatron_dla.config.pattern import LETTERS
from megatron_dla.config.schema import (
    AnomalySection,
    CheckpointSection,
    DataSection,
    DebugSection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunConfig,
    RunSection,
    TauSection,
    TrainingSection,
)

__all__ = [
    "LETTERS",
    "AdapterRunConfig",
    "AnomalySection",
    "CheckpointSection",
    "DataSection",
    "DebugSection",
    "LoggingSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "RunConfig",
    "RunSection",
    "TauSection",
    "TrainingSection",
    "attention_head_dim",
    "check_adapter_config",
    "check_config",
    "check_context_parallel",
    "check_model",
    "check_precision",
    "check_tensor_parallel",
    "dump_config",
    "from_dict",
    "layer_letters",
    "load_config",
    "memory_layers",
    "row_length",
    "softmax_layers",
    "to_dict",
    "to_yaml",
]
