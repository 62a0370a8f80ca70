"""`dla bench`: arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_bench_parser(subparsers: Any) -> None:
    """Add `bench` and its actions to an argparse subparsers object; `func(args)` gives the exit code."""
    parser = subparsers.add_parser("bench", help="measure speed and memory on this machine")
    actions = parser.add_subparsers(dest="action", required=True, metavar="{kernels,export,data,ledger,gpu,serve}")
    text = (
        "Time DLA beside PyTorch's attention and fla's linear ones in one run, with memory and the share of the "
        "floating-point and traffic floor. On a CPU: the chunkwise path against the token recurrence; exit code 1 "
        "where a target is missed."
    )
    kernels = actions.add_parser("kernels", help="the attention kernels alone", description=text)
    kernels.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    kernels.add_argument("--lengths", type=int, nargs="+", metavar="T", help="tokens (default: 2K..128K; CPU: 2K..16K)")
    kernels.add_argument("--capacities", type=int, nargs="+", metavar="K", help="slots (default: 15 30; CPU: 30)")
    kernels.add_argument("--dims", type=int, nargs="+", metavar="D", help="head dims (default: 64 128; CPU: 64)")
    kernels.add_argument("--heads", type=int, metavar="H", help="default: 16")
    kernels.add_argument("--backbones", nargs="+", choices=("mamba2", "gdn"), default=["mamba2", "gdn"])
    kernels.add_argument("--seed", type=int, default=0)
    kernels.add_argument(
        "--budget", type=float, metavar="S", help="seconds of repeats a measurement (default: 0.5; CPU: 1.5)"
    )
    kernels.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default: runs/bench")
    kernels.add_argument("--decode-only", action="store_true", help="time one token on caches of long contexts, only")
    kernels.add_argument(
        "--tune", action="store_true", help="CUDA only: find and write this GPU's launch configurations"
    )
    kernels.set_defaults(func=_kernels)
    text = (
        "Time exported models of 3.7M parameters (and the one in DIR) in plain torch, on one CPU thread, beside "
        "transformers' Llama and Mamba-2 of that size."
    )
    export = actions.add_parser("export", help="exported models on a CPU", description=text)
    export.add_argument("model", nargs="?", metavar="DIR", help="measure this export, too")
    export.add_argument("--attention", action="store_true", help="also dla_attention beside PyTorch's, in ten minutes")
    export.add_argument("--backbones", nargs="+", choices=("mamba2", "gdn"), default=["mamba2", "gdn"])
    export.add_argument(
        "--budget", type=float, default=3.0, metavar="S", help="seconds of repeats a measurement (default: 3)"
    )
    export.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default: runs/bench")
    export.set_defaults(func=_export)
    _add_data(actions)
    text = (
        "Count, without a GPU, what one training step of CONFIG launches, moves and computes, and predict its time on "
        "a GPU: the step runs on tensors without memory."
    )
    ledger = actions.add_parser("ledger", help="a training step, counted without a GPU", description=text)
    ledger.add_argument("config", type=Path, metavar="CONFIG", help="of a pretraining run")
    ledger.add_argument("overrides", nargs="*", metavar="section.key=value", help="change keys of the config")
    ledger.add_argument("--tokens", type=int, metavar="T", help="tokens a row (default: the config's)")
    ledger.add_argument("--arch", type=int, choices=(80, 90, 100), help="compile for sm_ARCH (default: 90)")
    ledger.add_argument("--gpu", choices=("a100", "h100", "h200", "b200"), help="default: the architecture's")
    ledger.add_argument("--counts-only", action="store_true", help="compile nothing and predict nothing: seconds")
    ledger.add_argument(
        "--measure", action="store_true", help="on a CUDA device: run the step, and print measured times"
    )
    ledger.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default: runs/bench")
    ledger.set_defaults(func=_ledger)
    text = (
        "Everything that a GPU is needed for, in under nine minutes: each stage in a process of its own and under its "
        "own time limit, with the results of the finished ones on disk. Exit code 1 where a stage failed."
    )
    gpu = actions.add_parser("gpu", help="all checks and measurements of a GPU", description=text)
    gpu.add_argument("--stages", nargs="+", metavar="NAME", help="only these (default: all, in the order of the table)")
    gpu.add_argument("--limit", type=float, default=535.0, metavar="S", help="seconds for all of them (default: 535)")
    gpu.add_argument("--seed", type=int, help="of the random inputs (default: the time; it is printed)")
    gpu.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default: runs/bench")
    gpu.set_defaults(func=_gpu)
    _add_serve(actions)


def _add_data(actions: Any) -> None:
    text = (
        "Time the tokenising and the reading of documents of about 50 and 1,000 tokens, beside datasets, webdataset "
        "and litdata on the same text, and count the steps of 32 simulated ranks that wait for data. What is not "
        "installed is named."
    )
    data = actions.add_parser("data", help="tokenising and reading text", description=text)
    data.add_argument(
        "--input", type=Path, nargs="+", metavar="PATH", help="text as for `dla data shards` (default: made)"
    )
    data.add_argument("--mb", type=float, default=10.0, metavar="N", help="million characters of it (default: 10)")
    data.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds of tokenising (default: 3)")
    data.add_argument("--vocab-size", type=int, default=32_000, metavar="N", help="of all tokenizers (default: 32000)")
    data.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="processes (default: 1 2)")
    data.add_argument("--budget", type=float, default=3.0, metavar="S", help="seconds a reader is timed (default: 3)")
    data.add_argument(
        "--steps", type=int, default=40, metavar="N", help="steps of the simulated ranks (default: 40; 0: none)"
    )
    data.add_argument(
        "--memory", type=int, metavar="N",
        help="measure the memory of `dla data shards` instead, for the text and for N times as much",
    )  # fmt: skip
    data.add_argument("--step-seconds", type=float, default=0.5, metavar="S", help="time of such a step (default: 0.5)")
    data.add_argument(
        "--work", type=Path, metavar="DIR", help="for temporary files, ten times the text (default: the system's)"
    )
    data.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default: runs/bench")
    data.set_defaults(func=_data)


def _add_serve(actions: Any) -> None:
    text = (
        "A trace of requests (Poisson arrivals, lengths like ShareGPT's) on a softmax model with static batches, with "
        "continuous batching and room for the longest, and with pages, and on a DLA model of the same size in the "
        "same memory; beside `generate` of transformers. Then, for contexts of 512 to 64K, what fits, what is wasted "
        "and how fast it is decoded. Exit code 1 where a target is missed."
    )
    serve = actions.add_parser("serve", help="serving, beside a paged cache of keys and values", description=text)
    serve.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    serve.add_argument("--requests", type=int, default=64, metavar="N", help="of the trace (default: 64)")
    serve.add_argument("--rate", type=float, default=8.0, metavar="R", help="requests a second (default: 8)")
    serve.add_argument("--longest", type=int, default=1024, metavar="T", help="tokens of a request (default: 1024)")
    serve.add_argument(
        "--memory-mb", type=float, default=32.0, metavar="MB", help="for states, keys and values (default: 32)"
    )
    serve.add_argument(
        "--contexts", type=int, nargs="*", default=[512 << n for n in range(8)], metavar="T",
        help="default: 512 to 65536; none: the trace alone",
    )  # fmt: skip
    serve.add_argument(
        "--attention-groups", type=int, default=4, metavar="G",
        help="heads of keys and values of the softmax model, 1, 2 or 4 (default: 4, as many as of queries)",
    )  # fmt: skip
    serve.add_argument("--backbone", choices=("mamba2", "gdn"), default="mamba2", help="of DLA (default: mamba2)")
    serve.add_argument("--threads", type=int, default=1, help="of a CPU (default: 1)")
    serve.add_argument("--seed", type=int, default=0)
    serve.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default: runs/bench")
    serve.set_defaults(func=_serve)


def _kernels(args: argparse.Namespace) -> int:
    from .run import bench_kernels

    return bench_kernels(args)


def _export(args: argparse.Namespace) -> int:
    from .export import bench_export

    return bench_export(args)


def _data(args: argparse.Namespace) -> int:
    from .data import bench_data
    from .data_memory import bench_memory

    return bench_data(args) if args.memory is None else bench_memory(args)


def _gpu(args: argparse.Namespace) -> int:
    from .gpu import bench_gpu

    return bench_gpu(args)


def _ledger(args: argparse.Namespace) -> int:
    from .ledger.run import bench_ledger

    return bench_ledger(args)


def _serve(args: argparse.Namespace) -> int:
    from .serve import bench_serve

    return bench_serve(args)
