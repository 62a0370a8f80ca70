"""Triton on the CPU where there is no GPU; shared fixtures: gloo rank pools, restarted where a test broke one."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests start: tests run side by side

import pytest
import torch

from tests.support import triton_interpreter
from tests.support.distributed import Ranks

if not torch.cuda.is_available():
    triton_interpreter.use_interpreter()  # before any test imports triton

torch.set_num_threads(1)  # tests run side by side

# a shell starts jobs in the background with these ignored, and programs keep what was ignored
for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, action)

# half a minute or more: first, so that no worker is left with one of them at the end (`make test`)
LONG = (
    "kernels/test_aot.py",
    "kernels/dla/test_triton.py",
    "training/test_trainer.py",
    "parallel/test_parity_matrix.py",
    "mixers/test_around.py",
    "kernels/fused/test_fused.py",
    "kernels/dla/test_triton_partition.py",
    "test_wheel.py",
    "training/test_reshard.py",
    "launch/test_watchdog.py",
    "hf/test_convert.py",
    "parallel/test_mutations.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = {config.rootpath / "tests" / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Ranks]]:
    made: dict[int, Ranks] = {}
    yield made
    for pool in made.values():
        pool.stop()


@pytest.fixture
def ranks(pools: dict[int, Ranks]) -> Callable[[int], Ranks]:
    """`ranks(2)` is a pool of two gloo ranks."""

    def get(world_size: int) -> Ranks:
        pool = pools.get(world_size)
        if pool is None or not all(p.is_alive() for p in pool.processes):
            pools[world_size] = Ranks(world_size)
        return pools[world_size]

    return get


@pytest.fixture(scope="session")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The code of exported directories is copied here, and not into the user's cache: one place a process, because
    Python imports all of it as one package."""
    import transformers.dynamic_module_utils as dynamic

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The resource tables of the compiled kernels (tests/kernels/test_aot.py), which a passing test would hide."""
    cache = getattr(config, "cache", None)  # -p no:cacheprovider
    if hasattr(config, "workerinput") or cache is None:
        return
    for table in sorted(cache.mkdir("aot").glob("*.txt")):
        terminalreporter.section(f"kernel resources, {table.stem}")
        terminalreporter.write_line(table.read_text())
        table.unlink()


@pytest.fixture
def disk(tmp_path: Path):
    """A file system of its own, of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)
