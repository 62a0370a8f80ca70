"""`python -m megatron_dla.kernels.bench.ledger.peers`: predict kernels that others measured, beside their times.

fla's kernels are recorded and compiled as ours are; where fla autotunes, the fastest predicted configuration stands for
the one that tuning finds. A prediction that is far from the published time says how far ours may be off.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dla.gpus import GPUS

from .components import PARTITION
from .constants import ARCH, OF_ARCH, fingerprint
from .predict import predict, predict_launch
from .record import Recording, record

HELION = "https://github.com/pytorch/helion/blob/fea89d20151c4b1c180eda5000cc79f6b13ed240/examples/fla/BENCHMARKS.md"
FLA = "https://github.com/fla-org/flash-linear-attention/blob/01c4202e19990759eb9459c4ed1ed613ef779018/README.md"
FLASHINFER = "https://github.com/flashinfer-ai/flashinfer/pull/3866"
OURS = "docs/results/kernels_h200.txt"
CONFIGS = 12  # of an autotuned kernel that are compiled


@dataclass(frozen=True)
class Published:
    """A measured time of one of fla's operators, bf16, dims of 128.

    Attributes:
        op: "gated_delta_rule", "simple_gla" or "retention" (simple_gla with a constant decay a head).
        batch, tokens, groups, heads: groups of queries and keys. backward: with it. ms: the published time.
    """

    op: str
    gpu: str
    batch: int
    tokens: int
    groups: int
    heads: int
    backward: bool
    ms: float
    source: str


PUBLISHED = (
    Published("gated_delta_rule", "h100", 1, 16384, 2, 8, False, 0.508, FLASHINFER),
    Published("gated_delta_rule", "h100", 1, 65536, 2, 8, False, 1.954, FLASHINFER),
    Published("retention", "h100", 2, 16384, 16, 16, False, 0.868, HELION),
    Published("retention", "h100", 2, 16384, 16, 16, True, 2.776, HELION),
    Published("retention", "h100", 1, 8192, 96, 96, False, 0.961, HELION),
    Published("retention", "h100", 1, 8192, 96, 96, True, 3.426, HELION),
    Published("simple_gla", "h200", 1, 32768, 16, 16, False, 0.864, OURS),
    Published("simple_gla", "h200", 1, 32768, 16, 16, True, 3.267, OURS),
    Published("simple_gla", "b200", 2, 16384, 16, 16, False, 0.556, HELION),
    Published("simple_gla", "b200", 2, 16384, 16, 16, True, 2.255, HELION),
    Published("gated_delta_rule", "b200", 2, 16384, 16, 16, False, 1.029, FLA),
    Published("gated_delta_rule", "b200", 2, 16384, 16, 16, True, 3.616, FLA),
)


class _Properties:
    def __init__(self, shared: int, processors: int) -> None:
        self.found = {"max_shared_mem": shared - 1024, "multiprocessor_count": processors}

    def get_device_properties(self, index: int) -> dict[str, int]:
        return self.found


@contextlib.contextmanager
def pretended(arch: int) -> Iterator[None]:
    """fla is imported, inside, as on a GPU of this architecture: it chooses tiles from what it finds at import."""
    from triton.runtime import driver

    from megatron_dla.kernels.aot.compile import stub_driver

    gpu, stub = GPUS[OF_ARCH[arch]], stub_driver(arch)
    stub.utils = _Properties(gpu.shared, gpu.processors)
    before = {name: getattr(torch.cuda, name) for name in ("get_device_name", "get_device_capability", "device_count")}
    driver.set_active(stub)
    torch.cuda.get_device_name = lambda *args: f"NVIDIA {gpu.name}"  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *args: (arch // 10, arch % 10)  # type: ignore[assignment]
    torch.cuda.device_count = lambda: 1  # type: ignore[assignment]
    try:
        output = importlib.import_module("fla.ops.common.chunk_o")
        output.TRITON_ABOVE_3_7_1 = True  # type: ignore[attr-defined]  # else it refuses to be compiled by Triton 3.6
        yield
    finally:
        for name, function in before.items():
            setattr(torch.cuda, name, function)


@contextlib.contextmanager
def tuned_by_prediction(recording: Recording, gpu: str) -> Iterator[None]:
    """An autotuned launch is recorded in the configuration whose predicted time is the least."""
    from triton.runtime.autotuner import Autotuner

    stock, best = Autotuner.run, {}

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs = self.prune_configs(kwargs)
        key = (self.base_fn.__name__, str([getattr(x, "shape", x) for x in args]), str(kwargs.keys()))
        begin = len(recording.events)
        if key not in best:
            stages = sorted({c.num_stages for c in configs})
            few = [c for c in configs if c.num_stages == stages[len(stages) // 2]]
            times = {}
            for config in few[-CONFIGS:]:
                self.fn.run(*args, **kwargs, **config.all_kwargs())
                event = recording.events.pop()
                report = event.launch.report
                if report is not None and report.ok:
                    times[config] = predict(event, GPUS[gpu])
            best[key] = min(times, key=lambda c: times[c]) if times else few[0]
        del recording.events[begin:]
        result = self.fn.run(*args, **kwargs, **best[key].all_kwargs())
        self.nargs = None
        return result

    Autotuner.run = run
    try:
        yield
    finally:
        Autotuner.run = stock


def run_operator(p: Published) -> None:
    """One call on meta tensors."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(p.batch, p.tokens, *shape, dtype=dtype, device="meta", requires_grad=p.backward)

    q, k, v, g = new(p.groups, 128), new(p.groups, 128), new(p.heads, 128), new(p.heads, dtype=torch.float32)
    if p.op == "gated_delta_rule":
        op = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        out = op(q, k, v, g=g, beta=new(p.heads, dtype=torch.float32))[0]
    else:
        op = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
        decay = {"g": g} if p.op == "simple_gla" else {"g_gamma": torch.empty(p.heads, device="meta")}
        out = op(q, k, v, **decay)[0]
    if p.backward:
        out.backward(torch.empty_like(out))


