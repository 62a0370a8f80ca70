"""Every layout trains as one process does: outputs, each gradient after all reductions, norms, steps, replicas."""

import dataclasses

import pytest

from megatron_dla.config import ParallelSection as P
from tests.support import engine_workers
from tests.support.engine_workers import (
    CHAIN,
    CONTROLS,
    CP2,
    CP2TP2,
    GDN,
    HYBRID,
    MAMBA,
    OTHERS,
    PUBLISHED,
    SP2,
    TP2,
    TP4,
    Case,
)
from tests.support.workers import check

FEW = 3  # steps of most cases; one of each kind of layout takes 20
MATRIX = {
    "tp2 mamba2": (2, Case(MAMBA, TP2)),
    "tp2+sp gdn": (2, Case(GDN, SP2)),
    "tp2+sp hybrid": (2, Case(HYBRID, SP2, documents=False)),
    "cp2 mamba2": (2, Case(MAMBA, CP2)),
    "cp2 gdn zero2": (2, Case(GDN, CP2, zero=2)),
    "cp2 hybrid zero3": (2, Case(HYBRID, CP2, zero=3)),
    "cp2 mamba2 zero0": (2, Case(MAMBA, CP2, zero=0)),
    "cp2 chain mamba2": (2, Case(dataclasses.replace(MAMBA, tau_mode="fixed"), CHAIN)),
    "cp2 chain hybrid zero3": (2, Case(HYBRID, CHAIN, zero=3)),
    "dp2 mamba2": (2, Case(MAMBA)),
    "dp2 gdn zero3": (2, Case(GDN, zero=3)),
    "tp2 x cp2 mamba2": (4, Case(MAMBA, CP2TP2)),
    "tp2+sp x cp2 chain gdn": (4, Case(GDN, P(2, True, 2, "chain"))),
    "tp2+sp x cp2 hybrid": (4, Case(HYBRID, P(2, True, 2))),
    "cp2 x dp2 gdn zero3": (4, Case(GDN, CP2, zero=3)),
    "tp2 x dp2 gdn": (4, Case(GDN, TP2)),
    "tp2+sp x dp2 mamba2 zero0": (4, Case(MAMBA, SP2, zero=0)),
    "tp2+sp x dp2 mamba2 zero1": (4, Case(MAMBA, SP2, zero=1)),
    "tp2+sp x dp2 hybrid zero2": (4, Case(HYBRID, SP2, zero=2)),
    "tp2+sp x dp2 mamba2 zero3": (4, Case(MAMBA, SP2, zero=3)),
    "tp4 mamba2": (4, Case(MAMBA, TP4)),
    "tp2+sp published mamba2": (2, Case(PUBLISHED, SP2)),
    "tp2+sp controls": (2, Case(CONTROLS, SP2)),
    "cp2 controls": (2, Case(CONTROLS, CP2)),
    "cp2 chain controls": (2, Case(dataclasses.replace(CONTROLS, slot_weights="recency"), CHAIN)),
    "tp2 others": (2, Case(OTHERS, TP2)),
    "tp2+sp others": (2, Case(OTHERS, SP2)),
    "cp2 others": (2, Case(OTHERS, CP2)),
    "cp2 chain others, log-linear gdn": (2, Case(dataclasses.replace(OTHERS, backbone="gdn"), CHAIN)),
}


THOROUGH = {
    "tp2+sp gdn", "cp2 mamba2", "dp2 gdn zero3", "tp2 x dp2 gdn", "tp2+sp x dp2 mamba2 zero1",
    "cp2 hybrid zero3",
}  # fmt: skip


MORE = {
    "tp2+sp hybrid", "cp2 gdn zero2", "cp2 mamba2 zero0", "dp2 mamba2", "tp2 x cp2 mamba2", "cp2 x dp2 gdn zero3",
    "tp2+sp x dp2 mamba2 zero0", "tp2+sp x dp2 hybrid zero2", "tp2+sp x dp2 mamba2 zero3", "tp2+sp others",
    "cp2 controls", "cp2 chain controls", "cp2 chain hybrid zero3",
}  # fmt: skip
assert MATRIX.keys() >= MORE


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n in MORE)) for n in MATRIX])
def test_training_equals_one_process(ranks, references, name: str) -> None:
    world, case = MATRIX[name]
    case = case if name in THOROUGH else dataclasses.replace(case, steps=FEW)
    for errors, drifted, norms in ranks(world).run(engine_workers.parity, case, references(case)):
        later = {key: errors.pop(key) for key in list(errors) if key.startswith("norm") and key != "norm of step 0"}
        check(errors, 1e-5)
        check(later, 5e-5)  # norms amplify the rounding of the steps before
        assert not drifted
        assert norms == (0 if case.zero == 0 else case.steps)
