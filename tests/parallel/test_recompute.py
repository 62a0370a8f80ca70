"""Activation checkpointing, optimizer offload and the replica check: same training, no decision taken twice."""

import dataclasses

import pytest

from megatron_dla.config import ParallelSection, check_config, from_dict
from megatron_dla.errors import ConfigError
from tests.support import engine_workers
from tests.support.engine_workers import CHAIN, CP2, GDN, HYBRID, MAMBA, PUBLISHED, SP2, Case
from tests.support.workers import check

STEPS = 3
CASES = {
    "selective": Case(MAMBA, training=(("recompute", "selective"),)),
    "full": Case(GDN, training=(("recompute", "full"),)),
    "full, hybrid, tp2+sp": Case(HYBRID, SP2, training=(("recompute", "full"),)),
    "full, published mamba2, tp2+sp": Case(PUBLISHED, SP2, training=(("recompute", "full"),)),
    "selective, hybrid, cp2": Case(HYBRID, CP2, training=(("recompute", "selective"),)),
    "full, learned tau, cp2 zero2": Case(MAMBA, CP2, zero=2, training=(("recompute", "full"),)),
    "full, zero3": Case(GDN, zero=3, training=(("recompute", "full"),)),
}


@pytest.mark.parametrize("name", CASES)
def test_recomputation_changes_nothing_and_decides_once(ranks, references, name: str) -> None:
    case = dataclasses.replace(CASES[name], steps=STEPS)
    mixers = 1 if "A" in case.section.pattern else 2
    micro_batches = 1 if case.parallel == ParallelSection() else 2  # 4 rows in twos over the data-parallel ranks
    for errors, decided, computed, kept in ranks(2).run(engine_workers.recomputed, case, references(case)):
        check(errors, 1e-5)
        passes, validation = mixers * micro_batches * STEPS, mixers  # a forward pass before the first step
        assert (decided, computed) == (passes + validation, 2 * passes + validation)
        assert kept == 0


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_through_the_chain(ranks, references, how: str) -> None:
    case = Case(GDN, CHAIN, documents=False, steps=STEPS, training=(("recompute", how),))
    pieces = 4  # heads, one each
    for errors, decided, computed, kept in ranks(2).run(engine_workers.recomputed, case, references(case)):
        check(errors, 1e-5)
        passes, validation = 2 * 2 * STEPS * pieces, 2 * pieces
        assert (decided, computed, kept) == (passes + validation, 2 * passes + validation, 0)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_offloaded_optimizer(ranks, references, zero: int) -> None:
    case = Case(MAMBA, zero=zero, steps=STEPS, training=(("offload_optimizer", True),))
    for errors, _, _ in ranks(2).run(engine_workers.parity, case, references(case)):
        check(errors, 1e-5)


def test_offload_without_zero_is_refused() -> None:
    config = from_dict({"data": {"dir": "x"}, "training": {"offload_optimizer": True, "zero_stage": 0}})
    with pytest.raises(ConfigError, match=r"training\.offload_optimizer = true .*training\.zero_stage = 0"):
        check_config(config, 1)


@pytest.mark.parametrize("zero", [1, 3])
def test_replicas_that_drift_are_named(ranks, zero: int) -> None:
    for before, after in ranks(2).run(engine_workers.drift, Case(MAMBA, SP2, zero=zero)):
        assert before == "" and "decoder.layers.1.self_attention.norm" in after
