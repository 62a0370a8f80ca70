"""The fused passes under the interpreter (on a GPU: compiled) against torch in float64: results and every gradient."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from megatron_dla.mixers import functional
from tests.support import triton_interpreter

pytest.importorskip("triton")
from megatron_dla.kernels.fused import inputs, loss, norm, packed
from megatron_dla.kernels.fused.inputs import Shape, recurrence_inputs
from megatron_dla.kernels.fused.norm import gated_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LIMIT = {FP32: 2e-6, BF16: 3e-3, FP16: 4e-4}  # relative RMS error
Results = list[torch.Tensor]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, programs and columns of a head in a few dozen tokens."""
    for module in (inputs, norm):
        monkeypatch.setattr(module, "TILE", 16 * 64)
        monkeypatch.setattr(module, "BACKWARD_TILE", 8 * 64)
    monkeypatch.setattr(norm, "TILES", 2)
    monkeypatch.setattr(inputs, "SPAN", 16)
    monkeypatch.setattr(inputs, "VALUE_COLUMNS", 16)
    monkeypatch.setattr(inputs, "COLUMNS", 64)


def random(seed: int) -> Callable[..., torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=gen).to(DEVICE)


def check(names: list[str], got: Results, want: Results, low: Results, dtype: torch.dtype) -> None:
    """Near to float64, and no worse than torch's operations in the same precision."""
    bad = {}
    for name, x, exact, torchs in zip(names, got, want, low, strict=True):
        assert x.dtype == torchs.dtype or name in ("q", "k"), name
        error, other = (((y.double() - exact).norm() / exact.norm()).item() for y in (x, torchs))
        limit = LIMIT[dtype if x.dtype == dtype else FP32]
        if not error <= min(limit, max(2 * other, limit / 2)):
            bad[name] = f"{error:.1e}, torch {other:.1e}"
    assert not bad, bad


