"""`dla bench ledger`: record the step of a config, on a GPU also measure it, print the table, write the JSON."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_dla.config import RunConfig, load_config
from megatron_dla.errors import UserError
from megatron_dla.gpus import GPUS

from .constants import ARCH, OF_ARCH
from .record import Recording, record
from .report import facts, table
from .step import Step, one_process


def ledger_config(path: Path, tokens: int | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a pretraining run on one GPU, with rows of `tokens` and keys changed ("section.key=value").

    Raises:
        UserError: the config is an adapter's, or is cut over several GPUs.
    """
    config = load_config(path, list(overrides))
    if not isinstance(config, RunConfig):
        raise UserError(f"{path}: the ledger counts pretraining steps: give a config with a model section")
    if (size := config.parallel.model_parallel_size) != 1:
        raise UserError(f"{path}: parallel sizes give {size} ranks a model; the ledger counts one: set them to 1")
    if tokens is not None:
        if tokens < 2:
            raise UserError(f"--tokens {tokens}: want at least 2")
        config = replace(config, data=replace(config.data, seq_len=tokens))
    return config


def count(config: RunConfig, compile_for: int | None = None) -> Recording:
    """Everything that one optimizer step of one micro batch does."""
    with one_process() as groups:
        step = Step(config, groups)
        with record(compile_for) as recording:
            step.run(recording)
    return recording


def bench_ledger(args: argparse.Namespace) -> int:
    """Exit code 0. Raises UserError for a config that cannot be counted."""
    if args.measure and not torch.cuda.is_available():
        raise UserError("--measure: no CUDA device on this machine: leave it out")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError("TRITON_INTERPRET is set: launches would run in the interpreter and not be counted; unset it")
    config = ledger_config(args.config, args.tokens, args.overrides)
    name = args.gpu or OF_ARCH[args.arch or 90]
    if args.arch not in (None, ARCH[name]):
        raise UserError(f"--arch {args.arch} --gpu {name}: this GPU is sm_{ARCH[name]}: leave one of the two out")
    if args.counts_only:
        found = facts(config, count(config), None)
    else:
        found = facts(config, count(config, ARCH[name]), GPUS[name])
    if args.measure:
        from .measure import measure

        found["measured"] = measure(config, torch.device("cuda"))
    print(table(found))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"ledger_{config.run.name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path}")
    return 0
