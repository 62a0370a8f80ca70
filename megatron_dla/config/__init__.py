"""Typed run configuration: sections, loading with overrides, cross-checks."""

from megatron_dla.config.checks import (
    check_config,
    check_context_parallel,
    check_model,
    check_precision,
    check_tensor_parallel,
    layer_letters,
)
from megatron_dla.config.load import dump_config, from_dict, load_config, to_dict
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
    "DataSection",
    "DebugSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "RunConfig",
    "RunSection",
    "TrainingSection",
    "check_config",
    "check_context_parallel",
    "check_model",
    "check_precision",
    "check_tensor_parallel",
    "dump_config",
    "from_dict",
    "layer_letters",
    "load_config",
    "to_dict",
]
