"""The trainer of a δ-mem adapter on a frozen backbone; see `loop` for whole models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_dla.adapters.calls import MemoryCall
from megatron_dla.adapters.delta_mem import freeze_backbone, initialise_memories, memory_layers, with_memory
from megatron_dla.adapters.files import Fingerprint
from megatron_dla.adapters.memory import half_life
from megatron_dla.checkpoint.manager import Checkpointer, check_same_model, complete_checkpoints, load_weights
from megatron_dla.checkpoint.optimizer import local_shapes
from megatron_dla.checkpoint.weights import CheckpointLayout, parameter_tags
from megatron_dla.config.adapter import AdapterRunConfig
from megatron_dla.data.packing import Batch
from megatron_dla.errors import STOPPED
from megatron_dla.hf.backbones import build_backbone
from megatron_dla.metrics.meters import StepMeter, memory_gb
from megatron_dla.metrics.sinks import JsonlSink, console_line
from megatron_dla.parallel.context import context_slice
from megatron_dla.parallel.groups import initialize_distributed, initialize_model_parallel, on_main, process_groups
from megatron_dla.training.control import REASONS, RunControl
from megatron_dla.training.engine import apply_optimizer_section, build_engine, parameter_groups
from megatron_dla.training.signals import StopRequest
from megatron_dla.training.step import dropped_update, train_step


class AdapterBatches(Protocol):
    """Micro batches of one data-parallel rank, and what the memories are told of each."""

    seq_len: int

    def next_step(self) -> list[Batch]: ...

    def call(self, batch: Batch, device: torch.device) -> MemoryCall: ...

    def held_out(self) -> list[Batch]: ...

    def state(self) -> dict[str, Any]: ...

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass
class GateMeter:
    """Mean write gate and size of the output correction, by layer, over the calls since the last reading."""

    calls: int = 0
    sums: torch.Tensor | None = None

    def add(self, call: MemoryCall) -> None:
        rows = []
        for _, result in sorted(call.results.items()):
            assert result.steering is not None
            rows.append(torch.stack([result.gate.double(), result.keep.double(), result.steering.double()]))
        now = torch.stack(rows)
        self.sums = now if self.sums is None else self.sums + now
        self.calls += 1

    def take(self, group: Any) -> dict[str, Any]:
        """Metrics over the data-parallel `group` (a collective)."""
        assert self.sums is not None
        mean = self.sums / self.calls
        dist.all_reduce(mean, group=group)
        gate, keep, steering = (mean / group.size()).T.tolist()
        lives = [half_life(x) for x in keep]
        self.calls, self.sums = 0, None
        return {
            "gate": sum(gate) / len(gate),
            "gate_by_layer": [round(x, 6) for x in gate],
            "half_life_by_layer": [None if math.isinf(x) else round(x, 2) for x in lives],
            "steering_by_layer": [round(x, 6) for x in steering],
        }


class AdapterTrainer:
    """One run: `AdapterTrainer(config, run_dir, device, bf16, batches, base).run()` returns the exit code.

    Args:
        config: checked by `check_adapter_run`. base: of the backbone, kept in every checkpoint.
        batches: a function of (data rank, data size), called once the groups exist.
        control: the run directory's control files, made if not given.

    Raises:
        FenceError: another run writes in run_dir.
    """

    def __init__(
        self,
        config: AdapterRunConfig,
        run_dir: Path,
        device: str,
        bf16: bool,
        batches: Callable[[int, int], AdapterBatches],
        base: Fingerprint,
        control: RunControl | None = None,
    ) -> None:
        self.config, self.run_dir = config, run_dir
        initialize_distributed(device)
        self.control = control or RunControl(run_dir, dist.get_rank())
        self.control.attempt = on_main(self.control.claim)
        initialize_model_parallel(
            config.parallel.tensor_model_parallel_size, config.run.seed, config.parallel.context_parallel_size
        )
        self.groups = process_groups()
        self.is_main = dist.get_rank() == 0
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self.batches: AdapterBatches = batches(self.groups.dp.rank(), self.groups.dp.size())
        model, section = build_backbone(
            config.backbone.dir, config.parallel, seq_len=self.batches.seq_len, device=device,
            dtype=torch.bfloat16 if bf16 else torch.float32, recompute=config.training.recompute,
            delta_mem=config.delta_mem,
        )  # fmt: skip
        initialise_memories(model, config.run.seed)
        freeze_backbone(model)
        model.train()
        self.parameters = sum(
            p.numel() * (self.groups.tp.size() if name == "delta_q_proj" else 1)
            for layer in memory_layers(model)
            for name, p in layer.delta_mem.named_parameters()
        )
        tags, shapes = parameter_tags(model), local_shapes(model)
        found = complete_checkpoints(run_dir) if config.training.resume else []
        newest = found[-1][1] if found else None
        self.layout = CheckpointLayout(
            model=section, vocab_size=section.vocab_multiple, tokenizer_sha256="",
            tensor_parallel=self.groups.tp.size(), seq_len=self.batches.seq_len, step=0, tags=tags, shapes=shapes,
            adapter={"delta_mem": config.delta_mem.to_dict(), "base": {"name": base.name, "sha256": base.sha256}},
        )  # fmt: skip
        if newest is not None:
            check_same_model(newest, self.layout)
            load_weights(newest, model, self.groups.tp)  # before ZeRO takes its copies
        optimizer_groups = parameter_groups(model, config)
        self.engine = build_engine(model, optimizer_groups, config, self.groups, bf16)
        self.checkpoints = Checkpointer(
            run_dir, self.engine, self.groups, config.training.keep_checkpoints, self.control
        )
        self.step, self.gates = 0, GateMeter()
        if newest is not None:
            self.step, data_state = self.checkpoints.load(newest, self.layout)
            self.batches.load_state(data_state)
            apply_optimizer_section(self.engine, optimizer_groups, config)
        self.sink = JsonlSink(run_dir / "metrics.jsonl", self.step if newest else None) if self.is_main else None
        if newest is not None:
            self._say(f"going on from {newest} at step {self.step}")

    def run(self) -> int:
        training = self.config.training
        meter = StepMeter(self.step, training.steps)
        self._say(f"{self.parameters:,} trained parameters in {len(self.layout.tags)} tensors")
        with self.control, StopRequest(self.device, self.control.asked_to_stop) as stop:
            while self.step < training.steps:
                started = time.monotonic()
                loss = self._train_step()
                self.step += 1
                self.control.beat(self.step)
                meter.add(training.global_batch_size * self.batches.seq_len, time.monotonic() - started)
                last = self.step == training.steps
                validating = training.eval_every and (last or self.step % training.eval_every == 0)
                if last or validating or self.step % training.log_every == 0:
                    metrics = self._metrics(loss, meter)
                    self._log(metrics | self._validate() if validating else metrics)
                reason = stop.agreed()
                stopping = reason and not last
                if last or stopping or (training.save_every and self.step % training.save_every == 0):
                    self._save()
                if stopping:
                    by = REASONS.get(reason, "a signal")
                    self._say(f"stopped by {by} after step {self.step}; the same command goes on from there")
                    return STOPPED
            on_main(lambda: self.control.finish(self.step))
        return 0

    def _train_step(self) -> float:
        batches, calls = self.batches.next_step(), []
        self.lr = self.engine.get_lr()[0]  # before the schedule moves on

        def remember(batch: Batch) -> MemoryCall:
            calls.append(self._call(batch))
            return calls[-1]

        mean = train_step(self.engine, batches, self.groups, self.device, self.batches.seq_len, remember=remember)
        for call in calls:
            self.gates.add(call)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss is {mean} at step {self.step + 1}: lower optimizer.lr or check the episodes"
            )
        if dropped_update(self.engine):
            self._say(f"step {self.step + 1}: the gradient is not finite, its update is dropped")
        return mean

    def _call(self, batch: Batch) -> MemoryCall:
        call = self.batches.call(batch, self.device)
        training = self.config.training
        call.gate_weight, call.gate_target, call.measure = training.gate_weight, training.gate_target, True
        return call

    def _metrics(self, loss: float, meter: StepMeter) -> dict[str, Any]:
        norm = self.engine.get_global_grad_norm()
        return {
            "step": self.step,
            "loss": loss,
            "grad_norm": None if norm is None else float(norm),
            "lr": self.lr,
            "tokens": self.step * self.config.training.global_batch_size * self.batches.seq_len,
            "tokens_per_s": meter.tokens_per_s(),
            "memory_gb": memory_gb(self.device),
            "eta_s": meter.eta_s(self.step),
        } | self.gates.take(self.groups.dp)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Mean loss over the held-out answers."""
        self.engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in self.batches.held_out():
            rows = (batch.tokens, batch.labels, batch.loss_mask)
            tokens, labels, mask = (context_slice(x, self.groups.cp).to(self.device) for x in rows)
            call = self.batches.call(batch, self.device)
            packed = with_memory(call, self.batches.seq_len, batch.cu_seqlens.to(self.device))
            losses = self.engine(tokens, None, None, labels=labels, packed_seq_params=packed)
            totals += torch.stack([(losses * mask).sum(), mask.sum()]).double()
        dist.all_reduce(totals, group=self.groups.dp_cp)
        self.engine.train()
        return {"val_loss": (totals[0] / totals[1]).item()}

    def _save(self) -> None:
        self.layout.step = self.step
        states: list[Any] = [None] * self.groups.dp.size()
        dist.all_gather_object(states, self.batches.state(), group=self.groups.dp)
        self._say(f"saved {self.checkpoints.save(self.layout, self.batches.merge(states))}")

    def _log(self, metrics: dict[str, Any]) -> None:
        if self.sink is not None:
            self.sink.write(metrics)
            self._say(console_line(metrics, self.config.training.steps))

    def _say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)
