"""The trainer, for every task: read it from top to bottom."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dla.checkpoint.find import set_aside, step_directories
from megatron_dla.checkpoint.integrity import DATA_STATE, describe_damage, naming_values, newest_whole
from megatron_dla.checkpoint.manager import (
    Checkpointer,
    agreed_faults,
    check_same_model,
    is_weights_only,
    load_weights,
)
from megatron_dla.checkpoint.optimizer import local_shapes
from megatron_dla.checkpoint.retention import Retention
from megatron_dla.checkpoint.weights import parameter_tags
from megatron_dla.config import to_dict, to_yaml
from megatron_dla.errors import STOPPED
from megatron_dla.gpus import find_gpu
from megatron_dla.metrics.meters import MemoryMeter, StepMeter
from megatron_dla.metrics.sinks import console_line
from megatron_dla.metrics.trackers import Sinks, open_sinks
from megatron_dla.parallel.groups import initialize_distributed, initialize_model_parallel, on_main, process_groups
from megatron_dla.parallel.replicas import check_replicas
from megatron_dla.training.anomalies import Anomalies, Records
from megatron_dla.training.control import REASONS, RunControl
from megatron_dla.training.device import Device
from megatron_dla.training.engine import apply_optimizer_section, build_engine, parameter_groups
from megatron_dla.training.fence import node_name
from megatron_dla.training.patience import Patience
from megatron_dla.training.signals import StopRequest
from megatron_dla.training.step import StepResult
from megatron_dla.training.task import Runtime, Task

# of the rank with the highest
HIGHEST = ("data_wait_share", "memory_active_gb", "memory_active_share", "memory_reserved_gb", "memory_reserved_share",
           "alloc_retries", "ooms")  # fmt: skip
ANOMALIES, PATIENCE = "anomalies", "patience"  # keys of the data's state


class Trainer:
    """One run: `Trainer(task, run_dir, device).run()` returns the exit code (0 done, 75 asked to stop).

    Args:
        task: has passed its checks. run_dir: exists on every rank; this run is its only writer until `run` returns.
        control: the run directory's control files, made if not given.

    Raises:
        FenceError: another run writes in run_dir.
        CheckpointError: run_dir holds a checkpoint of another model, or a damaged one.
    """

    def __init__(self, task: Task, run_dir: Path, device: Device, control: RunControl | None = None) -> None:
        self.task, self.config, self.run_dir = task, task.config, run_dir
        config = self.config
        initialize_distributed(device.type)
        self.control = control or RunControl(run_dir, dist.get_rank())
        self.control.attempt = on_main(self.control.claim)
        initialize_model_parallel(
            config.parallel.tensor_model_parallel_size, config.run.seed, config.parallel.context_parallel_size
        )
        self.groups = process_groups()
        self.runtime = Runtime(self.groups, device.current(), device.dtype)
        model = task.build(self.runtime)
        self.layout = replace(task.layout(), tags=parameter_tags(model), shapes=local_shapes(model))
        steps = on_main(lambda: step_directories(run_dir)) if config.training.resume else []
        newest, damaged = newest_whole(steps, config.checkpoint.damaged == "fallback", agreed_faults)
        if newest is not None:
            check_same_model(newest, self.layout)
            load_weights(newest, model, self.groups.tp)  # before ZeRO takes its copies
        self.optimizer_groups = parameter_groups(model, config)
        self.engine = build_engine(model, self.optimizer_groups, config, self.groups, device.bf16)
        section = config.checkpoint
        keep = Retention(
            config.training.keep_checkpoints, section.keep_every, section.keep_best, tuple(section.permanent)
        )
        self.checkpoints = Checkpointer(
            run_dir, self.engine, self.groups, keep, self.control,
            background=section.background, max_failures=section.max_failures,
        )  # fmt: skip
        self.step, self.anomalies = 0, Anomalies(config.anomalies)
        self.patience = Patience(config.training.patience)
        if newest is not None and not is_weights_only(newest):
            self.anomalies.load_state_dict(self._load(newest))
        if config.debug.check_replicas:
            check_replicas(self.engine.module, self.groups, "before the first step")
        self.sinks = Sinks()
        on_main(lambda: self._open_sinks(self.step if newest else None))
        self.records = Records(run_dir, self.anomalies.records) if dist.get_rank() == 0 else None
        for path, faults in damaged.items():
            kept = on_main(partial(set_aside, path))
            self.runtime.print(f"{describe_damage(path, faults)}: set aside as {kept.name}")
            self.control.event("fallback", self.step, path=path.name, reason=faults[0])
        self.control.event(
            "start", self.step, host=node_name(), processes=dist.get_world_size(), last_logged=self.sinks.last_step
        )
        if newest is not None:
            self.runtime.print(f"resuming from {newest} at step {self.step}")

    def _open_sinks(self, resumed_step: int | None) -> None:
        """On rank 0. Raises ConfigError where a tracker refuses this run."""
        config = self.config
        self.sinks = open_sinks(
            self.run_dir, config.logging, config.run.name, to_dict(config), resumed_step, self.runtime.print
        )

    def _meter(self) -> StepMeter:
        device = self.runtime.device
        gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return StepMeter(
            self.step, self.config.training.steps, dist.get_world_size(), self.task.flops_per_token,
            None if gpu is None else gpu.dense,
        )  # fmt: skip

    def _load(self, checkpoint: Path) -> dict[str, Any]:
        """All but the weights, which are in the model already; returns the state of `anomalies`."""
        self.step, state = self.checkpoints.load(checkpoint, self.layout)
        anomalies = state.pop(ANOMALIES, {})
        with naming_values(checkpoint / DATA_STATE):
            self.patience.load_state_dict(state.pop(PATIENCE, {}))
            self.task.load_state_dict(state)
        apply_optimizer_section(self.engine, self.optimizer_groups, self.config)
        self.anomalies.can_rewind = True
        return anomalies

    def run(self) -> int:
        training, check_every = self.config.training, self.config.debug.check_replicas
        tokens_per_step = training.global_batch_size * self.task.seq_len
        meter, loader = self._meter(), self.task.loader
        self.memory = MemoryMeter(self.runtime.device)
        request = StopRequest(self.runtime.device, self.control.asked_to_stop)
        first = self.step + 1
        with self.control, self.sinks, self.checkpoints, request as stop:
            if self.step == 0 and training.eval_every:
                self._log({"step": 0, "tokens": 0, **self._validate()})
            while self.step < training.steps and not self.patience.over:
                started, waited = time.monotonic(), loader.total_wait_s
                result = self._train_step()
                if result is None:
                    continue
                self.step += 1
                self.control.beat(self.step)
                if check_every and self.step % check_every == 0:
                    check_replicas(self.engine.module, self.groups, f"by step {self.step}")
                if self.step == first and training.save_every:
                    self.checkpoints.prepare()
                meter.add(tokens_per_step, time.monotonic() - started, loader.total_wait_s - waited)
                last = self.step == training.steps
                validating = training.eval_every and (last or self.step % training.eval_every == 0)
                validated: dict[str, Any] = {}
                if last or validating or self.step % training.log_every == 0:
                    metrics = self._metrics(result, meter)
                    validated = self._validate() if validating else {}
                    self._log(metrics | validated)
                    last = last or self.patience.over
                reason = stop.agreed()
                stopping = reason and not last
                due = training.save_every and self.step % training.save_every == 0
                if last or stopping or due or self.step in self.config.checkpoint.permanent:
                    wait = bool(last or stopping)
                    with self.control.doing("waiting_save" if self.checkpoints.waits(wait) else "save", self.step):
                        self._save(validated.get("val_loss"), wait=wait)
                if stopping:
                    by = REASONS.get(reason, "a signal")
                    self.control.event("stop", self.step, reason=by)
                    self.runtime.print(f"stopped by {by} after step {self.step}; run the same command to resume")
                    return STOPPED
            if self.patience.over:
                self.runtime.print(f"ended after step {self.step}: {self.patience.describe()}")
            on_main(lambda: self.control.finish(self.step))
        return 0

    def _train_step(self) -> StepResult | None:
        """One step, or None where it was the cause to go back to a checkpoint."""
        self.task.left_out = self.anomalies.left_out
        self.lr = self.engine.get_lr()[0]  # before the schedule moves on
        result = self.task.train_step(self.engine, self.step, self.anomalies.judge)
        if (found := self.anomalies.found) is not None:
            batch = self.task.last_batch()
            self.runtime.print(f"step {self.step + 1}: {found.describe()}")
            if self.records is not None:
                self.records.write(self.step + 1, found, batch)
            self.anomalies.check(self.step + 1)
            if found.action == "rewind":
                with self.control.doing("rewind", self.step):
                    rewound = self._rewind(batch["batch"])
                return None if rewound else result
        return result

    def _rewind(self, batch: int) -> bool:
        """Go back to the newest whole checkpoint, to train on from there without one batch; whether there was one."""
        self.checkpoints.finish()
        steps = on_main(lambda: step_directories(self.run_dir))
        newest, _ = newest_whole(steps, True, agreed_faults)
        if newest is None or is_weights_only(newest):  # the only save so far has failed
            return False
        self.task.metrics()  # those of steps that are repeated
        load_weights(newest, self.engine.module, self.groups.tp)
        self.anomalies.rewind(self._load(newest), batch)
        self.sinks.rewind(self.step)
        self.runtime.print(f"back at step {self.step}, from {newest}, without batch {batch} of the data")
        return True

    def _validate(self) -> dict[str, Any]:
        with self.control.doing("validate", self.step):
            found = self.task.validate(self.engine)
        if self.patience.limit:
            self.patience.see(on_main(lambda: found["val_loss"]))
        return found

    def _metrics(self, result: StepResult, meter: StepMeter) -> dict[str, Any]:
        values = {
            "step": self.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": self.lr,
            "skipped_steps": self.anomalies.skipped,
            "tokens": self.task.loader.tokens_seen,
            **meter.read(),
            "memory_gb": self.memory.peak_gb(),
            **self.memory.read(),
            "eta_s": meter.eta_s(self.step),
        } | self.task.metrics()
        return values | self._highest({key: values[key] for key in HIGHEST if key in values})

    def _highest(self, values: dict[str, float]) -> dict[str, float]:
        """Over the ranks (a collective): the run goes as fast as its slowest one, and ends with its fullest."""
        highest = torch.tensor(list(values.values()), dtype=torch.float64, device=self.runtime.device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return dict(zip(values, highest.tolist(), strict=True))

    def _save(self, val_loss: float | None, *, wait: bool) -> None:
        self.layout.step = self.step
        values = {} if val_loss is None else {"val_loss": val_loss}
        state = self.task.state_dict() | {ANOMALIES: self.anomalies.state_dict()}
        if self.patience.limit:
            state[PATIENCE] = self.patience.state_dict()
        self.checkpoints.save(self.layout, state, to_yaml(self.config), wait=wait, **values)
        self.anomalies.can_rewind = True

    def _log(self, metrics: dict[str, Any]) -> None:
        self.sinks.write({"time": time.time(), **metrics})
        self.runtime.print(console_line(metrics, self.config.training.steps))
