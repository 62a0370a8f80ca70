"""The parity check is worth something: each reduction and each tag, once removed, makes it fail.

Reductions and tags are found from the models themselves, so a new parameter is covered without being listed here.
"""

import dataclasses

import pytest

from tests.support import engine_workers, mutation_workers
from tests.support.engine_workers import CHAIN, CP2, GDN, HYBRID, MAMBA, OTHERS, PUBLISHED, SP2, TP2, Case

pytestmark = pytest.mark.long

LIMIT = 1e-4  # the matrix allows 1e-5; what is lost must stand out
# MAMBA has one q/k group for all heads (replicated weights); norms need their sum only under sequence parallelism
ONE, ONE_PUBLISHED = (dataclasses.replace(section, num_layers=1) for section in (MAMBA, PUBLISHED))
CASES = {name: dataclasses.replace(case, steps=1) for name, case in {
    "tp2": Case(ONE, TP2), "tp2 published": Case(ONE_PUBLISHED, TP2),
    "sp2": Case(ONE, SP2), "sp2 hybrid": Case(HYBRID, SP2),
    "sp2 others": Case(OTHERS, SP2), "dp2": Case(ONE),
    "cp2": Case(ONE, CP2), "cp2 hybrid": Case(HYBRID, CP2), "chain": Case(GDN, CHAIN, documents=False),
}.items()}  # fmt: skip
COMMUNICATION = {
    "sections of packed projections": "tp2",
    "input gradient of the shared query and key": "tp2",
    "mean square of a norm over heads of several ranks": "tp2 published",
    "gradient of that mean square": "tp2 published",
    "gradients over context": "cp2",
    "gradients over data": "dp2",
    "token count over data": "dp2",
    "loss scale over context": "cp2",
    "gradient of the all-to-all": "cp2",
    "rotary positions of the rank's tokens": "cp2 hybrid",
    "gradient of the memory": "chain",
    "gradient of the halo": "chain",
    "the halo": "chain",
}


def fails(ranks, references, case: Case, kind: str, target: str) -> bool:
    want = references(case)
    results = ranks(2).run(mutation_workers.broken, case, want, kind, target)
    return any(error > LIMIT or drifted for error, drifted in results)


def test_unbroken_cases_pass(ranks, references) -> None:
    for name, case in CASES.items():
        for errors, drifted, _ in ranks(2).run(engine_workers.parity, case, references(case)):
            assert all(error < LIMIT / 5 for error in errors.values()) and errors and not drifted, name


@pytest.mark.parametrize("name", ["tp2", "tp2 published", "sp2", "sp2 hybrid", "sp2 others"])
def test_every_sum_of_a_replicated_parameter_is_needed(ranks, references, name: str) -> None:
    case = CASES[name]
    kinds = ranks(2).run(mutation_workers.tags, case)[0]
    summed = [leaf for leaf, kind in kinds.items() if kind == "replicated_sum"]
    assert len(summed) >= 3
    silent = [leaf for leaf in summed if not fails(ranks, references, case, "unsummed", leaf)]
    assert not silent, f"not noticed: {silent}"


@pytest.mark.parametrize("name", ["tp2", "tp2 published", "sp2 hybrid"])
def test_every_tag_counts_in_the_norm(ranks, references, name: str) -> None:
    case = CASES[name]
    kinds = ranks(2).run(mutation_workers.tags, case)[0]
    silent = [leaf for leaf in kinds if not fails(ranks, references, case, "flipped", leaf)]
    assert not silent, f"not noticed: {silent}"


def test_every_communication_is_listed() -> None:
    assert COMMUNICATION.keys() == mutation_workers.COMMUNICATION.keys()


@pytest.mark.parametrize("target", COMMUNICATION)
def test_every_communication_is_needed(ranks, references, target: str) -> None:
    assert fails(ranks, references, CASES[COMMUNICATION[target]], "communication", target)
