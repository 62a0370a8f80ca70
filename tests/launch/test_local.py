"""`dla run`: which rank's failure is the cause."""

import json
import os
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_dla.launch import local


def failure(rank: int, exitcode: int, at: int, message: str, folder: Path) -> ProcessFailure:
    path = folder / f"{rank}.json"
    path.write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": str(at)}}}))
    return ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(path))


def test_a_rank_that_was_terminated_is_not_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Timestamps are whole seconds: the rank ended by SIGTERM may have an earlier one than the rank that failed."""
    failed = {
        0: failure(0, 2, 100, "shard train-00000 is damaged", tmp_path),
        1: failure(1, -signal.SIGTERM, 99, "ended", tmp_path),
    }

    def launch(*_: object):
        def raise_failure(*_: object) -> None:
            raise ChildFailedError("dla", failed)

        return raise_failure

    monkeypatch.setattr(local, "elastic_launch", launch)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert local.run_local(2, ["config.yaml"], tmp_path) == 2
    printed = capsys.readouterr().err
    assert "shard train-00000 is damaged" in printed and "rank 1" not in printed


def test_usr1_asks_the_ranks_of_one_attempt_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the file `stop`; a file left by an earlier run is removed first."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "stop").touch()
    seen = []

    def launch(*_: object):
        def ranks(*_: object) -> None:
            seen.append(((run_dir / "stop").exists(), os.environ["DLA_ATTEMPT"]))
            os.kill(os.getpid(), signal.SIGUSR1)
            seen.append(((run_dir / "stop").exists(), os.environ["DLA_ATTEMPT"]))

        return ranks

    monkeypatch.setattr(local, "elastic_launch", launch)
    monkeypatch.delenv("DLA_ATTEMPT", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        assert local.run_local(2, ["config.yaml"], run_dir) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    (first, name), (then, same) = seen
    assert (first, then) == (False, True) and name == same and str(os.getpid()) in name
    assert "DLA_ATTEMPT" not in os.environ
