"""One real cluster per test process; `make test` skips this folder, `make test-slurm` runs it."""

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
    """A job left running by a failed or planted test would occupy the nodes of the next one."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").clear()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_data(tmp_path_factory.mktemp("corpus"))
