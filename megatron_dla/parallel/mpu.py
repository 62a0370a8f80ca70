"""What DeepSpeed asks of an `mpu`, answered from process groups that are passed in.

DeepSpeed looks at which methods there are: `TensorDataMpu` without context parallelism, `ContextMpu` with it.
"""

from __future__ import annotations

import torch.distributed as dist


class TensorDataMpu:
    """Tensor parallelism ("model parallel" in DeepSpeed's words) times data parallelism; pipeline is always 1."""

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

    # data parallel: replicas that read different rows
    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._dp

    def get_data_parallel_rank(self) -> int:
        return self._dp.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._dp.size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._dp)


class ContextMpu(TensorDataMpu):
    """With context parallelism, which DeepSpeed calls sequence parallelism.

    ZeRO then shards over data x context, sums gradients over context and averages them over data: each rank divides
    its loss by the token count of all of them. Batch arithmetic counts data-parallel ranks only.
    """

    def __init__(
        self, tp: dist.ProcessGroup, dp: dist.ProcessGroup, pp: dist.ProcessGroup, cp: dist.ProcessGroup,
        dp_cp: dist.ProcessGroup,
    ) -> None:  # fmt: skip
        super().__init__(tp, dp, pp)
        self._cp, self._dp_cp = cp, dp_cp

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self._cp

    def get_sequence_parallel_rank(self) -> int:
        return self._cp.rank()

    def get_sequence_parallel_world_size(self) -> int:
        return self._cp.size()

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        return self._dp_cp

    def get_sequence_data_parallel_rank(self) -> int:
        return self._dp_cp.rank()

    def get_sequence_data_parallel_world_size(self) -> int:
        return self._dp_cp.size()


def make_mpu(groups) -> TensorDataMpu:
    """The mpu of a layout (`groups`: Megatron's ProcessGroupCollection)."""
    if groups.cp.size() > 1:
        return ContextMpu(groups.tp, groups.dp, groups.pp, groups.cp, groups.dp_cp)
    return TensorDataMpu(groups.tp, groups.dp, groups.pp)
