"""Save, verify and load the checkpoints of a run.

A checkpoint is written as step_N.ATTEMPT.partial and renamed to step_N when it is complete: all files and directories
synced to the disk, the marker last. Training goes on meanwhile (`checkpoint.writer`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dla.checkpoint.find import LAYOUT, PARTIAL, checkpoint_dir, remove
from megatron_dla.checkpoint.integrity import DATA_STATE, find_faults, naming_values, read_marker, seal
from megatron_dla.checkpoint.optimizer import OPTIMIZER, load_optimizer, optimizer_file, optimizer_pieces, updates_seen
from megatron_dla.checkpoint.retention import Retention, prune
from megatron_dla.checkpoint.weights import (
    WEIGHTS,
    CheckpointLayout,
    load_merged,
    parameter_tags,
    split_merged,
    weight_file,
)
from megatron_dla.checkpoint.writer import Files, HostBuffer, Pace, Report, background_share, start_thread
from megatron_dla.config import layer_letters
from megatron_dla.errors import CheckpointError
from megatron_dla.files import FULL, free_bytes, fsync_directory, naming_full_disk, parse_json
from megatron_dla.parallel.groups import on_main
from megatron_dla.parallel.tags import is_stored
from megatron_dla.processes import print_or_drop

CONFIG = "config.yaml"


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


def _random_bytes() -> bytes:
    data = io.BytesIO()
    torch.save(_random_state(), data)
    return data.getvalue()


def _set_random_state(state: dict[str, Any]) -> None:
    """Raises what is not `_random_state`'s as KeyError, TypeError, ValueError, AttributeError or OverflowError."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, place, *rest = state["numpy"]
    keys = keys.numpy()
    if (keys != keys.astype(np.uint32)).any():
        raise ValueError("numpy: a key is not an unsigned integer of 32 bits")
    if not 0 <= place <= len(keys):  # numpy would read beyond them
        raise ValueError(f"numpy: place {place} of {len(keys)} keys")
    np.random.set_state((kind, keys.astype(np.uint32), place, *rest))
    try:
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except RuntimeError as error:
        raise ValueError(f"torch: {error}") from error


def is_weights_only(path: Path) -> bool:
    """Whether a checkpoint has no optimizer state (`dla convert from-hf`): a run starts from its weights at step 0."""
    return "zero_stage" not in read_marker(path)


@torch.no_grad()
def load_weights(path: Path, model: nn.Module, tp: dist.ProcessGroup) -> None:
    """Copy the weights of a checkpoint without faults (`agreed_faults`) into a model at any tensor-parallel size.

    Under an engine, all ranks call it, and `Checkpointer.load` after it for the engine's own copies.
    """
    merged, _ = load_merged(path, verify=False)
    local = split_merged(merged, parameter_tags(model), tp.rank(), tp.size())
    for name, value in local.items():
        parameter = model.get_parameter(name)
        with _whole(parameter, write=True):
            parameter.copy_(value)


def _whole(parameter: Tensor, *, write: bool = False) -> contextlib.AbstractContextManager[Any]:
    """The whole parameter; ZeRO-3 gathers it, one at a time, and with `write` takes what its first rank has written."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0 if write else None)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Of whole tensors, also where ZeRO-3 has divided them."""
    return {name: (getattr(x, "ds_shape", x.shape), x.dtype) for name, x in tensors.items()}


def _is_finite(x: Tensor) -> bool:
    """The sum, which is quick, decides unless finite values overflow in it."""
    return bool(x.sum(dtype=torch.float32).isfinite()) or bool(x.isfinite().all())


