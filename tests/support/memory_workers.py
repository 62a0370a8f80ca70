"""What runs on the ranks of the δ-mem parity tests: a model with memories at one layout, whole tensors back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_dla.adapters import delta_mem
from megatron_dla.adapters.calls import MemoryCall
from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.delta_mem import freeze_backbone, with_memory
from megatron_dla.adapters.memory import MemoryInputs
from megatron_dla.config import ModelSection, ParallelSection
from megatron_dla.model.gpt import build_model
from megatron_dla.parallel.context import context_slice
from megatron_dla.parallel.groups import process_groups
from tests.support.workers import ALONE, errors, gathered_over, get_tag, gradients, lay_out, layout_free, perturb, whole

S, B, VOCAB, WRITE = 24, 2, 60, 15


@dataclass(frozen=True)
class MemoryCase:
    """A model, its memory, and a layout to hold against one process."""

    section: ModelSection
    memory: DeltaMemConfig
    parallel: ParallelSection
    recompute: str = "none"


def build(case: MemoryCase, parallel: ParallelSection):
    lay_out(parallel.tensor_model_parallel_size, parallel.context_parallel_size)
    model = build_model(
        case.section, parallel, vocab_size=VOCAB, seq_len=S, seed=3, dtype=torch.float64,
        recompute=case.recompute, delta_mem=case.memory,
    )  # fmt: skip
    return model.train()


def run(case: MemoryCase, parallel: ParallelSection, frozen: bool) -> dict[str, torch.Tensor]:
    """Logits under a random cotangent, gradients, and what the pass reports, of rows [write | read] in two episodes."""
    model = build(case, parallel)
    perturb(model, case.section)
    if frozen:
        freeze_backbone(model)
    groups, gen = process_groups(), torch.Generator().manual_seed(8)
    ids = torch.randint(0, VOCAB, (B, S), generator=gen)
    reset, write, valid = (torch.zeros(B, S, dtype=torch.bool) for _ in range(3))
    reset[:, 0] = reset[0, 7] = True
    write[:, :WRITE] = True
    valid[:, 1:] = True
    inputs = MemoryInputs(valid=valid, reset=reset, write=write, message=torch.arange(S).expand(B, S) // 4)
    # the penalty is added on every context-parallel rank, and gradients are summed over them
    call = MemoryCall(inputs, gate_weight=20.0 / groups.cp.size(), measure=True)
    documents = torch.tensor([0, 7, WRITE, S, S + WRITE, 2 * S], dtype=torch.int32)
    logits = model(context_slice(ids, groups.cp), None, None, packed_seq_params=with_memory(call, S, documents))
    vocab = logits.shape[-1] * groups.tp.size()
    cotangent = torch.randn(B, S, vocab, generator=gen, dtype=torch.float64)
    mine = context_slice(context_slice(cotangent, groups.cp, 1), groups.tp, 2)
    (call.penalise((logits * mine).sum()) * 3).backward()
    found = {"logits": gathered_over(gathered_over(logits.detach(), groups.tp, 2), groups.cp, 1)}
    for layer, result in call.results.items():
        assert result.steering is not None
        found |= {f"{layer} state": result.state.S.detach(), f"{layer} gate": result.gate}
        found |= {f"{layer} steering": result.steering, f"{layer} writes": result.writes}
    if not frozen:
        return found | layout_free(model, gradients(model))
    for name, gradient in gradients(model).items():
        assert (gradient is not None) == (".delta_mem." in name), name
        if gradient is not None:
            found[name] = whole(model.get_parameter(name), gradient)
    return found


def parity(case: MemoryCase) -> list[dict[str, float]]:
    """Errors at the case's layout against one process: all parameters trained, and the backbone frozen."""
    found = []
    for frozen in (False, True):
        want, got = run(case, ALONE, frozen), run(case, case.parallel, frozen)
        assert all(float(g.abs().max()) > 0 for g in want.values()), "something is zero: the test sees nothing there"
        found.append(errors(got, want))
    return found


def starts(case: MemoryCase) -> dict[str, bool]:
    """Whether each memory's parameter starts with the bits that it has in one process."""
    values = []
    for parallel in (ALONE, case.parallel):
        model = build(case, parallel)
        values.append({n: whole(p, p.detach()) for n, p in model.named_parameters() if ".delta_mem." in n})
    return {name: torch.equal(value, values[1][name]) for name, value in values[0].items()}


def tags(case: MemoryCase) -> dict[str, tuple[str, bool]]:
    """{parameter of a memory: (kind, counted on every rank in the gradient's norm)}."""
    found = {}
    for name, p in build(case, case.parallel).named_parameters():
        if ".delta_mem." in name:
            found[name.rsplit(".", 1)[-1]] = (get_tag(p).kind, p.tensor_model_parallel)
    return found


# ---- one thing broken


def _ungathered(x: torch.Tensor, group) -> torch.Tensor:
    """The gather whose backward takes this rank's part and sums nothing."""
    return original_gather(x, tensor_parallel_output_grad=False, group=group)


original_gather = delta_mem.gather_from_sequence_parallel_region
original_slice, original_attach = context_slice, MemoryCall.attach
MUTATIONS = {
    "query branch not summed": lambda: patch.object(
        delta_mem, "copy_to_tensor_model_parallel_region", lambda x, group: x
    ),
    "shared parameters not summed": lambda: patch.object(
        delta_mem._SharedMemory, "shared", lambda self, weight: weight
    ),
    "gather's gradient not summed": lambda: patch.object(
        delta_mem, "gather_from_sequence_parallel_region", _ungathered
    ),
    "first rank's part of the sequence": lambda: patch.object(
        delta_mem, "context_slice",
        lambda x, group, dim: x if group is None or group.size() == 1 else x.chunk(group.size(), dim)[0],
    ),
    "penalty counted by every rank": lambda: patch.object(
        MemoryCall, "attach", lambda self, output, gate, copies: original_attach(self, output, gate, 1)
    ),
}  # fmt: skip


@contextmanager
def mutated(name: str) -> Iterator[None]:
    with MUTATIONS[name]():
        yield


def broken(case: MemoryCase, name: str) -> float:
    """Largest error of a layout that has lost one thing; infinite where replicas' gradients differ."""
    want = run(case, ALONE, True)
    with mutated(name):
        try:
            got = run(case, case.parallel, True)
        except AssertionError as error:
            if "replicas differ" not in str(error):
                raise
            return float("inf")
    dist.barrier()
    return max(errors(got, want).values())
