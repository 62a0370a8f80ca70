"""One real training step of a config: the Megatron model, `train_step`, and what ZeRO does around it.

On meta tensors to be counted, on a device to be measured.

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

from .record import Recording, nbytes

META = torch.device("meta")
DOCUMENTS = 8  # documents of equal length in a row, where the config resets at documents


class CountedEngine:
    """A DeepSpeed engine as `train_step` calls it."""

    recording: Recording

    def __init__(self, model: nn.Module, accumulation: int, clip: float) -> None:
        self.module, self.micro, self.accumulation, self.clip = model, 0, accumulation, clip
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        self.sums = [torch.zeros_like(p) for p in self.masters]
        self.moments = [[torch.zeros_like(p) for p in self.masters] for _ in range(2)]
        self.steps = [torch.ones((), device=p.device) for p in self.masters]

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


def _start_distributed(device: torch.device) -> None:
    """A group of one process; for meta tensors, of collectives that do nothing."""
    if device.type == "meta":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextlib.contextmanager
def one_process(device: torch.device = META) -> Iterator[Any]:
    """Megatron's groups of one process on `device`."""
    from megatron_dla.parallel.groups import process_groups

    if dist.is_initialized():
        raise RuntimeError("the ledger needs a process without torch.distributed: start it on its own")
    compat.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    _start_distributed(device)
    current = torch.cuda.current_device
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(0)
        if device.type == "meta":
            torch.cuda.current_device = lambda: META  # type: ignore[assignment, return-value]
        yield process_groups()
    finally:
        torch.cuda.current_device = current
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def packed_batch(rows: int, tokens: int, vocabulary: int, documents: int = DOCUMENTS) -> Any:
    """A micro batch of `rows` equal rows of equal documents of random tokens."""
    from megatron_dla.data.packing import make_batch, pack_row

    window = np.random.default_rng(0).integers(1, vocabulary, tokens + 1)
    window[[tokens * (i + 1) // documents - 1 for i in range(documents - 1)]] = 0
    return make_batch([pack_row(window, 0)] * rows, list(range(rows)))


@contextlib.contextmanager
def compiled_swiglu(recording: Recording) -> Iterator[None]:
    """Megatron's `torch.compile`d SwiGLU as what it is on CUDA: one kernel each way."""
    from megatron.core.fusions import fused_bias_swiglu as fused

    def swiglu(y: Tensor) -> Tensor:
        out = y.new_empty(*y.shape[:-1], y.shape[-1] // 2)
        recording.add("op", "swiglu", nbytes(y) + nbytes(out))
        return out

    def swiglu_back(g: Tensor, y: Tensor) -> Tensor:
        recording.add("op", "swiglu_backward", nbytes(g) + 2 * nbytes(y))
        return torch.empty_like(y)

    stock = fused.swiglu, fused.swiglu_back
    fused.swiglu, fused.swiglu_back = swiglu, swiglu_back
    try:
        yield
    finally:
        fused.swiglu, fused.swiglu_back = stock


class Step:
    """The model of a config on a device and one optimizer step of it."""

    def __init__(self, config: RunConfig, groups: Any, micro_batches: int = 1, device: torch.device = META) -> None:
        from megatron_dla.model.gpt import build_model
        from megatron_dla.tasks.pretrain import ASSUMED_VOCABULARY

        self.config, self.groups, self.device, self.T = config, groups, device, config.data.seq_len
        self.vocabulary = ASSUMED_VOCABULARY
        model = build_model(
            config.model, config.parallel, vocab_size=self.vocabulary, seq_len=self.T, dtype=torch.bfloat16,
            seed=None if device.type == "meta" else config.run.seed, device=device.type,
            backend="torch" if device.type == "cpu" else "triton", recompute=config.training.recompute,
            keep_states=config.training.keep_states,
        )  # fmt: skip
        self.engine = CountedEngine(model.train(), micro_batches, config.optimizer.clip_grad)
        self.batches = [packed_batch(config.training.micro_batch_size, self.T, self.vocabulary)] * micro_batches

    def run(self, recording: Recording) -> None:
        """One `train_step`, recorded."""
        from megatron_dla.model.gpt import packed_sequence
        from megatron_dla.training.step import train_step

        resets = self.config.data.reset_at_documents

        def pack(batch: Any) -> Any:
            recording.in_micro_batch = True
            return packed_sequence(batch.cu_seqlens if resets else None, self.T)

        self.engine.recording = recording
        with compiled_swiglu(recording) if self.device.type == "meta" else contextlib.nullcontext():
            train_step(self.engine, self.batches, self.groups, self.device, pack)
