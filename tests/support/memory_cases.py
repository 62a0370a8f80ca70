"""Inputs of δ-mem's scan with what is easy to get wrong in them, runs with every gradient, and the debug."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dla.kernels.delta_mem import delta_mem_scan
from megatron_dla.kernels.dla import debug

FORMS = ("coupled", "uncoupled", "lambda_outside", "no_lambda")
Scan = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """One problem. `edges`: some tokens have beta exactly 0 or 1. `flagged`: resets and masked writes at random."""

    B: int = 1
    T: int = 37
    N: int = 1
    r: int = 8
    form: str = "coupled"
    flagged: bool = True
    edges: bool = True
    seed: int = 0

    def make(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """The arguments of `delta_mem_scan`; flags as bool, states at least fp32, the rest in `dtype`."""
        gen = torch.Generator().manual_seed(self.seed)
        B, T, N, r = self.B, self.T, self.N, self.r

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen, dtype=torch.float64)

        x = {name: torch.nn.functional.normalize(randn(B, T, N, r).tanh(), dim=-1) for name in ("q", "k")}
        x |= {"v": randn(B, T, N, r), "beta": (randn(B, T, N, r) - 1).sigmoid()}
        if self.edges:
            x["beta"][:, T // 2, :, ::2], x["beta"][:, T // 3] = 1.0, 0.0
        if self.form in ("uncoupled", "lambda_outside"):
            x["keep"] = (randn(B, T, N, r) + 1).sigmoid()
        if self.form == "lambda_outside":
            x["erase"] = x["keep"] * x["beta"]
        if self.form == "no_lambda":
            x["keep"] = torch.ones(B, T, N, r, dtype=torch.float64)
        x = {name: value.to(dtype) for name, value in x.items()}
        x["initial_state"] = randn(B, N, r, r).to(torch.promote_types(dtype, torch.float32))
        if self.flagged:
            x["reset"] = torch.rand(B, T, generator=gen) < 0.1
            x["reset"][:, 3 * T // 4] = True
            x["write_mask"] = torch.rand(B, T, generator=gen) < 0.7
        return x

    def cotangents(self) -> tuple[Tensor, Tensor]:
        """Of the reads and of the final state, float64."""
        gen = torch.Generator().manual_seed(self.seed + 77)
        shapes = (self.B, self.T, self.N, self.r), (self.B, self.N, self.r, self.r)
        return tuple(torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def run(x: dict[str, Any], cotangents: tuple[Tensor, Tensor], scan: Scan = delta_mem_scan, **options: Any):
    """reads, state and the gradient of every floating-point argument ("dq", ...) under the cotangents."""
    leaves = {name: y.detach().clone().requires_grad_() for name, y in x.items() if y.is_floating_point()}
    reads, state = scan(**(x | leaves), **options)
    outs = [c.to(y) for c, y in zip(cotangents, (reads, state), strict=True)]
    grads = torch.autograd.grad([reads, state], list(leaves.values()), outs)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"reads": reads.detach(), "state": state.detach(), **named}


def doubled(x: dict[str, Any]) -> dict[str, Any]:
    return {name: y.double() if y.is_floating_point() else y for name, y in x.items()}


def assert_exact(x: dict[str, Any], cotangents: tuple[Tensor, Tensor], limit: float = 1e-12, **options: Any) -> None:
    """float64 results and gradients equal the recurrence's."""
    want, got = run(x, cotangents, backend="naive"), run(x, cotangents, **options)
    for name, value in want.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        assert bool(got[name].isfinite().all()), name
        assert debug.relative_rms(got[name], value) < limit, name


def assert_gates(got: dict[str, Tensor], x: dict[str, Any], cotangents: tuple[Tensor, Tensor], oracle: Scan) -> None:
    """`got`, a run on `x` (fp32, bf16), passes the kernels' gates against `oracle` in float64 and torch on `x`."""
    want = run(doubled(x), cotangents, scan=oracle)
    theirs = run(x, cotangents, backend="torch")
    lines, failed = [], []
    for name, value in got.items():
        # reads and states are fp32 whatever the inputs; gradients have their input's type
        limit = {"dkeep": "dg", "derase": "dg"}.get(name, name)
        ok, line = debug.verdict(
            limit, value, want[name], theirs[name], dtype=value.dtype, backward=name.startswith("d")
        )
        lines.append(("  " if ok else "! ") + name + " as " + line)
        failed += [] if ok else [name]
        assert value.dtype == theirs[name].dtype, name
    assert not failed, f"{', '.join(failed)} failed\n" + "\n".join(lines)


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    keep: Tensor | None = None,
    erase: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    write_mask: Tensor | None = None,
    mutation: str = "",
) -> tuple[Tensor, Tensor]:
    """The definition once more, from the equations with matrices spelled out; `mutation` breaks one thing."""
    B, T, N, r = v.shape
    keep, erase = 1 - beta if keep is None else keep, beta if erase is None else erase
    state = v.new_zeros(B, N, r, r) if initial_state is None else initial_state
    reads = []
    for t in range(T):
        if reset is not None and mutation != "drop the reset":
            state = state * (~reset[:, t, None, None, None])
        outer = k[:, t, :, :, None] * k[:, t, :, None, :]
        diag_keep, diag_erase, diag_write = (torch.diag_embed(x[:, t]) for x in (keep, erase, beta))
        if mutation == "gate by column":
            after = (
                state @ diag_keep - state @ outer @ diag_erase + v[:, t, :, :, None] * k[:, t, :, None, :] @ diag_write
            )
        else:
            before = diag_keep @ state if mutation == "predict after the decay" else state
            after = (
                diag_keep @ state - diag_erase @ before @ outer + diag_write @ v[:, t, :, :, None] * k[:, t, :, None]
            )
        if write_mask is not None and mutation != "ignore the mask":
            after = torch.where(write_mask[:, t, None, None, None], after, state)
        read_from = after if mutation == "write before read" else state
        reads.append((read_from @ q[:, t, :, :, None]).squeeze(-1))
        state = after
    return torch.stack(reads, 1), state


MUTATIONS = ("write before read", "gate by column", "drop the reset", "ignore the mask", "predict after the decay")