@dataclass
class Case:
    """One mixer; `starts`: first tokens of documents in each of the two rows, counted from the halo's first."""

    shape: Shape
    dtype: torch.dtype = FP32
    T: int = 25
    biased: bool = False
    packed: bool = True  # the sections are parts of one projection, as Megatron's: [T, B, columns]
    starts: tuple[tuple[int, ...], ...] = ()

    @property
    def names(self) -> list[str]:
        return ["value", "query", "key", "step", *(["strength"] if self.shape.gdn else []), "slot"]

    def make(self) -> list[torch.Tensor]:
        """Leaves: the projection (or its sections), convolutions, gates, biases."""
        s, randn = self.shape, random(3)
        widths = [n for n in s.columns if n]
        if self.packed:
            xs = [randn(s.halo + self.T, 2, 5 + sum(widths)).transpose(0, 1)]
        else:
            halos = [s.halo if name in ("value", "query", "key") else 0 for name in self.names]
            xs = [randn(2, halo + self.T, n) for halo, n in zip(halos, widths, strict=True)]
        channels = s.columns[:3]
        convolutions = [randn(n, s.width) * 0.5 for n in channels]
        biases = [randn(n) for n in channels] if self.biased else []
        gates = [randn(s.heads), randn(s.heads) - 3, randn(s.heads, s.capacity), randn(s.heads, s.capacity)]
        return [*(x.to(self.dtype) for x in (*xs, *convolutions)), *gates, *(x.to(self.dtype) for x in biases)]

    def flags(self) -> torch.Tensor | None:
        if not self.starts:
            return None
        flags = torch.zeros(2, self.shape.halo + self.T, dtype=torch.bool, device=DEVICE)
        for row, at in zip(flags, self.starts, strict=True):
            row[list(at)] = True
        return flags

    def parts(self, leaves: list[torch.Tensor]):
        count, halo = 1 if self.packed else len(self.names), self.shape.halo
        sections = list(leaves[:count])
        if self.packed:
            sections = list(leaves[0][..., 5:].split([n for n in self.shape.columns if n], -1))
            sections[3:] = [x[:, halo:] for x in sections[3:]]
        rest = leaves[count:]
        biases = rest[7:] or [None] * 3
        return dict(zip(self.names, sections, strict=True)), rest[:3], biases, rest[3:7]

    def fused(self, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return recurrence_inputs(*self.parts(leaves), self.shape, self.flags())

    def in_torch(self, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        part, convolutions, biases, (A_log, dt_bias, scale, bias) = self.parts(leaves)
        s, flags = self.shape, self.flags()
        document = None if flags is None else flags.cumsum(1)
        convolved = zip(("value", "query", "key"), convolutions, biases, strict=True)
        xs = [functional.short_convolution(part[n], w, document, bias=b)[:, s.halo :] for n, w, b in convolved]
        value, q, k = (x.unflatten(-1, (-1, n)) for x, n in zip(xs, (s.value_dim, s.key_dim, s.key_dim), strict=True))
        weights = functional.slot_weights(part["slot"].unflatten(-1, (-1, s.capacity)), scale, bias)
        if s.gdn:
            q, k, g, beta = functional.gdn_inputs(q, k, part["step"], part["strength"], A_log, dt_bias)
            return q, k, value, g, weights, beta
        write, g = functional.mamba2_inputs(value, part["step"], A_log, dt_bias)
        return q, k, write, g, weights, value


def run(function: Callable, leaves: list[torch.Tensor], dtype: torch.dtype, unused: int | None = None) -> Results:
    """Results and gradients, with a random cotangent of this precision."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    outs, randn = function(leaves), random(4)
    outs = [x for i, x in enumerate(outs) if i != unused]
    torch.autograd.backward(outs, [randn(*x.shape).to(dtype).to(x.dtype) for x in outs])
    return [*(x.detach() for x in outs), *(x.grad for x in leaves)]


MAMBA = Shape(heads=4, groups=2, value_dim=24, key_dim=16, capacity=5, width=4)
GDN = Shape(heads=4, groups=2, value_dim=20, key_dim=12, capacity=3, width=4, gdn=True)
DOCUMENTS = ((0, 1, 2, 20, 22), (0, 17))
CASES = {
    "mamba2": Case(MAMBA, starts=DOCUMENTS),
    "mamba2, halo, biases": Case(replace(MAMBA, halo=3), packed=False, biased=True, starts=((2, 3), (0, 20))),
    "mamba2, no documents": Case(replace(MAMBA, width=3), T=2),
    "gdn": Case(GDN, starts=DOCUMENTS, biased=True),
    "gdn, halo": Case(replace(GDN, halo=3, groups=4), starts=((3,), (0, 4))),
    "gdn, one tap": Case(replace(GDN, width=1), packed=False),
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, FP32) for name in CASES), ("mamba2", BF16), ("gdn, halo", BF16)])
def test_inputs_of_the_recurrence(name: str, dtype: torch.dtype) -> None:
    case = replace(CASES[name], dtype=dtype)
    leaves = case.make()
    want = run(case.in_torch, [x.double() for x in leaves], dtype)
    names = ["q", "k", "v", "g", "weights", "last", *(f"leaf {i}" for i in range(len(leaves)))]
    check(names, run(case.fused, leaves, dtype), want, run(case.in_torch, leaves, dtype), dtype)


def test_what_has_no_gradient_counts_as_zero() -> None:
    """The skip's values go nowhere, as with Mamba-2 models without a skip."""
    case = CASES["mamba2"]
    leaves = case.make()
    want = run(case.in_torch, [x.double() for x in leaves], FP32, unused=5)
    got = run(case.fused, leaves, FP32, unused=5)
    check([str(i) for i in range(len(got))], got, want, run(case.in_torch, leaves, FP32, unused=5), FP32)


@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_are_put_together_where_they_are_written(rows: int) -> None:
    """Of a projection with its gate: the same bits as from parts of their own, without a copy of them."""
    sizes = {"gate": 96, **dict(zip(CASES["mamba2"].names, (n for n in MAMBA.columns if n), strict=True))}
    case, randn = CASES["mamba2"], random(8)
    *convolutions, A_log, dt_bias, scale, bias = case.make()[1:]
    projection, weight, D = randn(23, rows, sum(sizes.values())), randn(24), randn(4)
    taken = []

    def gradient_of(gradient: packed.PackedGradient | None) -> torch.Tensor:
        x = projection.transpose(0, 1).detach().requires_grad_()
        parts = x.split(list(sizes.values()), -1) if gradient is None else packed.split(x, gradient)
        gate, *rest = parts
        sections = dict(zip(case.names, rest, strict=True))
        given = sections, convolutions, [None] * 3, [A_log, dt_bias, scale, bias]
        q, k, v, g, weights, value = recurrence_inputs(*given, MAMBA, None, gradient)
        heads = gate.unflatten(-1, (4, 24))
        y = gated_norm(v, heads, weight, 1e-5, gate_first=True, skip=value, D=D, gradient=gradient)
        sum(z.square().sum() for z in (y, q, k, g, weights)).backward()
        return x.grad

    def take(self: packed.PackedGradient, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        taken.append({name: packed._same_memory(x, self.parts[name]) for name, x in gradients.items()})
        return stock(self, gradients)

    stock = packed.PackedGradient.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed.PackedGradient, "take", take)
        got = gradient_of(packed.PackedGradient(sizes))
    assert taken == [dict.fromkeys(sizes, True)]
    assert torch.equal(got, gradient_of(None))


def test_a_part_that_another_pass_computed_is_copied() -> None:
    gradient, x = packed.PackedGradient({"a": 2, "b": 3, "c": 1}), random(9)(2, 4, 6).requires_grad_()
    for _ in range(2):  # the second backward pass begins anew
        a, b, _ = packed.split(x, gradient)
        x.grad = None
        (a.sum() + 2 * b.sum()).backward()
        assert torch.equal(x.grad, torch.tensor([1.0, 1, 2, 2, 2, 0], device=DEVICE).expand(2, 4, 6))


def test_a_small_dt_keeps_its_digits() -> None:
    """softplus(x) is exp(x) far below zero: 1 + exp(x) would lose it."""
    case = Case(MAMBA, T=8)
    leaves = case.make()
    leaves[5] = torch.full_like(leaves[5], -18.0)  # dt_bias
    got, want = case.fused(leaves)[3], case.in_torch([x.double() for x in leaves])[3]
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_documents_do_not_see_each_other() -> None:
    case = replace(CASES["mamba2"], packed=False)
    leaves = case.make()
    before = case.fused(leaves)
    for x in leaves[:3]:
        x[0, 19] = 100.0  # the last token of a document
    after = case.fused(leaves)
    assert not torch.equal(before[0][0, 19], after[0][0, 19])
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[0, 20:], y[0, 20:]) and torch.equal(x[0, :19], y[0, :19]) and torch.equal(x[1], y[1])


@dataclass
class NormCase:
    gate_first: bool = True
    skip: bool = True
    dtype: torch.dtype = FP32

    def make(self) -> list[torch.Tensor]:
        """out, the projection that has the gate, weight, skip, D."""
        randn, sizes = random(5), (2, 21, 3, 20)
        xs = [randn(*sizes), randn(21, 2, 7 + 60), randn(20), *([randn(*sizes)] if self.skip else [])]
        return [*(x.to(self.dtype) for x in xs), *([randn(3)] if self.skip else [])]

    @staticmethod
    def gate(leaves: list[torch.Tensor]) -> torch.Tensor:
        return leaves[1].transpose(0, 1)[..., 7:].unflatten(-1, (3, 20))

    def fused(self, leaves: list[torch.Tensor]) -> tuple[torch.Tensor]:
        out, _, weight, *more = leaves
        more = dict(zip(("skip", "D"), more, strict=True)) if self.skip else {}
        return (gated_norm(out, self.gate(leaves), weight, 1e-5, gate_first=self.gate_first, **more),)

    def in_torch(self, leaves: list[torch.Tensor]) -> tuple[torch.Tensor]:
        out, _, weight, *more = leaves
        if self.skip:
            out = out + more[1][:, None].to(out.dtype) * more[0]
        return (functional.gated_head_norm(out, self.gate(leaves), weight, 1e-5, gate_first=self.gate_first),)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("gate_first", "skip"), [(True, True), (True, False), (False, False), (False, True)])
