"""Run directories for `dla report`, written by hand: what the files of a run hold, and what may be wrong with them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

START = 1_795_800_000.0  # Unix seconds


def log_step(step: int, seed: int = 0, layers: int = 8) -> dict[str, Any]:
    """A line of metrics.jsonl of a mixture on GPUs, 40 s a step."""
    rnd = random.Random(1000 * seed + step)
    loss = 2.3 + 7.5 * math.exp(-step / 90) + rnd.gauss(0, 0.05)
    line: dict[str, Any] = {
        "time": START + 90 + 40 * step + (2400 if step > 180 else 0), "step": step, "loss": loss,
        "grad_norm": 0.4 + 2 * math.exp(-step / 60) + abs(rnd.gauss(0, 0.1)),
        "lr": 3e-4 * min(1, step / 40) * (0.55 + 0.45 * math.cos(math.pi * step / 400)), "tokens": 524288 * step,
        "tokens_per_s": 13000 + rnd.gauss(0, 250), "step_s": 40.0, "data_wait_share": abs(rnd.gauss(0.004, 0.003)),
        "mfu": 0.31 + rnd.gauss(0, 0.005), "memory_gb": 61.2, "memory_active_gb": 58 + rnd.random(),
        "memory_reserved_gb": 68.5, "epoch": step / 900, "padding_share": 0.012, "cut_share": 0.002,
        "mix": {"web": 0.698 + rnd.gauss(0, 0.004), "books": 0.202, "code & <maths>": 0.1},
        "source_epochs": {"web": step / 1200, "books": step / 300, "code & <maths>": step / 700},
        "newest_merge_share_by_layer": [0.5, None],
        "slot_sizes": {"1": 0.75, "2-3": 0.25},
        "slot_weights": {"0": 1.5, "1": 0.5},
        "boundary_rate_by_head": [
            [max(0.02, 0.5 - 0.04 * layer - 0.0006 * step + rnd.gauss(0, 0.01)) for _ in range(4)]
            for layer in range(layers)
        ],
    }  # fmt: skip
    if step % 50 == 0:
        line |= {"val_loss": loss + 0.04, "val_bpb": (loss + 0.04) / 2.9}
        line["val_loss_by_source"] = {"web": loss, "books": loss + 0.3, "code & <maths>": loss - 0.8}
    return line


CONFIG: dict[str, Any] = {
    "run": {"name": "dla_gdn_1b3", "dir": "runs", "seed": 1},
    "data": {
        "dir": "", "seq_len": 4096, "cache_dir": "https://me:s3cret@mirror/data?token=s3cret",
        "sources": {"web": {"dir": "w", "weight": 0.7}, "books": {"dir": "b", "weight": 0.2},
                    "code & <maths>": {"dir": "c", "weight": 0.1}},
        "stages": [{"from_tokens": 10**12, "weights": {"web": 1.0}}],
    },
    "model": {"backbone": "gdn", "num_layers": 8, "pattern": "DDDA", "hidden_size": 2048, "key_dim": 128},
    "training": {"steps": 400, "global_batch_size": 128},
}  # fmt: skip
COMMAND = {
    "argv": ["dla", "train", "config.yaml", "data.dir=s3://me:s3cret@host/x"], "world_size": 32, "host": "node01",
    "cpu_count": 96, "devices": ["NVIDIA H100 80GB HBM3"] * 8, "git": "v0.1-12-gabc",
    "versions": {"python": "3.11.7", "torch": "2.11.0", "megatron-core": "0.16.1"},
}  # fmt: skip


def write_run(run: Path, steps: int = 400) -> Path:
    """A run that lost a node at step 187, resumed at 180, skipped a step, fell back once and is done."""
    run.mkdir(parents=True)
    lines = [log_step(step) for step in range(0, steps + 1, 2)]
    lines[0] = {key: lines[0][key] for key in ("time", "step", "val_loss", "val_bpb")} | {"tokens": 0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (run / "command.json").write_text(json.dumps(COMMAND))
    end = START + 90 + 40 * steps + 2400
    start = {"event": "start", "host": "node01", "processes": 32}
    events = [
        {**start, "step": 0, "attempt": "71.0", "time": START, "last_logged": -1},
        *({"event": "save", "step": s, "time": START + 95 + 40 * s, "attempt": "71.0"} for s in (60, 120, 180)),
        {"event": "fallback", "step": 180, "time": START + 9900, "attempt": "71.1", "path": "step_186",
         "reason": "weights/tp_00.safetensors has 4,096 bytes of 8,192"},
        {**start, "step": 180, "attempt": "71.1", "time": START + 9910, "last_logged": 186},
        {"event": "save_failed", "step": 240, "time": log_step(240)["time"] + 9, "attempt": "71.1",
         "reason": "'/shared': No space left on device"},
        *({"event": "save", "step": s, "time": log_step(s)["time"] + 5, "attempt": "71.1"} for s in (300, 360, 400)),
        {"event": "done", "step": steps, "time": end + 8, "attempt": "71.1"},
    ]  # fmt: skip
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "anomalies.jsonl").write_text(
        json.dumps({"step": 223, "kind": "loss <spike>", "loss": 11.5, "action": "skipped"}) + "\n"
    )
    hang = {"step": 186, "time": START + 9000, "silent_s": 1201.5}
    hang["ranks"] = [{"rank": 3, "host": "node02", "pid": 7, "at": "all_reduce (distributed_c10d.py:2810)"}]
    (run / "exits" / "71.0").mkdir(parents=True)
    (run / "exits" / "71.0" / "hang.json").write_text(json.dumps(hang))
    (run / "done").write_text(json.dumps({"step": steps, "time": end, "attempt": "71.1"}))
    return run
