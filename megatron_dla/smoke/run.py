"""The stages of `dla smoke`, in order."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from megatron_dla import __version__
from megatron_dla.errors import UserError
from megatron_dla.kernels.bench.methods import usable_backend
from megatron_dla.kernels.bench.report import environment, write_json
from megatron_dla.kernels.bench.run import resolve_device
from megatron_dla.kernels.bench.stages import Skipped, Stages
from megatron_dla.smoke.kernels import SIZES, Checker
from megatron_dla.smoke.model import RECIPES, ModelSmoke, not_installed

TRAINING = "training, a few dozen steps"
EXPORT = "export to Hugging Face and back, equal logits"


def smoke(
    device: str | None, out: Path, *, seed: int | None = None, keep: bool = False, kernels_only: bool = False
) -> int:
    """Run all stages and write `out`/smoke_<device>.json. Returns 0 if nothing failed, else 1.

    Raises:
        UserError: CUDA is requested and absent, the seed is out of range, or `out` is a file.
    """
    where = resolve_device(device)
    if seed is not None and not 0 <= seed < 2**31:
        raise UserError(f"--seed {seed}: want a number in [0, 2^31)")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {str(out)!r} is a file: give a directory")
    seed = int(time.time()) % 2**31 if seed is None else seed
    work = out / f"work-{time.strftime('%Y%m%d-%H%M%S')}-{seed}"
    work.mkdir(parents=True)
    stages = Stages(total=6 if kernels_only else 9)
    threads = torch.get_num_threads()
    if where.type == "cpu":
        torch.set_num_threads(1)  # the checks are many small operations
    facts = environment(where)
    begin = time.monotonic()
    backend = _start(stages, facts, where, seed)
    checker = Checker(where, backend, SIZES[where.type], seed, stages)
    stages.run("kernels: boundaries and merges against the reference", checker.decisions)
    stages.run("kernels: output and gradients against float64", checker.numerics)
    stages.run("kernels: two runs give the same bits", checker.determinism)
    stages.run("kernels: decoding against the full pass", checker.decoding)
    stages.run("Triton kernels on a GPU", lambda: _triton(where, backend))
    torch.set_num_threads(threads)
    if not kernels_only:
        model = ModelSmoke(where.type, RECIPES[where.type], work.resolve(), seed, stages)
        stages.run(TRAINING, model.train)
        stages.run(EXPORT, model.export, needs=TRAINING)
        stages.run("generation, constant cache", model.generate, needs=EXPORT)
    passed = stages.summary()
    seconds = round(time.monotonic() - begin, 1)
    record: dict[str, Any] = {**facts, "seed": seed, "backend": backend, "wall_s": seconds, "passed": passed}
    path = write_json(out / f"smoke_{where.type}.json", {**record, "stages": stages.as_dicts()})
    print(f"{seconds:.0f} s in total; wrote {path}")
    if kernels_only or (passed and not keep):
        shutil.rmtree(work, ignore_errors=True)
    else:
        print(f"the model and its data are in {work}")
    return 0 if passed else 1


def _start(stages: Stages, facts: dict[str, Any], device: torch.device, seed: int) -> str:
    """Stage 1: installed packages and the device; returns the kernels' backend."""
    backend = "torch"

    def versions() -> None:
        nonlocal backend
        stages.say(
            f"megatron-dla {__version__}, Python {facts['python']}, torch {facts['torch']}, triton {facts['triton']}"
        )
        stages.say(f"{facts.get('gpu', 'no GPU used')}; {facts['machine']}, {facts['threads']} threads")
        optional = ("megatron.core", "deepspeed", "transformers", "sentencepiece", "matplotlib")
        if absent := not_installed(optional):
            stages.say(f"not installed: {', '.join(absent)}")
        backend, words = usable_backend(device)
        stages.facts |= {"backend": backend, "seed": seed}
        stages.say(f"kernels: {words}; --seed {seed} repeats the random inputs")

    stages.run("versions and device", versions)
    return backend


def _triton(device: torch.device, backend: str) -> None:
    """Skipped with a reason where the stages before did not run the Triton kernels; no check of its own."""
    if device.type != "cuda":
        raise Skipped("no GPU used; the stages above checked the torch path (the interpreter's checks: tests/kernels)")
    if backend != "triton":
        raise Skipped("the Triton kernels cannot be used here; the stages above checked the torch path")
