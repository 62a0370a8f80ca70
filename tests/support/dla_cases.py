"""Random DLA inputs (topics, merges, strong decay, packed documents) and comparisons of results."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from megatron_dla.kernels.dla import SlotCache, decode_step, dla_attention

TOLERANCE = 1e-10


@dataclass
class Case:
    """One random problem; `make()` gives float64 leaves on the CPU."""

    name: str
    T: int = 150
    B: int = 2
    H: int = 2
    G: int = 1
    Dk: int = 8
    Dv: int = 6
    tau: float = 1.15
    capacity: int = 5
    chunk_size: int = 32
    decay: float = 0.05
    delta: bool = False
    noise: float = 0.4  # of a token around its topic
    topic: int = 12  # mean length of a run of similar tokens; 0 = white noise
    documents: tuple[int, ...] = field(default=())
    seed: int = 0

    @property
    def cu_seqlens(self) -> torch.Tensor | None:
        if not self.documents:
            return None
        ends = torch.tensor([0, *self.documents, self.B * self.T], dtype=torch.int32)
        assert bool((ends.diff() > 0).all())
        return ends

    def make(self) -> dict[str, torch.Tensor]:
        gen = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=gen, dtype=torch.float64)

        def topics(heads: int, dim: int) -> torch.Tensor:
            if not self.topic:
                return randn(self.B, self.T, heads, dim)
            change = torch.rand(self.B, self.T, generator=gen) < 1 / self.topic
            run = change.long().cumsum(1)
            base = randn(self.B, self.T + 1, heads, dim)
            index = run[..., None, None].expand(-1, -1, heads, dim)
            return base.gather(1, index) + self.noise * randn(self.B, self.T, heads, dim)

        k, v = topics(self.G, self.Dk), topics(self.H, self.Dv)
        q = randn(self.B, self.T, self.G, self.Dk)
        if self.delta:
            k = torch.nn.functional.normalize(k, dim=-1)
        tensors = {
            "q": q,
            "k": k,
            "v": v,
            "g": -self.decay * torch.rand(self.B, self.T, self.H, generator=gen, dtype=torch.float64),
            "slot_weights": 0.5 + torch.rand(self.B, self.T, self.H, self.capacity, generator=gen).double(),
        }
        if self.delta:
            tensors["beta"] = torch.rand(self.B, self.T, self.H, generator=gen, dtype=torch.float64)
        return {name: x.requires_grad_() for name, x in tensors.items()}

    @property
    def rule(self) -> dict:
        return {"tau": self.tau, "capacity": self.capacity, "cu_seqlens": self.cu_seqlens}


_SHAPES = [
    Case("topics with merges"),
    Case("no boundary", tau=2.5, T=90),
    Case("every token a boundary", tau=0.0, T=80),
    Case("white noise, boundaries nearly everywhere", topic=0, tau=1.2, T=100),
    Case("one token", T=1),
    Case("shorter than a chunk", T=20),
    Case("not a multiple of the chunk", T=77, G=2, tau=1.0),
    Case("two slots", capacity=2, T=100),
    Case("strong decay", decay=8.0, T=100),
    Case("packed documents", documents=(30, 31, 100, 128, 200, 270), tau=1.1),
    Case("packed, strong decay, two slots", documents=(64, 96, 150, 203), capacity=2, decay=4.0, tau=0.9),
    Case("capacity 30 exceeded", capacity=30, T=200, B=1, tau=0.7, topic=3),
    Case("wide keys", Dk=20, Dv=3, H=4, G=2, T=70),
]
CASES = [
    Case(**{**case.__dict__, "delta": delta, "seed": i, "name": f"{case.name} ({'gdn' if delta else 'mamba2'})"})
    for i, case in enumerate(_SHAPES)
    for delta in (False, True)
]


def gradients(out: torch.Tensor, inputs: dict[str, torch.Tensor], cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    grads = torch.autograd.grad(out, list(inputs.values()), cotangent, allow_unused=True, retain_graph=True)
    zipped = zip(inputs.items(), grads, strict=True)
    return {name: torch.zeros_like(x) if grad is None else grad for (name, x), grad in zipped}


def assert_same(got: torch.Tensor, want: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    scale = want.detach().abs().max().clamp(min=1e-12)
    error = ((got - want).detach().abs().max() / scale).item()
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def cut(x: dict, a: int, b: int) -> dict:
    """The tokens a to b - 1 of all inputs."""
    return {name: y[:, a:b] for name, y in x.items()}


def decoded(case: Case, x: dict, options: dict, prefill: int) -> tuple[torch.Tensor, SlotCache]:
    """Output and cache after `prefill` tokens in one call and the others one by one."""
    cache, outs = SlotCache.empty(case.B, case.H, case.capacity, case.Dk, case.Dv, dtype=torch.float64), []
    if prefill:
        first, cache = dla_attention(**cut(x, 0, prefill), **options, return_cache=True, chunk_size=16)
        outs = [first]
    for t in range(prefill, case.T):
        outs.append(decode_step(**cut(x, t, t + 1), cache=cache, **options)[0])
    return torch.cat(outs, 1), cache


def random_case(seed: int) -> Case:
    rnd = random.Random(seed)
    T, B = rnd.randint(2, 110), rnd.randint(1, 2)
    ends = sorted(rnd.sample(range(1, B * T), min(rnd.choice([0, 0, 3, 6]), B * T - 1)))
    return Case(
        name=f"random {seed}",
        T=T,
        B=B,
        H=rnd.choice([2, 4]),
        G=rnd.choice([1, 2]),
        Dk=rnd.randint(2, 12),
        Dv=rnd.randint(2, 12),
        tau=rnd.choice([0.4, 0.8, 1.1, 1.25]),
        capacity=rnd.choice([2, 3, 7]),
        chunk_size=rnd.choice([16, 32, 64]),
        decay=rnd.choice([0.0, 0.1, 3.0]),
        delta=rnd.random() < 0.5,
        topic=rnd.choice([0, 4, 15]),
        documents=tuple(ends),
        seed=seed,
    )