def agreed_faults(path: Path) -> list[str]:
    """`find_faults` with the files shared out over all ranks, each of which gets all that was found (a collective)."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, find_faults(path, rank=dist.get_rank(), size=dist.get_world_size()))
    return sorted({fault for faults in found for fault in faults})


class Checkpointer:
    """Checkpoints of one run at one layout.

    Args:
        run_dir: the run's directory. engine: the DeepSpeed engine. groups: ProcessGroupCollection. keep: which
            checkpoints are not deleted. control: `RunControl`, to check that this run still owns the directory.
        background: write while training goes on. max_failures: so many failed saves in a row are an error.

    Use it as a context manager: a save that is in progress is finished at its end.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Any,
        groups: Any,
        keep: Retention,
        control: Any,
        *,
        background: bool = True,
        max_failures: int = 1,
    ) -> None:
        self.run_dir, self.engine, self.groups, self.keep, self.control = run_dir, engine, groups, keep, control
        self.background, self.max_failures = background, max_failures
        self.rank = dist.get_rank()
        self._buffers = {WEIGHTS: HostBuffer(), OPTIMIZER: HostBuffer()}
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._preparing: threading.Thread | None = None
        self._pace = Pace(1.0)  # of the save in progress
        self._outcome: Exception | None = None  # of the last save, on rank 0
        self._step = 0  # of the last save
        self._pending, self._failures = False, 0  # failures in a row; the same on every rank

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        """Let a save in progress finish; no collective: other ranks may have failed."""
        self._ending.set()
        self._pace.hurry()
        for thread in (self._thread, self._preparing):
            if thread is not None:
                thread.join()

    def prepare(self) -> None:
        """After a step: make the host memory of the first save, beside training, which would stand still for it.

        Not beside a GPU, where locking pages holds up the device.
        """
        if not self.background or torch.cuda.is_available():
            return
        sizes = {OPTIMIZER: sum(HostBuffer.sizes(_shapes(self._pieces())).values())}
        if self.groups.dp_cp.rank() == 0:
            sizes[WEIGHTS] = sum(HostBuffer.sizes(_shapes(self._parameters())).values())

        def work() -> None:
            for name, size in sizes.items():
                self._buffers[name].reserve(size, touch=True)

        self._preparing = start_thread(work)

    def _parameters(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.engine.module.named_parameters() if is_stored(p)}

    def _pieces(self) -> dict[str, Tensor]:
        return optimizer_pieces(self.engine, self.groups.dp_cp.rank())

    def waits(self, wait: bool) -> bool:
        """Whether the next save returns when files are written, its own or those of the one before."""
        busy = self._thread is not None and self._thread.is_alive()
        return busy or self._writes_now(wait)

    def _writes_now(self, wait: bool) -> bool:
        return wait or not self.background or self._failures + 1 >= self.max_failures

    def save(
        self, layout: CheckpointLayout, data_state: dict[str, Any], config: str, *, wait: bool, **values: Any
    ) -> None:
        """Copy the state and write it as a checkpoint (a collective); training may go on when this returns.

        A save that fails, for lack of space above all, is a warning; the `max_failures`-th in a row is an error.

        Args:
            data_state: the loader's state of the whole batch, already merged over the data-parallel ranks.
            config: the run's, as YAML. wait: return when it is complete. values: go into the marker.

        Raises:
            FenceError: another run has taken over the directory; nothing is published or deleted.
            FloatingPointError: a weight is not finite; nothing is written.
            OSError: this save with `wait`, or too many, could not be written.
        """
        self.finish()
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        on_main(self.control.check)  # before the work; again before the result is published
        self._step = step = layout.step
        weights = self._weights(step)
        directory = checkpoint_dir(self.run_dir) / f"step_{step}.{self.control.attempt}{PARTIAL}"
        report = Report(on_main(lambda: self._begin(directory)))
        tensor_rank, data_rank = self.groups.tp.rank(), self.groups.dp_cp.rank()
        files = Files({weight_file(tensor_rank): weights} if data_rank == 0 else {})
        if pieces := self._pieces():
            files.tensors[optimizer_file(tensor_rank, data_rank)] = self._buffers[OPTIMIZER].copy(pieces)
        files.bytes[f"random_{self.rank:05d}.pt"] = _random_bytes()
        if self.rank == 0:
            texts = {LAYOUT: layout.to_json(), DATA_STATE: json.dumps(data_state), CONFIG: config}
            files.bytes |= {name: text.encode() for name, text in texts.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marker = {
            "step": step,
            "tensor_parallel": self.groups.tp.size(),
            "data_parallel": self.groups.dp.size(),
            "context_parallel": self.groups.cp.size(),
            "zero_stage": self.engine.zero_optimization_stage(),
            "optimizer_updates": updates_seen(self.engine),
            **values,
        }
        work = partial(self._work, directory, files, report, marker)
        self._pending = True
        if self._writes_now(wait):
            work()
            self.finish(must=wait)
        else:
            self._pace = Pace(background_share())
            self._thread = start_thread(partial(work, self._pace))

    def _begin(self, directory: Path) -> str:
        """On rank 0: a name for the reports on a new save into `directory`, which an earlier one may have left."""
        remove(directory)
        return f"{directory.name}.{uuid.uuid4().hex}"

    def finish(self, *, must: bool = False) -> None:
        """Wait for the save in progress, if any (a collective).

        Raises:
            OSError: it failed, and `must` or it was one too many. FenceError: see `save`.
        """
        if not self._pending:
            return
        self._pace.hurry()
        if self.rank and self._thread is not None:
            self._thread.join()
        dist.barrier()  # a rank that died fails this; rank 0's thread would wait for its files
        background = self._thread is not None
        if self._thread is not None:
            self._thread.join()
        self._thread, self._pending = None, False
        outcome: list[Exception | None] = [self._outcome]
        dist.broadcast_object_list(outcome)
        self._outcome, error = None, outcome[0]
        if error is None:
            self._failures = 0
            return
        if must or not isinstance(error, OSError) or self._failures + 1 >= self.max_failures:
            raise error
        if self.rank == 0 and not background:
            self._warn(error)
        self._failures += 1

    def _warn(self, error: OSError) -> None:
        count = f"{self._failures + 1} of at most {self.max_failures} in a row"
        reason = f"{error.filename!r}: {error.strerror}"
        print_or_drop(f"warning: saving failed ({count}), training goes on: {reason}")
        self.control.event("save_failed", self._step, reason=reason)

    def _work(
        self, directory: Path, files: Files, report: Report, marker: dict[str, Any], pace: Pace | None = None
    ) -> None:
        """On every rank: write its files. On rank 0: publish them when all are written; sets the outcome.

        `pace`: of a save in the background, which itself warns of its failure.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            report.give({"files": files.write(directory, pace), "size": files.size})
        except OSError as error:
            reason = [error.errno, error.strerror or str(error), str(error.filename or directory)]
            report.give({"error": reason, "size": files.size})
        except Exception as error:
            report.give({"error": repr(error), "size": files.size})
        if self.rank:
            return
        try:
            self._publish(directory, marker, report.collect(self._ending))
        except Exception as error:
            shutil.rmtree(directory, ignore_errors=True)
            self._outcome = error
            if isinstance(error, OSError) and pace is not None:
                self._warn(error)

    def _publish(self, directory: Path, marker: dict[str, Any], reports: list[dict[str, Any]]) -> None:
        """On rank 0: mark the checkpoint complete, give it its name, delete what is not kept."""
        final = checkpoint_dir(self.run_dir) / f"step_{marker['step']}"
        for failed in (x["error"] for x in reports if "error" in x):
            if isinstance(failed, str):
                raise RuntimeError(f"{str(directory)!r} could not be written: {failed}")
            number, text, path = failed
            if number in FULL:
                shutil.rmtree(directory, ignore_errors=True)
                needed, free = sum(x["size"] for x in reports), free_bytes(directory)
                text = f"{os.strerror(number)} (the checkpoint needs {needed:,} bytes, {free:,} are free)"
            raise OSError(number, text, path)
        with naming_full_disk(directory):
            seal(directory, marker, {name: record for x in reports for name, record in x["files"].items()})
        with self.control.publishing():
            if final.exists() or final.is_symlink():
                remove(final)
            os.rename(directory, final)
            for folder in (final.parent, self.run_dir):  # which may be new, too
                fsync_directory(folder)
            problems = prune(self.run_dir, self.keep)
        self.control.event("save", marker["step"])
        for line in (f"saved {final}", *(f"warning: {problem}" for problem in problems)):
            print_or_drop(line)

    def _weights(self, step: int) -> dict[str, Tensor]:
        """A copy of this tensor-parallel rank's parameters, on its first data-parallel rank (a collective).

        Raises:
            FloatingPointError: on every rank, where a parameter is not finite.
        """
        parameters = self._parameters()
        bad = ""
        copies: dict[str, Tensor] = {}
        if self.groups.dp_cp.rank() == 0:
            copies = self._buffers[WEIGHTS].room(_shapes(parameters))
        for name, parameter in parameters.items():
            with _whole(parameter):
                if name in copies:
                    copies[name].copy_(parameter.detach(), non_blocking=True)
                    bad = bad or ("" if _is_finite(parameter) else name)
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, bad)
        if name := max(found):
            raise FloatingPointError(
                f"{name} is not finite after step {step}, which is not saved: lower optimizer.lr or check the data"
            )
        return copies

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
        marker = read_marker(path)
        step, random_file = marker["step"], path / f"random_{self.rank:05d}.pt"
        try:
            load_optimizer(self.engine, path, marker["optimizer_updates"], self.groups.tp.rank(), self.groups.tp.size())
            data_state = parse_json((path / DATA_STATE).read_bytes())
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
            with naming_values(random_file):
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
