"""Training of a δ-mem adapter on a frozen backbone, on episodes or on plain documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dla.adapters.calls import MemoryCall
from megatron_dla.adapters.divergence import divergence
from megatron_dla.adapters.fingerprint import Fingerprint
from megatron_dla.adapters.memory import MemoryControl, MemoryInputs, half_life
from megatron_dla.checkpoint.weights import CheckpointLayout
from megatron_dla.config import (
    AdapterRunConfig,
    ModelSection,
    attention_head_dim,
    check_adapter_config,
    memory_layers,
    row_length,
)
from megatron_dla.data import TokenLoader
from megatron_dla.data.packing import Batch
from megatron_dla.errors import ConfigError, DataError
from megatron_dla.files import file_sha256
from megatron_dla.hf.backbones import BackboneInfo, build_backbone, read_backbone, read_weights
from megatron_dla.hf.directory import fingerprint
from megatron_dla.hf.load import load_tokenizer
from megatron_dla.kernels.dla.documents import document_starts
from megatron_dla.parallel.context import context_slice
from megatron_dla.shard_index import TOKENIZER_JSON, TOKENIZER_NAME, ShardIndex
from megatron_dla.tasks.adapter.episodes import Episode, EpisodeBatch, read_episodes
from megatron_dla.tasks.adapter.loader import EpisodeLoader, check_lengths, held_out_batches
from megatron_dla.training.device import Device
from megatron_dla.training.step import Judge, StepResult, token_losses, train_step
from megatron_dla.training.task import Runtime, Task
from megatron_dla.training.validation import validate


class AdapterTask(Task):
    """The memories of a frozen full-attention model, trained on the answers of episodes or on every token."""

    config: AdapterRunConfig
    loader: EpisodeLoader | TokenLoader

    def __init__(self, config: AdapterRunConfig) -> None:
        self.config = config

    @property
    def seq_len(self) -> int:
        return row_length(self.config)

    @cached_property
    def backbone(self) -> tuple[ModelSection, BackboneInfo]:
        """From its config.json. Raises CheckpointError where it is not a supported model."""
        return read_backbone(self.config.backbone.dir)

    @cached_property
    def base(self) -> Fingerprint:
        return fingerprint(self.config.backbone.dir)

    @cached_property
    def episodes(self) -> list[Episode]:
        return self._read("train", self.config.episodes.in_prompt)

    @cached_property
    def held_out(self) -> list[Episode]:
        """Those with an answer."""
        return [episode for episode in self._read("valid") if episode.answer.any()]

    @cached_property
    def held_out_in_prompt(self) -> list[Episode]:
        """The same with the text left in the prompt, and ordinary text."""
        return self._read("valid", 1.0)

    def _read(self, key: str, in_prompt: float = 0.0) -> list[Episode]:
        """The episodes of one file. Raises DataError naming file and line."""
        e = self.config.episodes
        path = getattr(e, key)
        if not Path(path).is_file():
            raise ConfigError(f"episodes.{key} = {path!r}: no such file")
        return read_episodes(
            path, load_tokenizer(self.config.backbone.dir), write_length=e.write_length, read_length=e.read_length,
            recent_messages=e.recent_messages, numbered=self.config.delta_mem.write == "message",
            in_prompt=in_prompt,
        )  # fmt: skip

    # ---- before the start

    def check_config(self, world_size: int, device: Device) -> None:
        if not self.config.backbone.dir:
            raise ConfigError("backbone.dir is not set: give the Hugging Face directory of the frozen model")
        section, info = self.backbone
        check_adapter_config(self.config, section, world_size)
        if self.seq_len > info.max_length:
            raise ConfigError(
                f"a row of {self.seq_len} tokens (episodes.row_length or write_length + read_length) is longer than "
                f"the backbone's {info.max_length}: shorten the segments"
            )

    def check_data(self, world_size: int) -> None:
        """The backbone's weights, the held-out episodes, and the documents or episodes to train on."""
        section, info = self.backbone
        read_weights(self.config.backbone.dir, section, info.vocab_size)
        if self.config.episodes.valid:
            if not self.held_out:
                raise ConfigError(f"episodes.valid = {self.config.episodes.valid!r}: has no episode with an answer")
            check_lengths(self.held_out, "valid", self.seq_len)
        if self.config.episodes.documents:
            self._check_documents()
        else:
            check_lengths(self.episodes, "train", self.seq_len)
            self._check_distillation()
        self._make_loader(0, world_size // self.config.parallel.model_parallel_size)

    def _check_distillation(self) -> None:
        weight = self.config.distillation.weight
        if not weight and any(not episode.answer.any() for episode in self.episodes):
            raise ConfigError(
                f"distillation.weight = {weight}: episodes.train holds ordinary text, which has no other loss: set it "
                "above 0, or leave the text out"
            )
        if weight and not any(episode.in_prompt for episode in self.episodes):
            raise ConfigError(
                f"distillation.weight = {weight}: no episode keeps its text: set episodes.in_prompt above 0, or add "
                '{"text": ...} lines to episodes.train'
            )

    def _check_documents(self) -> None:
        """The shards must hold this backbone's tokens."""
        index = ShardIndex.load(self.config.episodes.documents)
        paths = [Path(self.config.backbone.dir) / name for name in (TOKENIZER_NAME, TOKENIZER_JSON)]
        if index.tokenizer_sha256 not in [file_sha256(path) for path in paths if path.is_file()]:
            raise DataError(
                f"vocabulary mismatch: episodes.documents = {self.config.episodes.documents!r} was not tokenised with "
                f"the tokenizer of {self.config.backbone.dir!r}: build the shards with that one"
            )

    def describe(self, device: Device) -> dict[str, str]:
        memory, episodes = self.config.delta_mem, self.config.episodes
        section, info = self.backbone
        layers, trained = memory_layers(self.config.delta_mem, section), self.trained_parameters
        state = len(layers) * memory.num_states * memory.rank**2 * 4
        return {
            "backbone": f"{self.config.backbone.dir}: {info.architecture}, frozen",
            "adapter": f"{trained:,} parameters in {len(layers)} layers, {memory.num_states} state(s) of "
            f"{memory.rank} x {memory.rank} each, writes by {memory.write}; {state:,} bytes of state a sequence",
            "data": episodes.documents
            or f"{episodes.train}: write {episodes.write_length}, read {episodes.read_length} tokens an episode",
        }

    @property
    def trained_parameters(self) -> int:
        memory, (section, _) = self.config.delta_mem, self.backbone
        heads = section.attention_heads * attention_head_dim(section)
        return len(memory_layers(memory, section)) * memory.count_parameters(section.hidden_size, heads)

    def layout(self) -> CheckpointLayout:
        section, _ = self.backbone
        base = {"name": self.base.name, "sha256": self.base.sha256}
        return CheckpointLayout(
            model=section, vocab_size=section.vocab_multiple, tokenizer_sha256="",
            tensor_parallel=self.config.parallel.tensor_model_parallel_size, seq_len=self.seq_len, step=0, tags={},
            adapter={"delta_mem": self.config.delta_mem.to_dict(), "base": base},
        )  # fmt: skip

    # ---- on every rank of the run

    def build(self, runtime: Runtime) -> nn.Module:
        from megatron_dla.adapters.delta_mem import freeze_backbone, initialise_memories

        config = self.config
        self.runtime, self.gates = runtime, GateMeter()
        self.kept = torch.zeros(2, dtype=torch.float64, device=runtime.device)  # divergence, tokens
        self.loader = self._make_loader(runtime.groups.dp.rank(), runtime.groups.dp.size())
        model, _ = build_backbone(
            config.backbone.dir, config.parallel, seq_len=self.seq_len, device=runtime.device.type,
            dtype=runtime.dtype, recompute=config.training.recompute,
            keep_states=config.training.keep_states, delta_mem=config.delta_mem,
        )  # fmt: skip
        initialise_memories(model, config.run.seed)
        freeze_backbone(model)
        return model.train()

    def _make_loader(self, dp_rank: int, dp_size: int) -> EpisodeLoader | TokenLoader:
        training, episodes = self.config.training, self.config.episodes
        sizes: dict[str, Any] = {
            "global_batch_size": training.global_batch_size, "micro_batch_size": training.micro_batch_size,
            "seed": self.config.run.seed, "dp_rank": dp_rank, "dp_size": dp_size,
        }  # fmt: skip
        if episodes.documents:
            return TokenLoader(
                episodes.documents, "train", seq_len=self.seq_len, num_streams=episodes.num_streams, **sizes
            )
        return EpisodeLoader(self.episodes, row_length=self.seq_len, **sizes)

    def _call(self, batch: Batch | EpisodeBatch) -> MemoryCall:
        """What goes to the memories with one forward pass."""
        device = self.runtime.device
        if isinstance(batch, EpisodeBatch):
            flags = {k: None if x is None else x.to(device) for k, x in vars(batch.inputs).items()}
            return MemoryCall(MemoryInputs(**flags))
        B, T = batch.tokens.shape
        starts = document_starts(batch.cu_seqlens, B, T, device)
        return MemoryCall(MemoryInputs(reset=starts))

    def _pack(self, batch: Batch | EpisodeBatch) -> Any:
        from megatron_dla.adapters.delta_mem import with_memory

        return with_memory(self._call(batch), self.seq_len, batch.cu_seqlens)

    def train_step(self, engine: Any, step: int, judge: Judge | None) -> StepResult:
        gate_loss, calls = self.config.gate_loss, []
        batches, runtime = self.next_batches(), self.runtime
        weight = self.config.distillation.weight * self._kept_scale(batches)

        def pack(batch: Batch | EpisodeBatch) -> Any:
            packed = self._pack(batch)
            call = packed.memory
            call.gate_weight, call.gate_target, call.measure = gate_loss.weight, gate_loss.target, True
            calls.append(call)
            return packed

        def objective(packed: Any, loss: Tensor) -> Tensor:
            call = packed.memory
            return call.penalise(loss if call.divergence is None else loss + weight * call.divergence)

        result = train_step(
            engine, batches, runtime.groups, runtime.device, pack, forward=self._forward, objective=objective,
            judge=judge,
        )  # fmt: skip
        for call in calls:
            self.gates.add(call)
            if call.divergence is not None:
                self.kept[0] += call.divergence.detach()
        return result

    def _kept_scale(self, batches: Sequence[Any]) -> float:
        """What makes the sum over this rank's tokens that shall stay as they are a mean over the global batch."""
        if not self.config.distillation.weight:
            return 0.0
        groups = self.runtime.groups
        count = torch.stack([batch.keep.sum() for batch in batches]).sum().double().to(self.runtime.device)
        dist.all_reduce(count, group=groups.dp)
        self.kept[1] += count / groups.dp_cp.size()  # `metrics` adds it up over these ranks
        return len(batches) * groups.dp_cp.size() / max(count.item(), 1.0)

    def _forward(
        self, engine: Any, batch: EpisodeBatch, packed: Any, groups: Any, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`token_losses`; where some tokens shall stay as they are, their divergence goes into the call."""
        if not self.config.distillation.weight or not bool(batch.keep.any()):
            return token_losses(engine, batch, packed, groups, device)
        rows = (batch.tokens, batch.labels, batch.loss_mask, batch.keep)
        tokens, labels, mask, keep = (context_slice(x, groups.cp).to(device) for x in rows)
        with torch.no_grad():
            plain = self._pack(batch)
            plain.memory.control = MemoryControl(scale=0.0, freeze=True)
            base = engine(tokens, None, None, packed_seq_params=plain).transpose(0, 1)
        # [T, b, V / TP], as the head makes it, which is slow with a gradient of other strides; softmax where it counts
        logits = engine(tokens, None, None, packed_seq_params=packed).transpose(0, 1)
        kept, asked = keep.t() > 0, mask.t() > 0
        packed.memory.divergence = divergence(logits[kept], base[kept], groups.tp).sum()
        found = engine.module.compute_language_model_loss(labels.t()[asked][None], logits[asked][:, None])
        losses = found.new_zeros(mask.shape)
        losses.t()[asked] = found[0]
        return losses, labels, mask

    def metrics(self) -> dict[str, Any]:
        """Of the steps since the last call; `divergence`: from the frozen model, nats a token."""
        found = self.gates.take(self.runtime.groups.dp)
        if self.config.distillation.weight:
            dist.all_reduce(self.kept, group=self.runtime.groups.dp_cp)
            total, count = self.kept.tolist()
            self.kept.zero_()
            found["divergence"] = total / max(count, 1.0)
        return found

    def validate(self, engine: Any) -> dict[str, Any]:
        """`val_loss`: mean over the held-out answers, with the text removed. With distillation that is `val_answers`,
        and `val_loss` has the weighted divergence of the same episodes with the text left, and of ordinary text, added.
        """
        runtime, weight = self.runtime, self.config.distillation.weight
        batches = self._held_out_batches(self.held_out)
        found = validate(engine, {self.config.episodes.valid: batches}, runtime.groups, runtime.device, self._pack)
        if not weight:
            return found
        found["val_answers"], found["val_divergence"] = found["val_loss"], self._held_out_divergence(engine)
        found["val_loss"] += weight * found["val_divergence"]
        return found

    def _held_out_batches(self, episodes: Sequence[Episode]) -> list[EpisodeBatch]:
        return held_out_batches(
            episodes, row_length=self.seq_len, micro_batch_size=self.config.training.micro_batch_size,
            dp_rank=self.runtime.groups.dp.rank(), dp_size=self.runtime.groups.dp.size(),
        )  # fmt: skip

    @torch.no_grad()
    def _held_out_divergence(self, engine: Any) -> float:
        """From the frozen model, nats a token, on held-out episodes whose text stays in the prompt."""
        groups, device = self.runtime.groups, self.runtime.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        engine.eval()
        for batch in self._held_out_batches(self.held_out_in_prompt):
            packed = self._pack(batch)
            self._forward(engine, batch, packed, groups, device)
            if packed.memory.divergence is not None:
                sums += torch.stack([packed.memory.divergence.double(), batch.keep.sum().double().to(device)])
        engine.train()
        dist.all_reduce(sums, group=groups.dp_cp)
        total, count = sums.tolist()
        return total * groups.cp.size() / max(count, 1.0)  # each of these ranks counted whole rows


@dataclass
class GateMeter:
    """Mean write gate and size of the output correction, by layer, over the calls since the last reading."""

    calls: int = 0
    sums: Tensor | None = None

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
