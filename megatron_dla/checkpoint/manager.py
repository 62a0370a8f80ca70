"""Save, find, load and prune the checkpoints of a run.

A checkpoint is written as step_N.ATTEMPT.partial and renamed to step_N when it is complete: weights and optimizer state
fsynced, the marker file last.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dla.checkpoint.find import COMPLETE, LAYOUT, checkpoint_dir, complete_checkpoints
from megatron_dla.checkpoint.optimizer import load_optimizer, save_optimizer
from megatron_dla.checkpoint.weights import (
    CheckpointLayout,
    load_merged,
    parameter_tags,
    save_weights,
    split_merged,
)
from megatron_dla.config import layer_letters
from megatron_dla.errors import CheckpointError, FenceError
from megatron_dla.files import write_text
from megatron_dla.parallel.groups import on_main

DATA_STATE = "data_state.json"


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _marker(path: Path) -> dict[str, Any]:
    try:
        marker = json.loads((path / COMPLETE).read_text())
        return {"step": int(marker["step"])} | marker
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(path / COMPLETE)!r} is damaged ({error!r}): use another checkpoint") from error


def is_weights_only(path: Path) -> bool:
    """Whether a checkpoint has no optimizer state (`dla convert from-hf`): a run starts from its weights at step 0."""
    return "zero_stage" not in _marker(path)


@torch.no_grad()
def load_weights(path: Path, model: nn.Module, tp: dist.ProcessGroup) -> None:
    """Copy a checkpoint's weights into a model at any tensor-parallel size."""
    merged, _ = load_merged(path)
    local = split_merged(merged, parameter_tags(model), tp.rank(), tp.size())
    for name, value in local.items():
        model.get_parameter(name).copy_(value)


class Checkpointer:
    """Checkpoints of one run at one layout.

    Args:
        run_dir: the run's directory. engine: the DeepSpeed engine. groups: ProcessGroupCollection. keep: newest
            checkpoints to keep, 0 = all. control: `RunControl`, to check that this run still owns the directory.
    """

    def __init__(self, run_dir: Path, engine: Any, groups: Any, keep: int, control: Any) -> None:
        self.run_dir, self.engine, self.groups, self.keep, self.control = run_dir, engine, groups, keep, control
        self.rank = dist.get_rank()

    def save(self, layout: CheckpointLayout, data_state: dict[str, Any]) -> Path:
        """Write a checkpoint (a collective); returns its directory.

        `data_state` is the loader's state of the whole batch, already merged over the data-parallel ranks.

        Raises:
            FenceError: another run has taken over the directory; nothing is published or deleted.
            FloatingPointError: a weight is not finite; nothing is written.
        """
        on_main(self.control.check)  # before the work; again before the result is published
        weights = self._weights()
        self._check_finite(weights, layout.step)
        root = checkpoint_dir(self.run_dir)
        partial = root / f"step_{layout.step}.{self.control.attempt}.partial"
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        tensor_rank, data_rank = self.groups.tp.rank(), self.groups.dp_cp.rank()
        updates = save_optimizer(self.engine, partial, tensor_rank, data_rank)
        if data_rank == 0:
            save_weights(weights, partial, tensor_rank)
        torch.save(_random_state(), partial / f"random_{self.rank:05d}.pt")
        dist.barrier()
        return on_main(lambda: self._publish(partial, layout, data_state, updates))

    def _publish(self, partial: Path, layout: CheckpointLayout, data_state: dict[str, Any], updates: int) -> Path:
        """On rank 0: mark the checkpoint complete, give it its name, delete older ones."""
        final = checkpoint_dir(self.run_dir) / f"step_{layout.step}"
        layout.save(partial / LAYOUT)
        (partial / DATA_STATE).write_text(json.dumps(data_state))
        marker = {
            "step": layout.step,
            "tensor_parallel": self.groups.tp.size(),
            "data_parallel": self.groups.dp.size(),
            "context_parallel": self.groups.cp.size(),
            "zero_stage": self.engine.zero_optimization_stage(),
            "optimizer_updates": updates,
        }
        try:
            with self.control.publishing():
                write_text(partial / COMPLETE, json.dumps(marker))
                if final.exists():
                    shutil.rmtree(final)
                os.rename(partial, final)
                self._prune()
        except FenceError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return final

    def _check_finite(self, weights: dict[str, Tensor], step: int) -> None:
        """Collective: ZeRO-0 applies a gradient that is not finite, the other stages drop it."""
        name = next((name for name, x in weights.items() if not x.isfinite().all()), "")
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, name)
        if name := max(found):
            raise FloatingPointError(
                f"{name} is not finite after step {step}, which is not saved: lower optimizer.lr or check the data"
            )

    def _weights(self) -> dict[str, Tensor]:
        """This tensor-parallel rank's parameters (a collective under ZeRO-3, which gathers one at a time)."""
        parameters: dict[str, Tensor] = {n: p for n, p in self.engine.module.named_parameters() if p.requires_grad}
        if self.engine.zero_optimization_stage() < 3:
            return parameters
        from deepspeed.runtime.zero import GatheredParameters

        whole = {}
        for name, parameter in parameters.items():
            with GatheredParameters([parameter]):
                if self.groups.dp_cp.rank() == 0:
                    whole[name] = parameter.detach().cpu().clone()
        return whole

    def _prune(self) -> None:
        if self.keep:
            for _, path in complete_checkpoints(self.run_dir)[: -self.keep]:
                (path / COMPLETE).unlink()  # first: a half-deleted checkpoint must not be resumed
                shutil.rmtree(path)

    def load(self, path: Path, layout: CheckpointLayout) -> tuple[int, dict[str, Any]]:
        """Restore optimizer, schedule and random state; returns the step and the loader's state.

        The weights must be in the model already (`load_weights`, before ZeRO takes its copies). The layout may be
        another one than the checkpoint's; random states (dropout is off) come back where the ranks are the same.

        Args:
            layout: what this run would save; model, vocabulary and tokenizer must be the same.

        Raises:
            CheckpointError: another model or tokenizer; damaged files.
        """
        check_same_model(path, layout)
        marker = _marker(path)
        step, random_file = marker["step"], path / f"random_{self.rank:05d}.pt"
        try:
            load_optimizer(self.engine, path, marker["optimizer_updates"], self.groups.tp.rank(), self.groups.tp.size())
            data_state = json.loads((path / DATA_STATE).read_text())
            same_ranks = all(
                marker.get(f"{kind}_parallel") == group.size()
                for kind, group in (("tensor", self.groups.tp), ("context", self.groups.cp), ("data", self.groups.dp))
            )
            state = torch.load(random_file, weights_only=True) if same_ranks else None
            if not isinstance(data_state, dict):
                raise ValueError(f"{DATA_STATE} is not a mapping")
        except CheckpointError:
            raise
        except Exception as error:  # safetensors and torch raise almost anything for a damaged file
            raise CheckpointError(
                f"{str(path)!r} is damaged ({error}): delete it to resume from an older one"
            ) from error
        if state is not None:
            _set_random_state(state)
        self.engine.global_steps = step
        self.engine.lr_scheduler.last_epoch = step
        self.engine.lr_scheduler._step_count = step + 1
        return step, data_state


