"""Numeric gates of a kernel: a fixed limit, and no worse than torch in the same precision. Nothing weakens them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dla.kernels.dla import Partition, SlotCache, dla_attention

# relative RMS error against float64 on the same inputs, for bf16 and fp16
LIMITS = {
    "o": 0.005,
    "dq": 0.008,
    "dk": 0.008,
    "dv": 0.008,
    "dg": 0.02,
    "dbeta": 0.02,
    "dslot_weights": 0.02,
    "dtau": 0.02,
    "states": 0.005,
    "dstates": 0.008,
}
FP32_LIMIT = 1e-5
# How far the error may exceed that of torch in the same precision.
FACTOR = {False: 2.0, True: 3.0}  # forward, backward
# Errors below this are never worse than torch's. Rounding an exact result to a 16-bit type already costs an RMS of
# about 0.2 eps (an error uniform in half an ulp either way, over a random mantissa). In fp32 two orders of the same sum
# differ by a few eps, and which of two such errors is larger says nothing about a kernel.
FLOOR_EPS = {torch.bfloat16: 0.25, torch.float16: 0.25, torch.float32: 4.0}

_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
_ADDED_MATMULS = (torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default)


class RoundedMatmuls(TorchDispatchMode):
    """Every matmul rounds its operands to `dtype` and accumulates in its own: what tensor cores do to torch's fp32.

    A product with a matrix of zeros and ones only moves rows (the chunkwise form moves its states so), and is exact.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        first = 0 if func in _MATMULS else 1 if func in _ADDED_MATMULS else None
        if first is not None:
            operands = args[first : first + 2]
            if not any(bool(((x == 0) | (x == 1)).all()) for x in operands):
                operands = tuple(x.to(self.dtype).to(x.dtype) for x in operands)
            args = (*args[:first], *operands, *args[first + 2 :])
        return func(*args, **(kwargs or {}))


