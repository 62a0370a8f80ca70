"""The ledger as a table and as JSON: counts of each component, kernels, and predicted times."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_dla.config import RunConfig
from megatron_dla.gpus import Gpu
from megatron_dla.model.counts import flops_per_token
from megatron_dla.model.gpt import padded_vocab
from megatron_dla.tasks.pretrain import ASSUMED_VOCABULARY

from .constants import fingerprint
from .predict import predict, predict_launch
from .record import Event, Recording
from .summary import quantities, rows, total


def kernel_rows(events: Iterable[Event], gpu: Gpu) -> list[dict[str, Any]]:
    """One row a kernel and component: its launches, its largest launch, what it was compiled to, predicted time."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    largest: dict[tuple[str, str], float] = {}
    for event in (e for e in events if e.kind == "triton"):
        key = event.component, event.name
        one, compiled = predict_launch(event.launch, gpu), event.launch.report
        row = found.setdefault(key, {"component": key[0], "kernel": key[1], "launches": 0, "predicted_ms": 0.0})
        row["launches"] += 1
        row["predicted_ms"] += 1e3 * one.seconds
        if one.seconds > largest.get(key, 0.0):
            largest[key] = one.seconds
            row |= {
                "programs": event.launch.programs, "waves": round(one.waves, 3), "resident": one.resident,
                "steps": round(one.steps, 1), "flops": one.flops, "bytes": one.memory, "limit": one.limit,
                "registers": compiled.registers, "shared": compiled.shared,
                "spills": compiled.spill_stores + compiled.spill_loads, "mma": compiled.mma,
                "assumed_loops": round(one.assumed, 1),
            }  # fmt: skip
    return sorted(found.values(), key=lambda row: -row["predicted_ms"])


def predicted(config: RunConfig, recording: Recording, gpu: Gpu) -> dict[str, Any]:
    """Times of a step on one GPU, with as many micro batches as the config's global batch has."""
    training, T = config.training, config.data.seq_len
    by_component: dict[str, float] = {}
    inside = outside = flops = 0.0
    for event in recording.events:
        seconds = predict(event, gpu)
        by_component[event.component] = by_component.get(event.component, 0.0) + 1e3 * seconds
        inside, outside = inside + seconds * event.micro, outside + seconds * (not event.micro)
        flops += event.flops if event.kind != "triton" else predict_launch(event.launch, gpu).flops
    micro_batches = training.global_batch_size // training.micro_batch_size
    seconds = micro_batches * inside + outside
    tokens = micro_batches * training.micro_batch_size * T
    vocabulary = padded_vocab(ASSUMED_VOCABULARY, config.model.vocab_multiple)
    model_flops = flops_per_token(config.model, vocabulary, T) * tokens
    return {
        "gpu": gpu.name,
        "constants": fingerprint(),
        "ms": by_component,
        "micro_batch_ms": 1e3 * inside,
        "step_ms": 1e3 * seconds,
        "micro_batches_a_step": micro_batches,
        "tokens_per_s": tokens / seconds,
        "mfu": model_flops / seconds / gpu.dense,
        "flops_a_micro_batch": flops,
    }


def facts(config: RunConfig, recording: Recording, gpu: Gpu | None) -> dict[str, Any]:
    """The JSON of a recording; with a GPU (kernels compiled for it) also kernels and predictions."""
    parts = rows(recording.events)
    found: dict[str, Any] = {
        "config": config.run.name,
        "tokens": config.data.seq_len * config.training.micro_batch_size,
        "layers": config.model.num_layers,
        "components": {name: row.as_dict() for name, row in parts.items()},
        "total": total(parts.values()).as_dict(),
        "quantities": quantities(recording, config.model.num_layers, 1),
    }
    if gpu is not None:
        found["predicted"] = predicted(config, recording, gpu)
        found["kernels"] = kernel_rows(recording.events, gpu)
    return found


def table(found: dict[str, Any]) -> str:
    """One line a component, then one a kernel."""
    guess, seen = found.get("predicted"), found.get("measured")
    head = f"{'':24s} {'launches':>8s} {'triton':>7s} {'syncs':>6s} {'copies':>6s} {'TFLOP':>8s} {'GB':>8s}"
    times = {title: part["ms"] for title, part in (("predicted ms", guess), ("measured ms", seen)) if part}
    lines = [head + "".join(f" {title:>13s}" for title in times)]
    for name, row in [*found["components"].items(), ("sum", found["total"])]:
        line = (
            f"{name:24s} {row['launches']:8d} {row['triton']:7d} {row['syncs']:6d} {row['copies']:6d} "
            f"{row['flops'] / 1e12:8.2f} {row['bytes'] / 1e9:8.2f}"
        )
        for ms in times.values():
            line += f" {sum(ms.values()) if name == 'sum' else ms.get(name, 0.0):13.2f}"
        lines.append(line)
    lines += [f"{name.replace('_', ' ')}: {_text(value)}" for name, value in found["quantities"].items()]
    if guess:
        lines += ["", *kernel_lines(found["kernels"]), "", conclusion(guess)]
    if seen:
        lines.append(measured_conclusion(seen))
    return "\n".join(lines)


def _text(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,.4g}"


def kernel_lines(kernels: list[dict[str, Any]]) -> list[str]:
    """The compiled kernels; programs, waves and steps are those of a kernel's largest launch."""
    lines = [
        f"{'kernel':30s} {'component':20s} {'launches':>8s} {'programs':>8s} {'waves':>7s} {'steps':>6s} {'regs':>5s} "
        f"{'shared':>7s} {'spill':>6s} {'mma':>12s} {'limit':>8s} {'predicted ms':>13s}"
    ]
    for k in kernels:
        lines.append(
            f"{k['kernel']:30s} {k['component']:20.20s} {k['launches']:8d} {k['programs']:8d} {k['waves']:7.2f} "
            f"{k['steps']:6.0f} {k['registers']:5d} {k['shared']:7d} {k['spills']:6d} {k['mma']:>12s} {k['limit']:>8s} "
            f"{k['predicted_ms']:13.2f}"
        )
    return lines


def conclusion(guess: dict[str, Any]) -> str:
    """The sum, in words."""
    return (
        f"predicted on one {guess['gpu']}: {guess['micro_batch_ms']:.0f} ms a micro batch, "
        f"{guess['step_ms'] / 1e3:.2f} s a step of {guess['micro_batches_a_step']}, "
        f"{guess['tokens_per_s']:,.0f} tokens/s, MFU {guess['mfu']:.1%}"
    )


def measured_conclusion(seen: dict[str, Any]) -> str:
    """What `measure` found, in words."""
    memory = "" if seen["peak_bytes"] is None else f", {seen['peak_bytes'] / 1e9:.1f} GB at most"
    mfu = "" if seen["mfu"] is None else f", MFU {seen['mfu']:.1%}"
    return (
        f"measured on {seen['device']} (torch {seen['torch']}): {seen['step_ms']:.0f} ms a micro batch with its "
        f"update, {seen['tokens_per_s']:,.0f} tokens/s{mfu}{memory}"
    )