def test_gated_norm(gate_first: bool, skip: bool, dtype: torch.dtype) -> None:
    case = NormCase(gate_first, skip, dtype)
    leaves = case.make()
    want, low = run(case.in_torch, [x.double() for x in leaves], dtype), run(case.in_torch, leaves, dtype)
    names = ["y", "dout", "dgate", "dweight", "dskip", "dD"][: len(want)]
    check(names, run(case.fused, leaves, dtype), want, low, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(loss, "BLOCK", 16)
    randn = random(6)
    logits, labels = (4 * randn(3, 5, 37)).to(dtype), torch.arange(15, device=DEVICE).view(3, 5) * 2
    logits[0, 0] += 300.0  # exp overflows

    def stock(leaves: list[torch.Tensor]) -> tuple[torch.Tensor]:
        wide = leaves[0].double() if leaves[0].dtype == torch.float64 else leaves[0].float()
        return (torch.nn.functional.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none").view(3, 5),)

    want, low = run(stock, [logits.double()], FP32), run(stock, [logits], FP32)
    got = run(lambda leaves: (loss.cross_entropy(leaves[0].clone(), labels),), [logits], FP32)
    check(["loss", "dlogits"], got, want, low, dtype)


def test_the_loss_is_differentiated_once() -> None:
    """Its gradient is where the logits were."""
    logits = random(7)(4, 9).requires_grad_()
    losses = loss.cross_entropy(logits.clone(), torch.arange(4, device=DEVICE)).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran already"):
        losses.backward()


@pytest.mark.parametrize("case", [replace(CASES["mamba2"], dtype=BF16), NormCase()], ids=["inputs", "norm"])
def test_same_bits_in_every_run_and_order(case: Case | NormCase) -> None:
    leaves = case.make()
    first = run(case.fused, leaves, case.dtype)
    with triton_interpreter.reversed_programs():
        second = run(case.fused, leaves, case.dtype)
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
