"""One real cluster a test process; `make test` leaves this folder out, `make test-slurm` runs it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.slurm.lab import Cluster, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "slurm":
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reasons := missing():
        pytest.skip(f"no Slurm here: {', '.join(reasons)}")
    with Cluster(nodes=5) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A job that a failed or planted test left running would take the next one's nodes."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").clear()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_data(tmp_path_factory.mktemp("corpus"))
