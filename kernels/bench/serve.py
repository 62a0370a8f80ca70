"""`dla bench serve`: a trace of requests, and contexts of 512 to 64K, on softmax and on DLA in the same memory."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_dla.console import progress_bar
from megatron_dla.errors import UserError
from megatron_dla.serving.engine import Engine
from megatron_dla.serving.sampling import MAX_THREADS

from .export import VOCAB
from .report import environment, write_json
from .run import check_seed, device_memory, resolve_device
from .serve_contexts import measure_context, state_sizes
from .serve_plot import draw
from .serve_systems import GENERATE, SYSTEMS, Memory, engine_config, generate_trace, make_models
from .serve_trace import Arrival, Outcome, make_trace, replay

SPEEDUP, WASTE = 2.0, 0.01  # of the DLA model: throughput over static batches, at least; waste, at most
MAX_REQUESTS, MAX_TOKENS = 1_000_000, 2**24
MIN_RATE = 0.001  # a request in a quarter of an hour
TRACE_LINE = "{:10s} {:>9} {:>8} {:>14} {:>14} {:>8} {:>7}"
CONTEXT_LINE = "{:10s} {:>8} {:>12} {:>7} {:>7} {:>8} {:>9} {:>9}"


def _check(args: argparse.Namespace) -> None:
    for name, value in (("requests", args.requests), ("longest", args.longest), ("threads", args.threads)):
        if value < 1:
            raise UserError(f"--{name} {value}: want at least 1")
    for name, value, most in (
        ("requests", args.requests, MAX_REQUESTS), ("longest", args.longest, MAX_TOKENS),
        ("threads", args.threads, MAX_THREADS), ("contexts", max(args.contexts, default=0), MAX_TOKENS),
    ):  # fmt: skip
        if value > most:
            raise UserError(f"--{name} {value}: want at most {most}")
    check_seed(args.seed)
    if not MIN_RATE <= args.rate < math.inf:
        raise UserError(f"--rate {args.rate:g}: want at least {MIN_RATE:g} requests a second")
    if not 0 < args.memory_mb < math.inf:
        raise UserError(f"--memory-mb {args.memory_mb:g}: want more than 0")
    if args.attention_groups not in (1, 2, 4):
        raise UserError(f"--attention-groups {args.attention_groups}: want 1, 2 or 4")
    if args.longest < 16:
        raise UserError(f"--longest {args.longest}: want at least 16 tokens")
    if bad := [x for x in args.contexts if x < 16]:
        raise UserError(f"--contexts {bad[0]}: want at least 16 tokens")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} is a file: give a directory")


def _check_memory(name: str, value: float, size: float, device: torch.device) -> None:
    if size > (total := device_memory(device)):
        raise UserError(f"--{name} {value:.12g}: {size / 1e6:,.0f} MB do not fit into {total / 1e6:,.0f} MB: lower it")


def run_trace(name: str, models: dict[str, Any], memory: Memory, trace: list[Arrival], longest: int) -> Outcome:
    """The trace on one system, after a short one that does not count."""
    model = models["dla" if name == "dla" else "softmax"]
    short = [Arrival(0.0, x.prompt[:8], 2) for x in trace[:2]]

    def run(part: list[Arrival], progress: Callable[[int], None]) -> Outcome:
        if name == GENERATE:
            return generate_trace(model, part, memory.sequences("static", longest, longest), progress)
        return replay(Engine(model, None, engine_config(name, memory, longest)), part, progress)

    run(short, lambda tokens: None)
    with progress_bar(sum(x.answer for x in trace), name, unit="token") as bar:
        return run(trace, bar.update)


def trace_line(name: str, facts: dict[str, Any]) -> str:
    """One row of the first table."""

    def pair(key: str, form: str) -> str:
        return f"{facts[f'{key}_p50']:{form}} / {facts[f'{key}_p99']:{form}}"

    return TRACE_LINE.format(
        name, f"{facts['tokens_per_s']:,.0f}", f"{facts['seconds']:.1f}", pair("first_token_s", ".2f"),
        pair("token_ms", ".1f"), f"{facts['running']:.1f}", f"{facts['waste']:.1%}",
    )  # fmt: skip


def context_line(record: dict[str, Any]) -> str:
    """One row of the second table."""
    return CONTEXT_LINE.format(
        record["system"], f"{record['context']:,}", f"{record['bytes_each'] / 1e6:,.2f} MB", record["fit"],
        record["decoded"], f"{record['step_ms']:.1f}", f"{record['tokens_per_s']:,.0f}", f"{record['waste']:.2%}",
    )  # fmt: skip


def check_targets(trace: dict[str, dict[str, Any]], contexts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be shown: name, value, whether it holds, and whether the exit code depends on it."""
    rate = {name: facts["tokens_per_s"] for name, facts in trace.items()}
    mine = [r for r in contexts if r["system"] == "dla"]
    waste = max([trace["dla"]["waste"], *(r["waste"] for r in mine)])
    sizes = sorted({r["bytes_each"] for r in mine})
    order = rate["paged"] > rate["reserved"] > rate["static"]
    name = "paged > reserved > static, tokens/s" + ("" if order else f" ({why_not(trace)})")
    gain = rate["dla"] / rate["static"]
    return [
        {"what": f"dla at least {SPEEDUP:g} times static", "value": gain, "met": gain >= SPEEDUP, "must": True},
        {"what": f"waste of dla below {WASTE:.0%}", "value": waste, "met": waste < WASTE, "must": True},
        {"what": "one size of a sequence of dla", "value": sizes, "met": len(sizes) <= 1, "must": True},
        {"what": name, "value": [round(rate[n]) for n in SYSTEMS][2::-1], "met": order, "must": False},
    ]


