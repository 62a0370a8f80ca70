"""Processes end with their parent, and at signals; a lost terminal ends none."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest

LIMIT_S = 30
# argument 1: "parent" starts "child", which ends with it
FAMILY = """
import os, subprocess, sys, time
from megatron_dla.processes import end_with_parent
if sys.argv[1] == "parent":
    env = os.environ | {"PARENT": str(os.getpid())}
    subprocess.run([sys.executable, "-c", os.environ["CODE"], "child"], env=env, start_new_session=True)
end_with_parent(int(os.environ["PARENT"]))
print(os.getpid(), flush=True)
time.sleep(600)
"""
STOPS = """
import signal, time
from megatron_dla import processes
from megatron_dla.processes import StopSignals, end_by
processes.SAME_REQUEST_S = 1.5
caught = []
with StopSignals(caught.append, end_by):
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        if caught:
            print(*caught, flush=True)
            caught.clear()
"""
LOSES = """
import os, sys
from megatron_dla.processes import print_or_drop
print_or_drop("ready")
sys.stdin.readline()
for _ in range(3):
    print_or_drop("lost")
sys.exit(75)
"""


def start(code: str, *arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, **options
    )  # fmt: skip


def test_a_process_ends_with_its_killed_parent() -> None:
    parent = start(FAMILY, "parent", env=os.environ | {"CODE": FAMILY})
    child = int(parent.stdout.readline())
    parent.kill()
    ended, _, _ = select.select([parent.stdout], [], [], LIMIT_S)  # the child has the other end of this pipe
    if not ended:
        os.kill(child, signal.SIGKILL)
    assert ended and parent.communicate() == ("", None)


def test_a_process_whose_parent_has_ended_before_ends_at_once() -> None:
    orphan = start(FAMILY, "child", env=os.environ | {"PARENT": "1"})
    try:
        assert orphan.wait(LIMIT_S) == -signal.SIGKILL
    finally:
        orphan.kill()
    assert orphan.communicate() == ("", None)


@pytest.mark.parametrize("ignored", [None, signal.SIGHUP, signal.SIGINT], ids=str)
def test_the_first_signal_is_a_request_and_a_later_one_ends_the_process(ignored) -> None:
    def ignore() -> None:  # as nohup, or a shell script for its background jobs
        if ignored:
            signal.signal(ignored, signal.SIG_IGN)

    process = start(STOPS, preexec_fn=ignore)
    assert process.stdout.readline() == "ready\n"
    if ignored:
        process.send_signal(ignored)
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == f"{signal.SIGTERM:d}\n"  # and not that of the ignored one
    last = signal.SIGHUP if ignored is None else signal.SIGTERM
    process.send_signal(last)  # the same request
    time.sleep(1.7)
    assert process.poll() is None
    process.send_signal(last)
    assert process.wait(LIMIT_S) == -last
    process.stdout.close()


def test_a_process_goes_on_without_the_reader_of_its_output() -> None:
    process = start(LOSES, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(LIMIT_S) == 75
