"""`dla bench data --memory N`: the memory that `dla data shards` takes for a text, and for N times the text."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import lzma
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dla.data_prep.sources import DocumentSource
from megatron_dla.errors import UserError
from megatron_dla.shard_index import ShardIndex

from .data import DOCUMENTS, TRAINED_ON, Record, check_arguments, generated_text, read_text, train_tokenizers
from .report import environment, write_json

INTERVAL_S = 0.05
ROW_GROUP_BYTES = 1 << 25
_FIELDS = {"Rss:": "rss_mb", "Pss:": "pss_mb", "Anonymous:": "anonymous_mb", "VmHWM:": "peak_mb"}

_SUMS = ("rss_mb", "pss_mb", "anonymous_mb")


def processes(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the process has ended
                found += map(int, children.read_text().split())
    return found


def memory(pid: int) -> dict[str, float]:
    """MB of a process: `rss_mb`, all pages; `pss_mb`, those that n processes of the machine share counted as 1 / n;
    `anonymous_mb`, those of no file; `peak_mb`, the largest `rss_mb` so far."""
    found = {}
    with contextlib.suppress(OSError):  # the process has ended
        for file in ("smaps_rollup", "status"):
            for row in Path(f"/proc/{pid}/{file}").read_text().splitlines():
                name, *values = row.split()
                if field := _FIELDS.get(name):
                    found[field] = int(values[0]) / 1024
    return found


def peak_memory(command: Sequence[str]) -> Record:
    """Run a command: its `seconds`, and the peaks of its memory in MB.

    `main_mb`: of the process itself, by its VmHWM (`ru_maxrss` would be at least that of this process). The others,
    see `memory`: sums over its processes at one time. All from samples every 50 ms.

    Raises RuntimeError, with what it wrote to stderr, if it fails.
    """
    peaks = dict.fromkeys(("main_mb", *_SUMS), 0.0)
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            samples = [memory(pid) for pid in processes(process.pid)]
            found = {"main_mb": samples[0].get("peak_mb", 0.0)}
            found |= {name: sum(sample.get(name, 0.0) for sample in samples) for name in _SUMS}
            peaks = {name: max(peak, found[name]) for name, peak in peaks.items()}
            time.sleep(INTERVAL_S)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(errors.read().decode(errors="replace").strip())
    return {"seconds": time.perf_counter() - start, **peaks}


def write_xz(path: Path, documents: Iterator[str]) -> None:
    with lzma.open(path, "wt", preset=1, encoding="utf-8") as file:
        for text in documents:
            file.write(json.dumps({"text": text}) + "\n")


def write_parquet(path: Path, documents: Iterator[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        rows: list[str] = []
        for text in documents:
            rows.append(text)
            if sum(map(len, rows)) > ROW_GROUP_BYTES or len(rows) == 1000:
                writer.write_table(pyarrow.table({"text": rows}, schema))
                rows = []
        writer.write_table(pyarrow.table({"text": rows}, schema))


FORMATS: dict[str, Callable[[Path, Iterator[str]], None]] = {"jsonl.xz": write_xz, "parquet": write_parquet}


def repeated(args: argparse.Namespace, text: str, times: int) -> Iterator[str]:
    """The documents of the input, or pieces of `text`, again and again; no two are equal."""
    size = DOCUMENTS["long"]
    for i in range(times):
        if args.input:
            documents = (document.text for document in DocumentSource(args.input).documents())
        else:
            documents = (text[start : start + size] for start in range(0, len(text), size))
        yield from (f"{i} {document}" for document in documents)


def bench_memory(args: argparse.Namespace) -> int:
    """Print and write the peaks; exit code 0. Raises UserError for a wrong argument, or where this is not Linux."""
    check_arguments(args)
    if args.memory < 2:
        raise UserError(f"--memory {args.memory}: want a multiple of the text, at least 2")
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("--memory: this system has no /proc/PID/smaps_rollup; run it on Linux")
    text = read_text(args.input, TRAINED_ON) if args.input else generated_text(round(args.mb * 1e6))
    facts: dict[str, Any] = environment(torch.device("cpu")) | {"cores": len(os.sched_getaffinity(0))}
    records: list[Record] = []
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        place, workers = Path(folder), max(args.workers)
        tokenizer = train_tokenizers(text, args.vocab_size, place)["sentencepiece"]
        for name, times in itertools.product(FORMATS, (1, args.memory)):
            path = place / f"text.{name}"
            FORMATS[name](path, repeated(args, text, times))
            command = [sys.executable, "-m", "megatron_dla.cli", "data", "shards", "--input", path, "--tokenizer"]
            out = place / f"{name}-{times}"
            command += [tokenizer, "--output", out, "--workers", workers]
            record = {"name": name, "times": times, "workers": workers, **peak_memory(list(map(str, command)))}
            record["text_mb"] = ShardIndex.load(out).totals().text_bytes / 1e6
            records.append(record)
            print(line(record), flush=True)
            write_json(args.out / "data_memory.json", facts | {"records": records})
    print(f"wrote {args.out / 'data_memory.json'}")
    return 0


def line(record: Record) -> str:
    """A row of the table."""
    return (
        f"{record['name']:8s} | {record['text_mb']:7.1f} MB of text | {record['workers']} workers | main process "
        f"{record['main_mb']:4.0f} MB | all processes {record['rss_mb']:4.0f} MB (RSS), {record['pss_mb']:4.0f} MB "
        f"(PSS), {record['anonymous_mb']:4.0f} MB of no file | {record['seconds']:.0f} s"
    )
