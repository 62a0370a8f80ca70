"""Shared by the tests of layouts: reference runs in one process, each computed once a file."""

import pytest

from tests.support import engine_workers
from tests.support.distributed import Ranks
from tests.support.engine_workers import Case


@pytest.fixture(scope="module")
def references():
    """`references(case)` is the run of its section in one process."""
    pool, found = Ranks(1), {}

    def get(case: Case):
        key = (repr(case.section), case.documents, case.steps)
        if key not in found:
            (found[key],) = pool.run(engine_workers.reference, case)
        return found[key]

    yield get
    pool.stop()
