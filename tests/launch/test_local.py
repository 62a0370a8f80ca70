"""`dla run`: which rank's failure is the cause."""

import json
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_dla.launch import local


def failure(rank: int, exitcode: int, at: int, message: str, folder: Path) -> ProcessFailure:
    path = folder / f"{rank}.json"
    path.write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": str(at)}}}))
    return ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(path))


def test_a_rank_that_was_ended_is_not_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Clocks of one second: the rank that SIGTERM ended may look older than the one that failed."""
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
    assert local.run_local(2, ["config.yaml"]) == 2
    printed = capsys.readouterr().err
    assert "shard train-00000 is damaged" in printed and "failed with exit code" not in printed