def why_not(trace: dict[str, dict[str, Any]]) -> str:
    """Of a trace in which the order of the published comparison is not found: the first pair out of order."""
    better, worse = next(
        pair for pair in (("paged", "reserved"), ("reserved", "static"))
        if trace[pair[0]]["tokens_per_s"] <= trace[pair[1]]["tokens_per_s"]
    )  # fmt: skip
    many, few = trace[better]["running"], trace[worse]["running"]
    if many < 1.1 * few:
        return (
            f"memory does not limit this trace: {better} ran {many:.1f} at once, {worse} {few:.1f}; lower --memory-mb"
        )
    return f"{better} ran {many:.1f} at once, {worse} {few:.1f}, but a step of more sequences took as much longer"


def bench_serve(args: argparse.Namespace) -> int:
    """Print both tables and write serve_<device>.json and .png; exit code 1 where a target is missed."""
    _check(args)
    device = resolve_device(args.device)
    _check_memory("memory-mb", args.memory_mb, args.memory_mb * 1e6, device)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        return _bench(args, device)
    finally:
        torch.set_num_threads(before)


def _bench(args: argparse.Namespace, device: torch.device) -> int:
    begin = time.perf_counter()
    models = {
        name: model.to(device)
        for name, model in make_models(args.backbone, {"attention_groups": args.attention_groups}, args.seed).items()
    }
    memory = Memory.of(round(args.memory_mb * 1e6), models)
    for name in SYSTEMS:
        engine_config(name, memory, args.longest)  # whether one sequence fits
    for context in args.contexts:
        _check_memory("contexts", context, 2 * context * memory.token, device)
    trace = make_trace(args.requests, args.rate, args.longest, VOCAB, args.seed)
    prompts = sum(len(x.prompt) for x in trace) / len(trace)
    answers = sum(x.answer for x in trace) / len(trace)
    facts: dict[str, Any] = environment(device) | {
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "state_bytes": memory.state, "token_bytes": memory.token, "memory_bytes": memory.total,
        "requests": len(trace), "rate": args.rate, "longest": args.longest, "seed": args.seed,
        "attention_groups": args.attention_groups, "backbone": args.backbone,
        "mean_prompt": prompts, "mean_answer": answers, "trace": {}, "contexts": [],
    }  # fmt: skip
    print(
        f"{len(trace)} requests, {args.rate:g} a second, prompts of {prompts:.0f} tokens and answers of {answers:.0f} "
        f"in the mean; {memory.total / 1e6:,.0f} MB: a token of the softmax model takes {memory.token:,} bytes, a "
        f"sequence of the DLA model {memory.state:,}"
    )  # fmt: skip
    for name, text in SYSTEMS.items():
        print(f"{name:10s} {text}")
    path = args.out / f"serve_{device.type}.json"
    print(TRACE_LINE.format("", "tokens/s", "seconds", "first token s", "ms a token", "running", "waste"))
    print(TRACE_LINE.format("", "", "", "p50 / p99", "p50 / p99", "", ""))
    for name in (GENERATE, *SYSTEMS):
        facts["trace"][name] = run_trace(name, models, memory, trace, args.longest).facts()
        print(trace_line(name, facts["trace"][name]), flush=True)
        write_json(path, facts)
    if args.contexts:
        wide = Memory(max(memory.total, 2 * max(args.contexts) * memory.token), memory.state, memory.token)
        facts["contexts_memory_bytes"] = wide.total
        print(f"{wide.total / 1e6:,.0f} MB, requests of up to so many tokens")
        print(CONTEXT_LINE.format("", "context", "a sequence", "fit", "timed", "ms", "tokens/s", "waste"))
        sizes = state_sizes(models["dla"], args.contexts, args.seed)
    for context in args.contexts:
        records = measure_context(models, wide, context, sizes[context], args.seed)
        facts["contexts"] += records
        print("\n".join(context_line(record) for record in records), flush=True)
        write_json(path, facts)
    facts["targets"] = check_targets(facts["trace"], facts["contexts"])
    facts["wall_s"] = time.perf_counter() - begin
    write_json(path, facts)
    for target in facts["targets"]:
        print(f"{'met   ' if target['met'] else 'MISSED'} {target['what']}: {target['value']}")
    picture = draw(path.with_suffix(".png"), facts)
    print(f"wrote {path}" + (f" and {picture}" if picture else "; no picture: matplotlib is not installed"))
    return int(any(target["must"] and not target["met"] for target in facts["targets"]))
