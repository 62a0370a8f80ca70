"""Breaks one reduction or one tag on every rank and trains: the parity check must notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from megatron_dla.mixers import dla, norms, softmax
from megatron_dla.parallel import context, mpu, neighbours, sums
from megatron_dla.parallel.tags import Tag, get_tag, sum_gradient
from megatron_dla.training import engine as training_engine
from tests.support import engine_workers
from tests.support.engine_workers import Case


def leaf(name: str) -> str:
    """`decoder.layers.1.self_attention.norm` -> `self_attention.norm`: all layers of it."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-2:])


@contextmanager
def unsummed(target: str) -> Iterator[None]:
    """Parameters named `target` keep their partial gradient."""
    chosen: set[int] = set()
    build = engine_workers.built

    def built(*args, **kwargs):
        model = build(*args, **kwargs)
        chosen.update(id(p) for name, p in model.named_parameters() if leaf(name) == target)
        assert chosen, target
        return model

    def broken(weight, group):
        return weight if id(weight) in chosen else sum_gradient(weight, group)

    with patch.object(engine_workers, "built", built), patch.object(dla, "sum_gradient", broken):  # noqa: SIM117
        with patch.object(norms, "sum_gradient", broken):
            yield


@contextmanager
def flipped(target: str) -> Iterator[None]:
    """Sharded parameters named `target` are counted once in the norm, replicated ones on every rank."""
    build = engine_workers.built

    def built(*args, **kwargs):
        model = build(*args, **kwargs)
        for name, p in model.named_parameters():
            if leaf(name) == target:
                p.tensor_model_parallel = not p.tensor_model_parallel
        return model

    with patch.object(engine_workers, "built", built):
        yield


def _shard_as_one_piece(self: Tag, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return full.chunk(size, self.dim)[rank].contiguous() if self.kind == "sharded" else full


def _groups_as(**changed: str):
    """`train_step` with some process groups mistaken for others."""
    original = engine_workers.train_step

    def step(engine, batches, groups, *args, **kwargs):
        names = {name: getattr(groups, changed.get(name, name)) for name in ("dp", "cp", "dp_cp")}
        return original(engine, batches, SimpleNamespace(**names), *args, **kwargs)

    return patch.object(engine_workers, "train_step", step)


def _mpu_over(name: str):
    return patch.object(
        training_engine, "make_mpu", lambda groups: mpu.TensorDataMpu(groups.tp, getattr(groups, name), groups.pp)
    )


def _backward_of(function: type, keep: int):
    """Gradient `keep` of a function's backward becomes zero; its communication still happens."""
    original = function.backward

    def backward(ctx, *gradients):
        found = list(original(ctx, *gradients))
        found[keep] = torch.zeros_like(found[keep])
        return tuple(found)

    return patch.object(function, "backward", staticmethod(backward))


COMMUNICATION = {
    "sections of packed projections": lambda: patch.object(Tag, "shard", _shard_as_one_piece),
    "input gradient of the shared query and key": lambda: patch.object(
        dla, "copy_to_tensor_model_parallel_region", lambda x, group: x
    ),
    "mean square of a norm over heads of several ranks": lambda: patch.object(dla, "sum_over", lambda x, group: x),
    "gradient of that mean square": lambda: patch.object(
        sums._Sum, "backward", staticmethod(lambda ctx, gradient: (gradient, None))
    ),
    "gradients over context": lambda: _mpu_over("dp"),
    "gradients over data": lambda: _mpu_over("pp"),
    "token count over data": lambda: _groups_as(dp="pp"),
    "loss scale over context": lambda: _groups_as(dp_cp="dp"),
    "gradient of the all-to-all": lambda: patch.object(
        context._AllToAll, "backward", staticmethod(lambda ctx, gradient: (gradient, None))
    ),
    "rotary positions of the rank's tokens": lambda: patch.object(
        softmax.ContiguousRotary, "forward", lambda self, n, **_: self.inner.get_emb(n).chunk(self.cp.size())[0]
    ),
    "gradient of the memory": lambda: _backward_of(neighbours._SendStates, 1),
    "gradient of the halo": lambda: _backward_of(neighbours._Halo, 0),
    "the halo": lambda: patch.object(
        neighbours.Neighbours, "shift", lambda self, x, forwards: torch.zeros_like(x)
    ),
}  # fmt: skip


def broken(case: Case, want: dict[str, Any], kind: str, target: str) -> tuple[float, list[str]]:
    """(largest relative error, drifted parameters) of a training that has lost one thing; NaN counts as an error."""
    changes = {"unsummed": unsummed, "flipped": flipped}
    mutation = COMMUNICATION[target]() if kind == "communication" else changes[kind](target)
    with mutation:
        try:
            errors, drifted, _ = engine_workers.parity(case, want)
        except AssertionError as error:  # `workers.whole` compares replicated gradients bit for bit, on all ranks
            if "replicas differ" not in str(error):
                raise
            return float("inf"), []
    return max(float("inf") if e != e else e for e in errors.values()), drifted


def tags(case: Case) -> dict[str, str]:
    """{leaf: kind of tag} of every parameter at a layout."""
    engine_workers.lay_out(case.parallel.tensor_model_parallel_size, case.parallel.context_parallel_size)
    model = engine_workers.built(case.section, case.parallel)
    return {leaf(name): get_tag(p).kind for name, p in model.named_parameters()}
