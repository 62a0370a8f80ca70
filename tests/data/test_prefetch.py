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

from megatron_dla.data import ShardReader, TokenLoader
from megatron_dla.data.prefetch import ReadAhead
from megatron_dla.errors import DataError
from tests.support.rows import T, build_words, global_steps, hashes, loader, ranks


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


STEP_S, READ_S, RANKS, SHARD_ROWS = 0.01, 0.02, 32, 8


def waiting_steps(data, monkeypatch, prefetch_rows, steps):
    """The share of steps in which at least one of 32 ranks waits for over 10 ms, where a read takes 20 ms."""
    sizes = {"global_batch_size": RANKS, "num_streams": RANKS, "prefetch_rows": prefetch_rows}
    loaders = [loader(data, rank, RANKS, **sizes) for rank in range(RANKS)]
    for rank, one in enumerate(loaders):
        for _ in range(1 + rank % SHARD_ROWS):
            one.next_step()
    if prefetch_rows:
        wait_until(lambda: all(one._ahead._ready.qsize() == prefetch_rows for one in loaders))
    waits, real = [], ShardReader.read
    with monkeypatch.context() as patch:
        patch.setattr(ShardReader, "read", lambda self, shard: time.sleep(READ_S) or real(self, shard))
        for _ in range(steps):
            time.sleep(STEP_S)
            waits.append(False)
            for one in loaders:
                empty = one._ahead._ready.empty()  # if not, a busy machine was slow, not the reading
                one.next_step()
                waits[-1] |= empty and one.last_wait_s > 0.01
    for one in loaders:
        one.close()
    return sum(waits) / steps


def test_few_steps_of_32_ranks_wait_for_reads(tmp_path_factory, monkeypatch):
    """They begin another shard at different steps; a thread has 64 rows of time, 640 ms, for each read of 20 ms."""
    data = build_words(tmp_path_factory.mktemp("wide"), "wide", seed=5, documents=110, shards=RANKS)
    tokens = sum(shard.tokens for shard in ShardReader(data, "train").shards)
    assert 0.7 * SHARD_ROWS < tokens / RANKS / T < 1.5 * SHARD_ROWS
    assert waiting_steps(data, monkeypatch, prefetch_rows=64, steps=40) < 0.1
    assert waiting_steps(data, monkeypatch, prefetch_rows=0, steps=4) > 0.5


FORKS = """
    import gc, json, os, signal, sys, threading, time
    from tests.support.rows import loader
    gc.freeze()
    for line in sys.stdin:
        if not (child := os.fork()):
            break
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        sys.exit()
    path, code, number = json.loads(line)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
    one = loader(path, prefetch_rows=64)
    one.next_step()
    if number is not None:
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    exec(code)
"""


@pytest.fixture(scope="module")
def run_to_its_end(tmp_path_factory):
    """run(data, code, number): run code with a loader `one` in a process that gets signal `number` meanwhile.

    Returns its exit code and what it wrote to stderr. The processes are forks of one that has imported everything.
    """
    log = tmp_path_factory.mktemp("forks") / "stderr"
    command = [sys.executable, "-c", textwrap.dedent(FORKS)]
    with open(log, "w") as errors:
        forks = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)

    def run(data, code, number=None):
        print(json.dumps([str(data), code, number]), file=forks.stdin, flush=True)
        return int(forks.stdout.readline()), log.read_text()

    yield run
    forks.stdin.close()
    assert forks.wait(20) == 0


def test_damage_met_by_the_thread_ends_the_process_with_its_message(run_to_its_end, data):
    (data / "train" / "train-000004.tar").write_bytes(b"")
    code, errors = run_to_its_end(data, "while True: one.next_step()")
    assert code == 1 and "DataError" in errors and "train-000004.tar" in errors


@pytest.mark.parametrize(
    ("code", "number", "want"),
    [
        ("time.sleep(60)", signal.SIGTERM, -signal.SIGTERM), ("time.sleep(60)", signal.SIGINT, -signal.SIGINT),
        # a consumer that waits in the queue, while the thread hangs in a read
        ("one._ahead._make.by_row[0].next_row = lambda _: time.sleep(0.5)\nwhile True: one.next_step()",
         signal.SIGINT, -signal.SIGINT),
        ("sys.exit(7)", None, 7), ("raise ValueError", None, 1),
    ],
)  # fmt: skip
def test_the_process_ends(run_to_its_end, made, code, number, want):
    started = time.monotonic()
    ended, errors = run_to_its_end(made, code, number)
    assert ended == want, errors
    assert time.monotonic() - started < 30
