"""The two numbers first: floating-point operations and bytes that no version can avoid, and this device's ceilings."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from .inputs import Problem
from .timing import Stopwatch


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same run: TFLOP/s of a large bf16 matrix product, TB/s of a large copy (read + written)."""

    tflops: float
    tbytes: float

    def floor_ms(self, flops: float, moved: float) -> float:
        """No version runs faster than the larger of arithmetic and traffic."""
        return 1e3 * max(flops / (self.tflops * 1e12), moved / (self.tbytes * 1e12))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure_ceilings(watch: Stopwatch) -> Ceilings:
    """A matrix product and a copy large enough to fill the device, on random data (zeros run faster)."""
    cuda = watch.device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=watch.device, dtype=dtype) for _ in range(2))
    tflops = 2 * size**3 / watch.measure(lambda: a @ b).ms / 1e9
    source = torch.randn(1 << (29 if cuda else 24), device=watch.device)
    target = torch.empty_like(source)
    tbytes = 2 * source.nbytes / watch.measure(lambda: target.copy_(source)).ms / 1e9
    return Ceilings(tflops, tbytes)


@dataclass(frozen=True)
class Work:
    """Least operations and bytes of a forward pass, and of forward and backward together."""

    forward_flops: float
    forward_bytes: float
    both_flops: float
    both_bytes: float


def dla_work(p: Problem, live: float, element: int) -> Work:
    """DLA with `live` slots in use on average; `element` bytes a number of q, k, v and the output.

    Arithmetic: each query is contracted with every live state (2 live D^2) and each token written once (2 D^2); what a
    chunked form adds (the part inside a chunk, transitions of the delta rule) is not unavoidable and not counted. Twice
    that again for the backward pass. Traffic: each input read once and each output written once; the backward pass
    reads the inputs and the output's gradient and writes a gradient for each input.
    """
    tokens = p.batch * p.tokens
    flops = tokens * p.heads * 2 * p.dim**2 * (live + 1)
    inputs = tokens * (element * p.dim * (2 * p.groups + p.heads) + 4 * p.heads * (1 + p.capacity))
    inputs += 4 * tokens * p.heads * (p.backbone == "gdn")
    output = tokens * element * p.heads * p.dim
    return Work(flops, inputs + output, 3 * flops, 3 * inputs + 2 * output)


def softmax_work(p: Problem, element: int) -> Work:
    """Causal softmax attention: half of 4 T^2 D a head, 3.5 times that with the backward pass."""
    flops = 2.0 * p.batch * p.heads * p.tokens**2 * p.dim
    tensor = element * p.batch * p.tokens * p.heads * p.dim
    return Work(flops, 4 * tensor, 3.5 * flops, 4 * tensor + 8 * tensor)


def partition_bytes(p: Problem, element: int) -> float:
    """k, v, g (and beta) read once; start, death and score written once."""
    tokens = p.batch * p.tokens
    read = element * p.dim * (p.groups + p.heads) + 4 * p.heads * (1 + (p.backbone == "gdn"))
    return tokens * (read + 9 * p.heads)