def check_same_model(path: Path, layout: CheckpointLayout) -> None:
    """CheckpointError where a checkpoint belongs to another model, vocabulary or tokenizer."""
    saved = CheckpointLayout.load(path)
    if (saved.tokenizer_sha256, saved.vocab_size) != (layout.tokenizer_sha256, layout.vocab_size):
        raise CheckpointError(
            f"vocabulary mismatch: {str(path)!r} was trained with tokenizer {saved.tokenizer_sha256[:12]} "
            f"({saved.vocab_size} rows), data.dir has {layout.tokenizer_sha256[:12]} ({layout.vocab_size} rows): "
            "use the shards it was trained on, or another run.name"
        )
    if saved.seq_len != layout.seq_len and not is_weights_only(path):
        key = (
            "the row length (episodes.row_length, or write_length + read_length)" if layout.adapter else "data.seq_len"
        )
        raise CheckpointError(
            f"{str(path)!r} was trained on rows of {key} = {saved.seq_len}, not {layout.seq_len}: the data "
            "position would be lost; keep it, or use another run.name"
        )
    if saved.adapter != layout.adapter:
        raise CheckpointError(
            f"{str(path)!r} holds {_what(saved)}, this run trains {_what(layout)}: use another run.name"
        )
    old, new = ({**asdict(m), "pattern": layer_letters(m)} for m in (saved.model, layout.model))
    if different := [f"model.{k} {old[k]} -> {new[k]}" for k in new if old[k] != new[k]]:
        raise CheckpointError(
            f"{str(path)!r} holds another model ({', '.join(different)}): restore the config or use another run.name"
        )


def _what(layout: CheckpointLayout) -> str:
    if not layout.adapter:
        return "a whole model"
    base, config = layout.adapter["base"], layout.adapter["delta_mem"]
    return f"an adapter of {base['name']!r} (weights {base['sha256'][:12]}), delta_mem = {config}"
