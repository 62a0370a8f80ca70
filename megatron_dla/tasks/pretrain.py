"""Pretraining of a whole model on tokenised shards."""

from __future__ import annotations

import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_dla.checkpoint.weights import CheckpointLayout
from megatron_dla.config import RunConfig, check_config, check_precision, layer_letters
from megatron_dla.data import ShardReader, TokenLoader, validation_batches
from megatron_dla.data.loader import ONLY
from megatron_dla.data.mixture import Limit, check_tokenizers, described, least_tokens, planned_tokens
from megatron_dla.data.packing import Batch
from megatron_dla.data.remote import RemoteDirectory, open_directory
from megatron_dla.data_prep.tokenizer import Tokenizer, tokenizer_problem
from megatron_dla.errors import ConfigError, DataError, UserError
from megatron_dla.kernels.dla import beyond_kernels, kernels_missing
from megatron_dla.mixers.calibration import begin_step, end_step
from megatron_dla.mixers.statistics import SlotStatistics, degenerate, report
from megatron_dla.model.counts import count_parameters, flops_per_token, recurrent_states
from megatron_dla.model.gpt import build_model, packed_sequence, padded_vocab, slot_mixers
from megatron_dla.shard_index import TOKENIZER_CONFIG, TOKENIZER_JSON, TOKENIZER_NAME, ShardIndex
from megatron_dla.training.device import Device
from megatron_dla.training.plan import make_plan, render
from megatron_dla.training.schedule import gate_temperature
from megatron_dla.training.step import Judge, StepResult, train_step
from megatron_dla.training.task import Runtime, Task
from megatron_dla.training.validation import validate

ASSUMED_VOCABULARY = 32_000  # the paper's, for plans made where there is no data


