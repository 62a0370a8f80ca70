"""The trainer: read it from top to bottom."""

from __future__ import annotations

import math
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dla.checkpoint.manager import Checkpointer, complete_checkpoints, is_weights_only, load_weights
from megatron_dla.checkpoint.optimizer import local_shapes
from megatron_dla.checkpoint.weights import CheckpointLayout, parameter_tags
from megatron_dla.config import RunConfig
from megatron_dla.data import TokenLoader
from megatron_dla.data_prep.index import ShardIndex
from megatron_dla.data_prep.tokenizer import Tokenizer
from megatron_dla.errors import STOPPED
from megatron_dla.metrics.meters import StepMeter, memory_gb
from megatron_dla.metrics.sinks import JsonlSink, console_line
from megatron_dla.model.gpt import build_model, dla_mixers, padded_vocab
from megatron_dla.parallel.groups import initialize_distributed, initialize_model_parallel, on_main, process_groups
from megatron_dla.parallel.replicas import check_replicas
from megatron_dla.training.control import REASONS, RunControl
from megatron_dla.training.engine import apply_optimizer_section, build_engine, parameter_groups
from megatron_dla.training.schedule import gate_temperature
from megatron_dla.training.signals import StopRequest
from megatron_dla.training.step import dropped_update, train_step
from megatron_dla.training.validation import validate


def batch_note(data_state: dict[str, Any], rows: int) -> str:
    """What a resumed run says where its steps have more or fewer rows than the checkpoint's ('' where they do not).

    Args:
        data_state: of the checkpoint; one written before the number was kept has none. rows: of this run's steps.
    """
    before = data_state.get("global_batch_size", rows)
    if before == rows:
        return ""
    return (
        f"note: training.global_batch_size was {before} and is {rows} from step {data_state['steps'] + 1} on: steps "
        "have other rows, and training.steps and the learning rate's schedule still count steps"
    )


