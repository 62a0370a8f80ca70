"""The `mpu` object that DeepSpeed wants, made from process groups that are passed in.

DeepSpeed's data-parallel group is every rank with tokens of its own: data x context. It averages gradients over them
and shards its states over them; `training.step` scales the loss to match. The alternative, DeepSpeed's
sequence-parallel methods, is wrong at ZeRO-3 (0.19.8): parameters are partitioned over `get_data_parallel_group` alone,
so gradients are never summed over context, and its reduce-scatter does not undo the averaging.
"""

from __future__ import annotations

import torch.distributed as dist


class TensorDataMpu:
    """Tensor parallelism ("model parallel" in DeepSpeed's words) times data parallelism; pipeline is always 1.

    `dp`: all ranks that hold the same parameters and read other tokens.
    """

    def __init__(self, tp: dist.ProcessGroup, dp: dist.ProcessGroup, pp: dist.ProcessGroup) -> None:
        assert pp.size() == 1, "pipeline parallelism is not supported"
        self._tp, self._dp, self._pp = tp, dp, pp

    # tensor parallel: overflow checks, gradient norm, checkpoint file names
    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tp

    def get_model_parallel_rank(self) -> int:
        return self._tp.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._tp.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self._tp)[0]

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._pp

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    # data parallel: replicas that read different tokens
    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._dp

    def get_data_parallel_rank(self) -> int:
        return self._dp.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._dp.size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._dp)


def make_mpu(groups) -> TensorDataMpu:
    """The mpu of a layout (`groups`: Megatron's ProcessGroupCollection)."""
    return TensorDataMpu(groups.tp, groups.dp_cp, groups.pp)
