"""Reading ahead: the same batches and states as without, bounded, errors in order, no thread or process left over."""

import gc
import json
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from megatron_dla.data import TokenLoader
from megatron_dla.data.prefetch import ReadAhead
from megatron_dla.errors import DataError
from tests.support.rows import global_steps, hashes, loader, ranks


class Counter:
    """1, 2, 3, ..., and an error instead of `fail`."""

    def __init__(self, fail=None):
        self.made, self.fail = 0, fail

    def __call__(self):
        self.made += 1
        if self.made == self.fail:
            raise DataError(f"number {self.made} is damaged")
        return self.made


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "read ahead"]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_values_come_in_order_and_no_more_are_made_than_there_is_room_for(depth):
    counter = Counter()
    ahead = ReadAhead(counter, depth)
    assert counter.made == 0  # a resume may still move what it reads from
    for number in range(1, 30):
        assert ahead.get() == number
        wait_until(lambda want=number + depth: counter.made == want)
        time.sleep(0.002)
        assert counter.made == number + depth
    ahead.close()


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_an_error_comes_after_what_was_made_before_it_and_again(depth):
    ahead = ReadAhead(Counter(fail=4), depth)
    assert [ahead.get() for _ in range(3)] == [1, 2, 3]
    for _ in range(3 if depth else 1):
        with pytest.raises(DataError, match="number 4 is damaged"):
            ahead.get()
    ahead.close()


@pytest.mark.parametrize("how", ["close", "collect", "error"])
def test_the_thread_ends(how):
    before = len(threads())
    ahead = ReadAhead(Counter(fail=2 if how == "error" else None), 2)
    ahead.get()
    assert how == "error" or len(threads()) == before + 1
    if how == "close":
        ahead.close()
        with pytest.raises(RuntimeError):
            ahead.get()
    if how == "collect":
        del ahead
        gc.collect()
    wait_until(lambda: len(threads()) == before)


def test_resume_at_random_steps_sizes_and_prefetch_gives_the_next_batches(made):
    total, rng = 120, random.Random(0)
    want = hashes(global_steps(ranks(made, 1), total + 3))
    running, states = ranks(made, 2, prefetch_rows=20), []
    for step in range(total):
        states.append(json.loads(json.dumps([one.state_dict() for one in running])))
        assert hashes(global_steps(running, 1)) == want[step : step + 1]
    for step in rng.sample(range(total), 100):
        size, rows = rng.choice([1, 2, 4]), rng.choice([0, 1, 7, 64])
        resumed = ranks(made, size, prefetch_rows=rows)
        for one in resumed:
            one.load_state_dict(TokenLoader.merge_states(states[step]))
        assert hashes(global_steps(resumed, 3)) == want[step : step + 3]
        assert resumed[0].steps == step + 3


def test_a_loader_that_has_read_ahead_can_go_back(made):
    one = loader(made, prefetch_rows=64)
    want, state = hashes(global_steps([one], 5)), loader(made).state_dict()
    one.load_state_dict(state)
    assert one.state_dict() == state and hashes(global_steps([one], 5)) == want


def test_prefetch_rows_below_zero(made):
    with pytest.raises(DataError, match="prefetch_rows = -1"):
        loader(made, prefetch_rows=-1)


START = """
    import os, sys, time
    from tests.support.rows import loader
    one = loader({path!r}, prefetch_rows=64)
    one.next_step()
    print("started", flush=True)
"""


def run_script(path, code):
    script = textwrap.dedent(START.format(path=str(path))) + textwrap.dedent(code)
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "started\n"
    return process


def test_damage_met_by_the_thread_ends_the_process_with_its_message(data):
    (data / "train" / "train-000004.tar").write_bytes(b"")
    process = run_script(data, "while True: one.next_step()")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "DataError" in errors and "train-000004.tar" in errors


@pytest.mark.parametrize(
    ("code", "number", "want"),
    [
        ("time.sleep(60)", signal.SIGTERM, -signal.SIGTERM), ("time.sleep(60)", signal.SIGINT, -signal.SIGINT),
        # a consumer that waits in the queue, while the thread hangs in a read
        ("one._ahead._make.by_row[0].next_row = lambda _: time.sleep(2)\nwhile True: one.next_step()",
         signal.SIGINT, -signal.SIGINT),
        ("sys.exit(7)", None, 7), ("raise ValueError", None, 1),
    ],
)  # fmt: skip
def test_the_process_ends(made, code, number, want):
    process = run_script(made, code)
    if number is not None:
        time.sleep(0.2)
        process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == want