class PretrainTask(Task):
    """Next-token prediction with DLA and softmax layers.

    Attributes:
        mixers: the DLA mixers in layer order, once built.
    """

    config: RunConfig
    loader: TokenLoader
    _warned = False  # of a threshold that decides nothing

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @property
    def seq_len(self) -> int:
        return self.config.data.seq_len

    @cached_property
    def dirs(self) -> dict[str, Path | RemoteDirectory]:
        """The data directory of each source. Raises DataError where it is at a URL that cannot be read."""
        data = self.config.data
        named = {name: source.dir for name, source in data.sources.items()} or {ONLY: data.dir}
        return {name: open_directory(path, data.cache_dir, data.cache_gb) for name, path in named.items()}

    @cached_property
    def indexes(self) -> dict[str, ShardIndex]:
        """Raises DataError where a directory has none."""
        return {name: ShardIndex.load(path) for name, path in self.dirs.items()}

    @property
    def index(self) -> ShardIndex:
        """The first one, which has the tokenizer of all."""
        return next(iter(self.indexes.values()))

    @property
    def stages(self) -> list[tuple[int, dict[str, float]]]:
        """Tokens seen, and the weights of the sources from there on."""
        data = self.config.data
        first = {name: source.weight for name, source in data.sources.items()} or {ONLY: 1.0}
        return [(0, first), *((stage.from_tokens, stage.weights) for stage in data.stages)]

    @property
    def limits(self) -> dict[str, Limit]:
        """Of the sources that have any."""
        limits = {name: Limit(one.max_epochs, one.max_tokens) for name, one in self.config.data.sources.items()}
        return {name: limit for name, limit in limits.items() if any(limit)}

    # ---- before the start

    def check_config(self, world_size: int, device: Device) -> None:
        check_config(self.config, world_size)
        check_precision(self.config.training.zero_stage, device.bf16)

    def check_data(self, world_size: int) -> None:
        """The shards are there with their sizes, made with this tokenizer, and enough for the streams."""
        for name, index in self.indexes.items():
            self._check_shards(self.dirs[name], index)
        check_tokenizers(self.indexes)
        self._check_length()
        if self.config.training.eval_every and not any("val" in index.splits for index in self.indexes.values()):
            self.index.split("val")

    def _check_length(self) -> None:
        """Where all sources end, no stream may run out of data before the last step."""
        limits, streams = self.limits, self.config.data.num_streams
        if limits.keys() != self.indexes.keys():
            return
        readers = {name: ShardReader(index, "train", root=self.dirs[name]) for name, index in self.indexes.items()}
        held = least_tokens(readers, limits, streams, self.config.run.seed) * streams
        if held < self._tokens:
            raise DataError(
                f"the run has {self._tokens:,} tokens, and with the limits of data.sources there are only "
                f"{held:,.0f} ({streams} times what the stream with the least has): raise max_epochs or max_tokens, "
                "add a source, or train for fewer steps"
            )

    def _check_shards(self, directory: Path | RemoteDirectory, index: ShardIndex) -> None:
        tokenizer, data = Tokenizer(directory), self.config.data
        if problem := tokenizer_problem(tokenizer, index):
            raise DataError(f"vocabulary mismatch: {tokenizer.path}: {problem}: build the shards again")
        if isinstance(directory, Path):
            self._check_sizes(directory, index)
        shards = len(index.split("train"))
        if data.num_streams > shards:
            raise ConfigError(
                f"data.num_streams = {data.num_streams} is more than the {shards} train shards of {directory}: use at "
                f"most {shards}, or build more shards (dla data shards --min-train-shards {data.num_streams})"
            )

    def _check_sizes(self, directory: Path, index: ShardIndex) -> None:
        """Of the files on a disk; what is at a URL is checked when it is fetched."""
        for shard in index.shards:
            if shard.split != "train" and not (shard.split == "val" and self.config.training.eval_every):
                continue
            path = directory / shard.path
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
                raise DataError(
                    f"shard {str(path)!r} {state}: copy it again, or rebuild with dla data shards --overwrite"
                )

    @property
    def _tokens(self) -> int:
        """Of the whole run."""
        training = self.config.training
        return training.steps * training.global_batch_size * self.seq_len

    def describe(self, device: Device) -> dict[str, str]:
        """Without data on this machine, for a vocabulary that is assumed."""
        lines = {
            "model": f"{self.trained_parameters:,} parameters, "
            f"{self.flops_per_token:.3g} FLOP a token (forward and backward)"
        }
        try:
            planned = planned_tokens(self.stages, self._tokens)
            held = {name: index.totals("train").tokens for name, index in self.indexes.items()}
            lines["data"] = "; ".join(
                f"{self.dirs[name]}: {n:,} tokens, {planned.get(name, 0) / n:.2f} epochs" for name, n in held.items()
            )
        except UserError:
            lines["data"] = f"none here, {self._planned_vocab():,} vocabulary rows assumed"
        if reason := self._kernels_not_used(device):
            lines["warning"] = f"recurrent layers will run on the slower torch path, not the Triton kernels: {reason}"
        return lines

    @property
    def trained_parameters(self) -> int:
        return count_parameters(self.config.model, self._planned_vocab())

    def plan(self, world_size: int, device: Device) -> str:
        return render(make_plan(self.config, world_size, self._planned_vocab(), device.bf16))

    def _planned_vocab(self) -> int:
        try:
            size = self.index.vocab_size
        except UserError:
            size = ASSUMED_VOCABULARY
        return padded_vocab(size, self.config.model.vocab_multiple)

    def _kernels_not_used(self, device: Device) -> str:
        """Why a run on GPUs would not use the Triton kernels, which `backend="auto"` does silently ('': it does)."""
        model = self.config.model
        states = max(recurrent_states(model, letter) for letter in layer_letters(model))
        if device.type != "cuda" or not states:
            return ""
        if reason := beyond_kernels(model.key_dim, model.value_dim, states):
            return f"they do not take model.{reason}"
        return "" if device.planned else kernels_missing()

    def files(self) -> list[Path]:
        directory = Path(next(iter(self.dirs.values())))
        paths = [directory / name for name in (TOKENIZER_NAME, TOKENIZER_JSON, TOKENIZER_CONFIG)]
        return [path for path in paths if path.is_file()]

    def layout(self) -> CheckpointLayout:
        config = self.config
        return CheckpointLayout(
            model=config.model, vocab_size=padded_vocab(self.index.vocab_size, config.model.vocab_multiple),
            tokenizer_sha256=self.index.tokenizer_sha256, tensor_parallel=config.parallel.tensor_model_parallel_size,
            seq_len=self.seq_len, step=0, tags={},
        )  # fmt: skip

    # ---- on every rank of the run

    def build(self, runtime: Runtime) -> nn.Module:
        config, dp = self.config, runtime.groups.dp
        self.runtime = runtime
        self.token_bytes = torch.from_numpy(Tokenizer(next(iter(self.dirs.values()))).token_bytes()).to(runtime.device)
        model = build_model(
            config.model, config.parallel, vocab_size=self.index.vocab_size, seq_len=self.seq_len,
            seed=config.run.seed, dtype=runtime.dtype, device=runtime.device.type,
            recompute=config.training.recompute, keep_states=config.training.keep_states,
        )  # fmt: skip
        self.mixers = slot_mixers(model)
        self.loader = TokenLoader(
            self.dirs if config.data.sources else self.dirs[ONLY], "train",
            seq_len=self.seq_len, num_streams=config.data.num_streams,
            global_batch_size=config.training.global_batch_size, micro_batch_size=config.training.micro_batch_size,
            dp_rank=dp.rank(), dp_size=dp.size(), seed=config.run.seed, verify=config.data.verify,
            packing=config.data.packing, stages=self.stages, limits=self.limits,
            prefetch_rows=config.data.prefetch_rows,
        )  # fmt: skip
        return model

    def _pack(self, batch: Batch) -> Any:
        return packed_sequence(batch.cu_seqlens if self.config.data.reset_at_documents else None, self.seq_len)

    def train_step(self, engine: Any, step: int, judge: Judge | None) -> StepResult:
        batches = self.next_batches()
        self.data_crc32 = zlib.crc32(b"".join(b.tokens.numpy().tobytes() for b in batches))
        self.gate_temperature = gate_temperature(step, self.config.tau, self.config.training.steps)
        for mixer in self.mixers:
            mixer.gate_temperature = self.gate_temperature
        model, tau = self.config.model, self.config.tau
        if (step + 1) % self.config.training.log_every == 0:
            for mixer in self.mixers:
                mixer.statistics = SlotStatistics(mixer.heads, model.capacity, self.runtime.device)
        calibrating = self.mixers and model.tau_mode == "calibrated" and step < tau.calibration_steps
        if calibrating:
            begin_step(self.mixers)
        result = train_step(engine, batches, self.runtime.groups, self.runtime.device, self._pack, judge=judge)
        if calibrating:
            end_step(self.mixers, step, model.boundary_rate, self.runtime.groups.dp_cp)
        return result

    @property
    def flops_per_token(self) -> float:
        return flops_per_token(self.config.model, self._planned_vocab(), self.seq_len)

    def metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = {
            "boundary_rate": None,
            "epoch": self.loader.epoch,
            "data_wait_s": self.loader.last_wait_s,
            "data_crc32": self.data_crc32,  # of this rank's rows of the step: two runs read the same data
            **self._data_report(),
            **self._fetch_report(),
        }
        if self.config.tau.gate == "annealed":
            metrics["gate_temperature"] = self.gate_temperature
        if self.mixers:
            rates = self._boundary_rates()
            metrics |= {
                "boundary_rate": rates.mean().item(),
                "boundary_rate_by_head": [[round(r, 4) for r in layer] for layer in rates.tolist()],
                **self._slot_report(),
            }
        return metrics

    def _slot_report(self) -> dict[str, Any]:
        """Of the last step, where its slots were counted (a collective)."""
        layers = [mixer.statistics for mixer in self.mixers]
        for mixer in self.mixers:
            mixer.statistics = None
        groups = self.runtime.groups
        if layers[0] is None:
            return {}
        metrics, rate = report(layers, groups.dp_cp, groups.tp)
        self._warn(rate)
        return metrics

    def _warn(self, rate: float) -> None:
        """Once, after the warm-up: the threshold decides nothing."""
        model, config = self.config.model, self.config
        asked = model.boundary != "information" or model.tau <= 0 or model.tau > 2
        calibration = config.tau.calibration_steps if model.tau_mode == "calibrated" else 0
        if self._warned or asked or self.loader.steps <= max(config.optimizer.warmup_steps, calibration):
            return
        if words := degenerate(rate):
            self._warned = True
            self.runtime.print(f"warning: boundary rate {rate:.2g} within documents: {words}")

    def _data_report(self) -> dict[str, Any]:
        """Over all ranks (a collective)."""
        counts = torch.tensor(self.loader.counts(), device=self.runtime.device)
        dist.all_reduce(counts, group=self.runtime.groups.dp)
        return self.loader.report(counts.tolist())

    def _fetch_report(self) -> dict[str, int]:
        """Of this rank, where shards are at URLs."""
        remote = [directory for directory in self.dirs.values() if isinstance(directory, RemoteDirectory)]
        counts = {"shards_fetched": "fetched", "fetch_retries": "retries"}
        return {key: sum(getattr(one, name) for one in remote) for key, name in counts.items()} if remote else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        before, now = state.get("mixtures", []), self.loader.mixtures
        if self.config.data.sources and len(now) > len(before):
            step = state["steps"] + 1
            self.runtime.print(f"note: data.sources has changed; from step {step} on: {described(now[-1])}")

    def _boundary_rates(self) -> torch.Tensor:
        """[layers, H] over all tokens since the last call (a collective)."""
        groups = self.runtime.groups
        local = torch.stack([mixer.take_boundary_rate() for mixer in self.mixers]).contiguous()
        dist.all_reduce(local, group=groups.dp_cp)
        parts = [torch.empty_like(local) for _ in range(groups.tp.size())]
        dist.all_gather(parts, local, group=groups.tp)
        return torch.cat(parts, 1) / groups.dp.size()

    def validate(self, engine: Any) -> dict[str, Any]:
        """Of all sources that have held-out data, together and one by one."""
        config, groups = self.config, self.runtime.groups
        batches = {
            name: validation_batches(
                self.dirs[name], self.seq_len, config.training.micro_batch_size, groups.dp.rank(), groups.dp.size(),
                config.training.eval_rows or None, verify=config.data.verify,
            )
            for name, index in self.indexes.items()
            if "val" in index.splits
        }  # fmt: skip
        values = validate(
            engine, batches, groups, self.runtime.device, self._pack, self.token_bytes,
            positions=lambda batch: batch.positions(config.data.reset_at_documents),
        )  # fmt: skip
        for mixer in self.mixers:
            mixer.take_boundary_rate()  # held-out tokens are not part of the training rate
        return values
