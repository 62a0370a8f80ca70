"""One real training step of a config on meta tensors: the Megatron model, `train_step`, and what ZeRO does around it.

DeepSpeed's engine is not run; `CountedEngine` stands for it and carries out what its ZeRO-1 step in bf16 does: fp32
sums of gradients, norm, clipping, AdamW on the fp32 master weights, cast back to bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dla import compat
from megatron_dla.config import RunConfig

from .record import Recording

DOCUMENTS = 8  # documents of equal length in a row, where the config resets at documents


class CountedEngine:
    """A DeepSpeed engine as `train_step` calls it."""

    recording: Recording

    def __init__(self, model: nn.Module, accumulation: int, clip: float) -> None:
        self.module, self.micro, self.accumulation, self.clip = model, 0, accumulation, clip
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.sums = [torch.zeros(p.shape, device="meta") for p in self.parameters]
        self.masters = [torch.zeros(p.shape, device="meta") for p in self.parameters]
        self.moments = [[torch.zeros(p.shape, device="meta") for p in self.parameters] for _ in range(2)]
        self.steps = [torch.ones((), device="meta") for _ in self.parameters]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.accumulate()
        self.recording.in_micro_batch = False

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add each gradient into its fp32 sum and drop it."""
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            if parameter.grad is not None:
                total.add_(parameter.grad)
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.micro += 1
        if self.micro < self.accumulation:
            return
        self.micro = 0
        flat = torch.cat([total.flatten() for total in self.sums])
        norm = flat.norm()
        norm.item()
        if self.clip:
            flat.mul_(1.0)
        first, second = self.moments
        torch._fused_adamw_(
            self.masters, self.sums, first, second, [], self.steps, lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1,
            eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)


@contextlib.contextmanager
def one_process() -> Iterator[Any]:
    """Megatron's groups of one process whose collectives do nothing, and `meta` as the current device."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_dla.parallel.groups import process_groups

    if dist.is_initialized():
        raise RuntimeError("the ledger needs a process without torch.distributed: start it on its own")
    compat.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    device = torch.cuda.current_device
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(0)
        torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment, return-value]
        yield process_groups()
    finally:
        torch.cuda.current_device = device
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def packed_batch(rows: int, tokens: int, documents: int = DOCUMENTS) -> Any:
    """A micro batch of `rows` rows of equal documents."""
    from megatron_dla.data.packing import make_batch, pack_row

    window = np.ones(tokens + 1, dtype=np.int64)
    window[[tokens * (i + 1) // documents - 1 for i in range(documents - 1)]] = 0
    return make_batch([pack_row(window, 0)] * rows, list(range(rows)))


class Step:
    """The model of a config on meta tensors and one optimizer step of it."""

    def __init__(self, config: RunConfig, groups: Any, micro_batches: int = 1) -> None:
        from megatron_dla.model.gpt import build_model
        from megatron_dla.tasks.pretrain import ASSUMED_VOCABULARY

        self.config, self.groups, self.T = config, groups, config.data.seq_len
        self.vocabulary = ASSUMED_VOCABULARY
        model = build_model(
            config.model, config.parallel, vocab_size=self.vocabulary, seq_len=self.T, seed=None, dtype=torch.bfloat16,
            device="meta", backend="triton", recompute=config.training.recompute,
        )  # fmt: skip
        self.engine = CountedEngine(model.train(), micro_batches, config.optimizer.clip_grad)
        self.batches = [packed_batch(config.training.micro_batch_size, self.T)] * micro_batches

    def run(self, recording: Recording) -> None:
        """One `train_step`, recorded."""
        from megatron_dla.model.gpt import packed_sequence
        from megatron_dla.training.step import train_step

        device, resets = torch.device("meta"), self.config.data.reset_at_documents

        def pack(batch: Any) -> Any:
            recording.in_micro_batch = True
            return packed_sequence(batch.cu_seqlens if resets else None, self.T)

        self.engine.recording = recording
        train_step(self.engine, self.batches, self.groups, device, pack)