def run(
    inputs: dict[str, Tensor],
    cotangent: Tensor,
    *,
    partition: Partition,
    backend: str,
    tau: float | Tensor,
    states_cotangent: Tensor | None = None,
    cache: SlotCache | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Forward and backward of `dla_attention`, decisions given: "o", "dq", ... by the names of `LIMITS`.

    Args:
        inputs: q, k, v, g, slot_weights and perhaps beta, as `dla_attention`; dtypes are kept.
        cotangent: [B, T, H, Dv]. states_cotangent: [B, H, K, Dk, Dv]; gives "states", the final memory, too.
        tau: a tensor that requires a gradient gives "dtau"; a cache gives "dstates".
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    wanted = dict(leaves)
    if isinstance(tau, Tensor) and tau.requires_grad:
        tau = wanted["tau"] = tau.detach().clone().requires_grad_()
    if cache is not None:
        cache = cache.clone()
        cache.states = wanted["states"] = cache.states.detach().requires_grad_()
    rule = dict(partition=partition, backend=backend, tau=tau, cache=cache, **kwargs)
    out, final = dla_attention(**leaves, **rule, return_cache=states_cotangent is not None)
    results, outs, cotangents = {"o": out.detach()}, [out], [cotangent.to(out.dtype)]
    if states_cotangent is not None and final is not None:
        results["states"] = final.states.detach()
        outs, cotangents = [out, final.states], [*cotangents, states_cotangent.to(final.states.dtype)]
    grads = torch.autograd.grad(outs, list(wanted.values()), cotangents, allow_unused=True)
    for (name, x), grad in zip(wanted.items(), grads, strict=True):
        results[f"d{name}"] = torch.zeros_like(x) if grad is None else grad
    return results


def oracle(inputs: dict[str, Tensor], cotangent: Tensor, **rule: Any) -> dict[str, Tensor]:
    """`run` in float64 on the values of `inputs` (the torch path, which equals the recurrence to 1e-10)."""
    if isinstance(tau := rule["tau"], Tensor):
        rule["tau"] = tau.detach().double().requires_grad_(tau.requires_grad)
    if rule.get("cache") is not None:
        rule["cache"] = rule["cache"].clone()
        rule["cache"].states = rule["cache"].states.double()
    rule["backend"] = "torch"
    return run({name: x.double() for name, x in inputs.items()}, cotangent.double(), **rule)


def same_dtype_torch(
    inputs: dict[str, Tensor], cotangent: Tensor, *, dtype: torch.dtype, **rule: Any
) -> dict[str, Tensor]:
    """`run` of the torch path with the arithmetic of a GPU: in bf16 and fp16 every matmul operand is rounded to it."""
    rule["backend"] = "torch"
    if dtype == torch.float32:
        return run(inputs, cotangent, **rule)
    with RoundedMatmuls(dtype):
        return run(inputs, cotangent, **rule)


def relative_rms(got: Tensor, want: Tensor) -> float:
    """rms(got - want) / rms(want) in float64; where `want` is zero, rms(got): inputs are of the order of 1."""
    want = want.detach().double()
    gap = (got.detach().to(want.device).double() - want).square().mean().sqrt().item()
    scale = want.square().mean().sqrt().item()
    return gap / scale if scale > 1e-30 else gap


def verdict(
    name: str,
    got: Tensor,
    oracle: Tensor,
    same_dtype_torch: Tensor | None = None,
    *,
    dtype: torch.dtype,
    backward: bool,
    fp32_inside: Tensor | None = None,
) -> tuple[bool, str]:
    """Whether `got` passes, and one line of numbers; arguments as `check`."""
    if got.shape != oracle.shape:
        return False, f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    if not bool(got.isfinite().all()):
        return False, f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} values are NaN or infinite"
    limit = FP32_LIMIT if dtype == torch.float32 else LIMITS[name]
    error = relative_rms(got, oracle)
    ok, line = error <= limit, f"{name}: relative RMS error {error:.2e}, limit {limit:.0e}"
    if same_dtype_torch is not None:
        theirs, factor = relative_rms(same_dtype_torch, oracle), FACTOR[backward]
        allowed = max(factor * theirs, FLOOR_EPS[dtype] * torch.finfo(dtype).eps)
        ok = ok and error <= allowed
        line += f"; {error / max(theirs, 1e-30):.2f} x torch in {dtype} ({theirs:.2e}; allowed {allowed:.2e})"
    if fp32_inside is not None:
        line += f"; {error / max(relative_rms(fp32_inside, oracle), 1e-30):.2f} x torch with fp32 inside"
    return ok, line


def check(
    name: str,
    got: Tensor,
    oracle: Tensor,
    same_dtype_torch: Tensor | None = None,
    *,
    dtype: torch.dtype,
    backward: bool,
    fp32_inside: Tensor | None = None,
) -> None:
    """Assert both gates for one tensor.

    Args:
        name: a key of `LIMITS`. got: the kernel's result. oracle: float64, on the same (rounded) inputs.
        same_dtype_torch: torch's result in that precision, see the function; None skips that gate.
        dtype: bfloat16, float16 or float32, what the kernel computes in.
        fp32_inside: `backend="torch"` on the same inputs, only for the message.
    """
    ok, line = verdict(name, got, oracle, same_dtype_torch, dtype=dtype, backward=backward, fp32_inside=fp32_inside)
    assert ok, line


def check_all(inputs: dict[str, Tensor], cotangent: Tensor, *, dtype: torch.dtype, backend: str, **rule: Any) -> None:
    """Run `backend` and every reference on `inputs`, and assert all gates at once; arguments as `run`."""
    got = run(inputs, cotangent, backend=backend, **rule)
    want = oracle(inputs, cotangent, **rule)
    torch_path = same_dtype_torch(inputs, cotangent, dtype=dtype, **rule)
    inside = run(inputs, cotangent, backend="torch", **rule)
    failed, lines = [], []
    for name, value in got.items():
        gates = dict(dtype=dtype, backward=name.startswith("d"), fp32_inside=inside[name])
        ok, line = verdict(name, value, want[name], torch_path[name], **gates)  # type: ignore[arg-type]
        lines.append(("  " if ok else "! ") + line)
        failed += [] if ok else [name]
    assert not failed, f"{', '.join(failed)} failed\n" + "\n".join(lines)
