"""`dla bench ledger`: record the step of a config, print the table, write the JSON."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dla.config import RunConfig, load_config
from megatron_dla.errors import UserError

from .record import Recording, record
from .step import Step, one_process
from .summary import quantities, rows, total


def ledger_config(path: Path, tokens: int | None = None) -> RunConfig:
    """The config of a pretraining run on one GPU, with rows of `tokens`.

    Raises:
        UserError: the config is an adapter's, or is cut over several GPUs.
    """
    config = load_config(path)
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


def facts(config: RunConfig, recording: Recording) -> dict[str, Any]:
    """The JSON of a recording."""
    parts = rows(recording.events)
    return {
        "config": config.run.name,
        "tokens": config.data.seq_len * config.training.micro_batch_size,
        "layers": config.model.num_layers,
        "components": {name: row.as_dict() for name, row in parts.items()},
        "total": total(parts.values()).as_dict(),
        "quantities": quantities(recording, config.model.num_layers, 1),
    }


def table(found: dict[str, Any]) -> str:
    """One line a component."""
    lines = [f"{'':24s} {'launches':>8s} {'triton':>7s} {'syncs':>6s} {'copies':>6s} {'TFLOP':>8s} {'GB':>8s}"]
    for name, row in [*found["components"].items(), ("sum", found["total"])]:
        lines.append(
            f"{name:24s} {row['launches']:8d} {row['triton']:7d} {row['syncs']:6d} {row['copies']:6d} "
            f"{row['flops'] / 1e12:8.2f} {row['bytes'] / 1e9:8.2f}"
        )
    return "\n".join(lines)


def bench_ledger(args: argparse.Namespace) -> int:
    """Exit code 0. Raises UserError for a config that cannot be counted."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError("TRITON_INTERPRET is set: launches would run in the interpreter and not be counted; unset it")
    config = ledger_config(args.config, args.tokens)
    found = facts(config, count(config))
    print(table(found))
    for name, value in found["quantities"].items():
        print(f"{name.replace('_', ' ')}: {value if isinstance(value, dict) else f'{value:,.4g}'}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"ledger_{config.run.name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path}")
    return 0