def compare(p: Published) -> dict[str, Any]:
    """Published and predicted time, and the launches that the prediction is the sum of."""
    gpu = GPUS[p.gpu]
    with record(ARCH[p.gpu]) as recording, tuned_by_prediction(recording, p.gpu):
        run_operator(p)
    seconds = [predict(e, gpu) for e in recording.events]
    launches = [
        {"kernel": e.name, "grid": e.launch.grid, "ms": 1e3 * s, "limit": predict_launch(e.launch, gpu).limit}
        for e, s in zip(recording.events, seconds, strict=True)
        if e.kind == "triton"
    ]
    predicted = 1e3 * sum(seconds)
    return {**asdict(p), "predicted_ms": predicted, "ratio": predicted / p.ms, "launches": launches}


def dla_operator(
    gdn: bool, slots: int, name: str, tokens: int = 16384, heads: int = 16, dim: int = 128
) -> dict[str, Any]:
    """Predicted parts of one call of our operator, forward and backward, at B = 1."""
    from ...dla import dla_attention

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(1, tokens, *shape, dtype=dtype, device="meta", requires_grad=True)

    wide, groups = torch.float32, heads if gdn else 1
    beta = new(heads, dtype=wide) if gdn else None
    with record(90) as recording:
        out, _ = dla_attention(
            new(groups, dim), new(groups, dim), new(heads, dim), new(heads, dtype=wide),
            new(heads, slots, dtype=wide), beta, tau=1.0, capacity=slots, backend="triton",
        )  # fmt: skip
        out.backward(torch.empty_like(out))
    parts = {"partition": 0.0, "forward": 0.0, "backward": 0.0}
    for event in recording.events:
        part = "partition" if event.component == PARTITION else "backward" if event.backward else "forward"
        parts[part] += 1e3 * predict(event, GPUS[name])
    return {
        "backbone": "gdn" if gdn else "mamba2", "slots": slots, "gpu": name, "tokens": tokens,
        "predicted_ms": sum(parts.values()),
        "parts_ms": parts, "partition_share": parts["partition"] / (parts["partition"] + parts["forward"]),
        "launches": sum(e.kind == "triton" for e in recording.events),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_dla.kernels.bench.ledger.peers", description=__doc__)
    parser.add_argument("--arch", type=int, choices=(90, 100), required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default: runs/bench")
    args = parser.parse_args(argv)
    gpus = [name for name, arch in ARCH.items() if arch == args.arch]
    found = []
    with pretended(args.arch):
        for p in PUBLISHED:
            if p.gpu not in gpus:
                continue
            found.append(compare(p))
            one = found[-1]
            what = f"{p.op} B{p.batch} T{p.tokens} H{p.heads} {'fwd+bwd' if p.backward else 'fwd'} {p.gpu}"
            print(f"{what}: published {p.ms:.3f} ms, predicted {one['predicted_ms']:.3f} ms, x{one['ratio']:.2f}")
            for launch in one["launches"]:
                print(
                    f"    {launch['kernel']:50s} {launch['ms']:7.3f} ms {launch['limit']} {launch['grid']}", flush=True
                )
    cases = [(gdn, slots, name) for name in gpus if args.arch == 90 for gdn in (False, True) for slots in (30, 15)]
    ours = [dla_operator(*case) for case in cases]
    for one in ours:
        text = f"DLA {one['backbone']} K{one['slots']} {one['gpu']}: predicted {one['predicted_ms']:.1f} ms"
        print(f"{text}, partition {one['partition_share']:.0%} of the forward")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"ledger_peers_sm{args.arch}.json"
    path.write_text(json.dumps({"constants": fingerprint(), "operators": found, "dla": ours}, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
