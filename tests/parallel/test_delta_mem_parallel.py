"""Layouts of a model with δ-mem equal one process: logits, states, statistics and every gradient in float64."""

import dataclasses

import pytest

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.config import ParallelSection
from tests.support import memory_workers
from tests.support.memory_workers import MUTATIONS, MemoryCase
from tests.support.workers import BASE_SECTION, check

SECTION = dataclasses.replace(BASE_SECTION, pattern="A")
NORMED = dataclasses.replace(SECTION, qk_norm=True, attention_head_dim=10)
HYBRID = dataclasses.replace(BASE_SECTION, pattern="DA")
TP, SP, CP = ParallelSection(2), ParallelSection(2, True), ParallelSection(1, False, 2)
TSW, MSW, SSW = (
    DeltaMemConfig(),
    DeltaMemConfig(num_states=2, output_init="base_slice"),
    DeltaMemConfig(write="message"),
)
UNCOUPLED = DeltaMemConfig(couple_lambda=False, update="lambda_outside", rowwise_gates=False, num_states=2)
CASES = {
    "tp2": MemoryCase(SECTION, TSW, TP),
    "tp2, one key head": MemoryCase(dataclasses.replace(SECTION, attention_groups=1), MSW, TP),
    "tp2, msw, q-norm, selective": MemoryCase(NORMED, MSW, TP, "selective"),
    "tp2+sp": MemoryCase(SECTION, TSW, SP),
    "tp2+sp, ssw, q-norm, full": MemoryCase(NORMED, SSW, SP, "full"),
    "tp2+sp, uncoupled, hybrid": MemoryCase(HYBRID, UNCOUPLED, SP),
    "cp2": MemoryCase(SECTION, TSW, CP),
    "cp2, msw, q-norm, full": MemoryCase(NORMED, MSW, CP, "full"),
    "cp2, ssw, hybrid": MemoryCase(HYBRID, SSW, CP),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layout_changes_nothing(ranks, name: str) -> None:
    for trained, frozen in ranks(2).run(memory_workers.parity, CASES[name]):
        check(trained, 1e-9)
        check(frozen, 1e-9)


def test_tensor_sequence_and_context_parallel(ranks) -> None:
    case = MemoryCase(NORMED, MSW, ParallelSection(2, True, 2))
    for trained, frozen in ranks(4).run(memory_workers.parity, case):
        check(trained, 1e-9)
        check(frozen, 1e-9)


@pytest.mark.parametrize("name", ["tp2, one key head", "tp2+sp, uncoupled, hybrid"])
def test_memories_start_alike_at_every_layout(ranks, name: str) -> None:
    for equal in ranks(2).run(memory_workers.starts, CASES[name]):
        assert len(equal) >= 7 and all(equal.values()), equal


def test_tags_say_how_gradients_lie(ranks) -> None:
    for parallel, kind in ((TP, "replicated"), (SP, "replicated_sum")):
        (found, _) = ranks(2).run(memory_workers.tags, MemoryCase(SECTION, TSW, parallel))
        assert found.pop("delta_q_proj") == ("sharded", True)
        assert set(found.values()) == {(kind, False)} and len(found) == 6


LOST = [
    ("tp2", "query branch not summed"),
    ("tp2+sp", "shared parameters not summed"),
    ("tp2+sp", "gather's gradient not summed"),
    ("tp2+sp", "first rank's part of the sequence"),
    ("tp2+sp", "penalty counted by every rank"),
    ("cp2", "gather's gradient not summed"),
    ("cp2", "first rank's part of the sequence"),
]


@pytest.mark.parametrize(("name", "lost"), LOST)
def test_parity_notices_what_is_lost(ranks, name: str, lost: str) -> None:
    for error in ranks(2).run(memory_workers.broken, CASES[name], lost):
        assert error > 1e-4, f"{lost}: largest error {error:.1e}"


def test_every_mutation_is_tried() -> None:
    assert {lost for _, lost in LOST} == set(MUTATIONS)
