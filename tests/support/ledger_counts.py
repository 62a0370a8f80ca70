"""`python -m tests.support.ledger_counts`: what the ledger counts of small shapes and of the shipped configs, as JSON.

In a process of its own, without TRITON_INTERPRET: launches are recorded, and Megatron is set up for `meta` tensors.
"""

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from megatron_dla.kernels.bench.ledger.record import record
from megatron_dla.kernels.bench.ledger.report import facts
from megatron_dla.kernels.bench.ledger.run import count, ledger_config
from megatron_dla.kernels.dla import SlotCache, decode_step, dla_attention

ROOT = Path(__file__).resolve().parents[2]


@triton.jit
def two_tensors_kernel(x, y, again, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n, other=0.0) + tl.load(again + o, mask=o < n, other=0.0), mask=o < n)


def one_launch() -> dict:
    x, y = torch.empty(1000, device="meta"), torch.empty(1000, device="meta", dtype=torch.bfloat16)
    with record() as recording:
        two_tensors_kernel[(triton.cdiv(1000, 64),)](x, y, x, 1000, BLOCK=64)
    (event,) = recording.events
    return {"name": event.name, "bytes": event.bytes, "programs": event.launch.programs, "kind": event.kind}


def kernels(gdn: bool, tokens: int = 16384, heads: int = 16, dim: int = 128, slots: int = 30) -> dict:
    """Triton launches of one call, with the partition, forward and backward."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(1, tokens, *shape, dtype=dtype, device="meta", requires_grad=True)

    low, groups = torch.bfloat16, heads if gdn else 1
    q, k, v = (new(n, dim, dtype=low) for n in (groups, groups, heads))
    beta = new(heads) if gdn else None
    with record() as recording:
        out, _ = dla_attention(q, k, v, new(heads), new(heads, slots), beta, tau=1.0, capacity=slots, backend="triton")
        out.backward(torch.empty_like(out))
    launches = [e for e in recording.events if e.kind == "triton"]
    parts = {e.component: 0 for e in launches}
    for event in launches:
        parts[event.component] += 1
    return {"launches": len(launches), "backward": sum(e.backward for e in launches), "components": parts}


def decoded(gdn: bool, tokens: int = 3, heads: int = 4, dim: int = 64, slots: int = 30) -> list:
    """What each of some tokens does one after another: (kind, name, bytes, grid) of every event."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(2, 1, *shape, dtype=dtype, device="meta")

    cache, low = SlotCache.empty(2, heads, slots, dim, dim, device="meta"), torch.bfloat16
    q, k, v = (new(heads, dim, dtype=low) for _ in range(3))
    beta = new(heads) if gdn else None
    found = []
    for _ in range(tokens):
        with record() as recording, torch.no_grad():
            weights = new(heads, slots)
            decode_step(q, k, v, new(heads), weights, cache, beta, tau=1.0, capacity=slots, backend="triton")
        grids = [None if e.launch is None else list(e.launch.grid) for e in recording.events]
        found.append([(e.kind, e.name, e.bytes, grid) for e, grid in zip(recording.events, grids, strict=True)])
    return found


def main() -> None:
    found = {"launch": one_launch(), "mamba2": kernels(False), "gdn": kernels(True)}
    found["decoded"] = [decoded(False), decoded(True)]
    for path in sys.argv[1:]:
        config = ledger_config(ROOT / "configs" / f"{path}.yaml")
        found[path] = facts(config, count(config), None)
        for kept in ("true", "false"):
            config = ledger_config(ROOT / "configs" / f"{path}.yaml", overrides=[f"training.keep_states={kept}"])
            found[f"{path}, keep_states={kept}"] = facts(config, count(config), None)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