class Trainer:
    """One run: `Trainer(config, run_dir, device, bf16).run()` returns the exit code (0 done, 75 asked to stop).

    Args:
        config: checked by `check_config`. run_dir: exists on every rank; this run becomes its only writer until
            `run` returns. device: `cpu` or `cuda`. control: the run directory's control files, made if not given.

    Raises:
        FenceError: another run writes in run_dir.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, device: str, bf16: bool, control: RunControl | None = None
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
        index = ShardIndex.load(config.data.dir)
        tokenizer = Tokenizer(config.data.dir)
        vocab_size = padded_vocab(index.vocab_size, config.model.vocab_multiple)
        self.token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(self.device)
        model = build_model(
            config.model, config.parallel, vocab_size=index.vocab_size, seq_len=config.data.seq_len,
            seed=config.run.seed, dtype=torch.bfloat16 if bf16 else torch.float32, device=device,
            recompute=config.training.recompute,
        )  # fmt: skip
        self.mixers = dla_mixers(model)
        tags, shapes = parameter_tags(model), local_shapes(model)
        found = complete_checkpoints(run_dir) if config.training.resume else []
        newest = found[-1][1] if found else None
        if newest is not None:
            load_weights(newest, model, self.groups.tp)  # before ZeRO takes its copies
        optimizer_groups = parameter_groups(model, config)
        self.engine = build_engine(model, optimizer_groups, config, self.groups, bf16)
        self.loader = TokenLoader(
            config.data.dir, "train", seq_len=config.data.seq_len, num_streams=config.data.num_streams,
            global_batch_size=config.training.global_batch_size, micro_batch_size=config.training.micro_batch_size,
            dp_rank=self.groups.dp.rank(), dp_size=self.groups.dp.size(), seed=config.run.seed,
            verify=config.data.verify,
        )  # fmt: skip
        self.layout = CheckpointLayout(
            model=config.model, vocab_size=vocab_size, tokenizer_sha256=index.tokenizer_sha256,
            tensor_parallel=self.groups.tp.size(), seq_len=config.data.seq_len, step=0, tags=tags, shapes=shapes,
        )  # fmt: skip
        self.checkpoints = Checkpointer(
            run_dir, self.engine, self.groups, config.training.keep_checkpoints, self.control
        )
        self.step = 0
        if newest is not None and not is_weights_only(newest):
            self.step, data_state = self.checkpoints.load(newest, self.layout)
            self.loader.load_state_dict(data_state)
            if text := batch_note(data_state, config.training.global_batch_size):
                self._say(text)
            apply_optimizer_section(self.engine, optimizer_groups, config)
        self.check_replicas = config.debug.check_replicas
        if self.check_replicas:
            check_replicas(self.engine.module, self.groups, "before the first step")
        self.sink = JsonlSink(run_dir / "metrics.jsonl", self.step if newest else None) if self.is_main else None
        if newest is not None:
            self._say(f"going on from {newest} at step {self.step}")

    def run(self) -> int:
        training = self.config.training
        meter = StepMeter(self.step, training.steps)
        with self.control, StopRequest(self.device, self.control.asked_to_stop) as stop:
            if self.step == 0 and training.eval_every:
                self._log({"step": 0, "tokens": 0, **self._validate()})
            while self.step < training.steps:
                started = time.monotonic()
                loss = self._train_step()
                self.step += 1
                self.control.beat(self.step)
                if self.check_replicas and self.step % self.check_replicas == 0:
                    check_replicas(self.engine.module, self.groups, f"by step {self.step}")
                meter.add(self.tokens_per_step, time.monotonic() - started)
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

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.global_batch_size * self.config.data.seq_len

    def _train_step(self) -> float:
        """One optimizer step over the global batch; returns its mean loss (nats a token)."""
        batches = self.loader.next_step()
        self.data_crc32 = zlib.crc32(b"".join(b.tokens.numpy().tobytes() for b in batches))
        self.lr = self.engine.get_lr()[0]  # before the schedule moves on
        self.gate_temperature = gate_temperature(self.step, self.config.training)
        for mixer in self.mixers:
            mixer.gate_temperature = self.gate_temperature
        data = self.config.data
        mean = train_step(self.engine, batches, self.groups, self.device, data.seq_len, data.reset_at_documents)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss is {mean} at step {self.step + 1}: lower optimizer.lr or check the data"
            )
        if dropped_update(self.engine):
            self._say(f"step {self.step + 1}: the gradient is not finite, its update is dropped")
        return mean

    def _metrics(self, loss: float, meter: StepMeter) -> dict[str, Any]:
        norm = self.engine.get_global_grad_norm()
        metrics: dict[str, Any] = {
            "step": self.step,
            "loss": loss,
            "grad_norm": None if norm is None else float(norm),
            "lr": self.lr,
            "tokens": self.loader.tokens_seen,
            "tokens_per_s": meter.tokens_per_s(),
            "boundary_rate": None,
            "memory_gb": memory_gb(self.device),
            "eta_s": meter.eta_s(self.step),
            "epoch": self.loader.epoch,
            "data_wait_s": self.loader.last_wait_s,
            "data_crc32": self.data_crc32,  # of this rank's rows of the step: two runs read the same data
        }
        if self.config.training.tau_gate == "annealed":
            metrics["gate_temperature"] = self.gate_temperature
        if self.mixers:
            rates = self._boundary_rates()
            metrics |= {
                "boundary_rate": rates.mean().item(),
                "boundary_rate_by_head": [[round(r, 4) for r in layer] for layer in rates.tolist()],
            }
        return metrics

    def _boundary_rates(self) -> torch.Tensor:
        """[layers, H] over all tokens since the last call (a collective)."""
        local = torch.stack([mixer.take_boundary_rate() for mixer in self.mixers]).contiguous()
        dist.all_reduce(local, group=self.groups.dp_cp)
        parts = [torch.empty_like(local) for _ in range(self.groups.tp.size())]
        dist.all_gather(parts, local, group=self.groups.tp)
        return torch.cat(parts, 1) / self.groups.dp.size()

    def _validate(self) -> dict[str, float]:
        values = validate(self.engine, self.config, self.token_bytes, self.groups)
        for mixer in self.mixers:
            mixer.take_boundary_rate()  # held-out tokens are not part of the training rate
        return values

    def _save(self) -> None:
        states: list[Any] = [None] * self.groups.dp.size()
        dist.all_gather_object(states, self.loader.state_dict(), group=self.groups.dp)
        self.layout.step = self.step
        rows = {"global_batch_size": self.config.training.global_batch_size}
        path = self.checkpoints.save(self.layout, TokenLoader.merge_states(states) | rows)
        self._say(f"saved {path}")

    def _log(self, metrics: dict[str, Any]) -> None:
        if self.sink is not None:
            self.sink.write(metrics)
            self._say(console_line(metrics, self.config.training.steps))

    def _say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)
