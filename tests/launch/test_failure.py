"""Which rank is blamed when an attempt ends."""

import json
from pathlib import Path

import pytest

from megatron_dla.launch.failure import find_exits, main

SUMMARY = """\
1: ============================================================
1: Root Cause (first observed failure):
1: [0]:
1:   time      : 2026-11-22_12:00:0{second}
1:   host      : n2
1:   rank      : {rank} (local_rank: 0)
1:   exitcode  : {code} (pid: 77)
1:   error_file: <N/A>
"""


def record(run: Path, rank: int, node: str, code: int, message: str, time: float) -> None:
    folder = run / "exits" / "5.0"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"rank": rank, "host": node, "exitcode": code, "message": message, "time": time})
    (folder / f"rank{rank}.json").write_text(text)


def summary(run: Path, node: str, rank: int, code: int, second: int = 0) -> None:
    folder = run / "logs" / "5.0"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{node}.log").open("a") as file:
        file.write(SUMMARY.format(rank=rank, code=code, second=second))


def report(run: Path) -> int:
    return main(["--run-dir", str(run), "--attempt", "5.0"])


def cause(run: Path) -> tuple[int, str, int, str]:
    first = find_exits(run, "5.0")[0]
    return first.rank, first.node, first.code, first.message


def test_the_first_crash_is_the_cause_and_its_log_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record(tmp_path, 0, "n1", 1, "RuntimeError: connection closed by peer", 101.0)
    record(tmp_path, 3, "n2", 1, "FloatingPointError: the loss is nan", 100.5)
    summary(tmp_path, "n1", 1, -15)
    summary(tmp_path, "n2", 3, 1)
    assert report(tmp_path) == 1
    printed = capsys.readouterr().out
    assert cause(tmp_path) == (3, "n2", 1, "FloatingPointError: the loss is nan")
    for words in ("rank 3", "n2", "code 1", "FloatingPointError: the loss is nan", f"{tmp_path}/logs/5.0/n2.log"):
        assert words in printed
    assert "1:   error_file: <N/A>" in printed  # the end of that log


def test_a_killed_rank_is_the_cause_of_the_others_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record(tmp_path, 0, "n1", 1, "RuntimeError: connection closed by peer", 100.0)
    summary(tmp_path, "n2", 1, -9, second=5)
    assert report(tmp_path) == 1
    assert cause(tmp_path) == (1, "n2", -9, "") and "SIGKILL" in capsys.readouterr().out


def test_bad_input_and_a_clean_stop_have_their_own_codes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    summary(tmp_path, "n1", 0, 75)
    summary(tmp_path, "n2", 1, -15)
    assert report(tmp_path) == 75 and "FAILED" not in capsys.readouterr().out
    record(tmp_path, 1, "n2", 2, "data.dir = 'x': no such directory", 100.0)
    record(tmp_path, 0, "n1", 1, "RuntimeError: connection closed by peer", 99.0)
    assert report(tmp_path) == 2 and "data.dir = 'x'" in capsys.readouterr().out


def test_bad_input_without_a_record_is_read_from_the_log(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    logs = tmp_path / "logs" / "5.0"
    logs.mkdir(parents=True)
    (logs / "n1.log").write_text("0: dla train: unknown key 'model.tua'\n" + "0: Traceback\n" * 30)
    summary(tmp_path, "n1", 0, 2)
    assert report(tmp_path) == 2
    assert cause(tmp_path) == (0, "n1", 2, "unknown key 'model.tua'")
    assert "unknown key 'model.tua'" in capsys.readouterr().out


def test_nothing_known_and_half_written_records(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "exits" / "5.0").mkdir(parents=True)
    (tmp_path / "exits" / "5.0" / "rank0.json").write_text('{"rank": 0, "ho')
    assert find_exits(tmp_path, "5.0") == [] and report(tmp_path) == 1
    assert f"{tmp_path}/logs/5.0" in capsys.readouterr().out
