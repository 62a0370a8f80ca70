"""`dla bench gpu` with commands that take the place of the real ones: limits, outcomes, and what is left on disk."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_dla.cli import build_parser
from megatron_dla.errors import UserError
from megatron_dla.kernels.bench import race
from megatron_dla.kernels.bench.export import demo_like
from megatron_dla.kernels.bench.generation import rates
from megatron_dla.kernels.bench.gpu import STAGES, Stage, bench_gpu, run_stages
from megatron_dla.kernels.bench.timing import Stopwatch

FACTS = {"torch": torch.__version__, "gpu": "NVIDIA X1"}


def program(text: str, name: str, limit: float = 30, **kwargs) -> Stage:
    return Stage(name, (sys.executable, "-c", text), limit, **kwargs)


def arguments(
    out: Path, limit: float = 60, seed: int | None = 5, stages: list[str] | None = None
) -> argparse.Namespace:
    return argparse.Namespace(out=out, limit=limit, seed=seed, stages=stages)


def outcomes(out: Path) -> dict[str, tuple[str, str]]:
    found = json.loads((out / "gpu_nvidia-x1.json").read_text())
    return {s["stage"]: (s["outcome"], s["reason"]) for s in found["stages"]}


def test_each_stage_has_its_outcome_and_its_output(tmp_path: Path) -> None:
    stages = [
        Stage("good", (sys.executable, "-c", "import sys; print(sys.argv[1:])", "{seed}", "{out}"), 30),
        program("print('before'); raise SystemExit(3)", "code"),
        program("print('==== ERROR: race'); print('end')", "line", wrong="==== ERROR"),
        program("", "absent", needs="no-such-program"),
    ]
    assert run_stages(stages, FACTS, arguments(tmp_path)) == 1
    found = outcomes(tmp_path)
    assert {name: outcome for name, (outcome, _) in found.items()} == {
        "good": "PASS", "code": "FAIL", "line": "FAIL", "absent": "SKIP",
    }  # fmt: skip
    assert "3" in found["code"][1] and "race" in found["line"][1] and "no-such-program" in found["absent"][1]
    assert f"['5', '{tmp_path}']" in (tmp_path / "good.txt").read_text()
    assert "before" in (tmp_path / "code.txt").read_text()


def test_a_stage_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    child = "import os, time; open('child', 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; print('started'); subprocess.run([sys.executable, '-c', {child!r}])"
    slow = program(f"import os; os.chdir({str(tmp_path)!r}); {parent}", "slow", limit=5)
    begin = time.monotonic()
    assert run_stages([slow, program("print('after')", "next")], FACTS, arguments(tmp_path)) == 1
    assert time.monotonic() - begin < 20
    assert outcomes(tmp_path)["slow"][0] == "FAIL" and outcomes(tmp_path)["next"][0] == "PASS"
    assert "started" in (tmp_path / "slow.txt").read_text()
    pid = int((tmp_path / "child").read_text())
    for _ in range(50):  # a killed orphan is there until init takes it
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(pid, 9)
        pytest.fail("the stage's child is still running")


def test_results_are_on_disk_after_each_stage(tmp_path: Path) -> None:
    look = f"import json; print(len(json.load(open({str(tmp_path / 'gpu_nvidia-x1.json')!r}))['stages']))"
    assert run_stages([program("", "one"), program(look, "two")], FACTS, arguments(tmp_path)) == 0
    assert (tmp_path / "two.txt").read_text().splitlines()[-1] == "1"


def test_what_does_not_fit_into_the_limit_is_not_started(tmp_path: Path) -> None:
    stages = [program("print(1)", "first"), program("print(2)", "second")]
    assert run_stages(stages, FACTS, arguments(tmp_path, limit=5)) == 0
    assert [outcome for outcome, _ in outcomes(tmp_path).values()] == ["SKIP", "SKIP"]
    assert all("--limit 5" in reason for _, reason in outcomes(tmp_path).values())


@pytest.mark.parametrize(
    ("change", "words"),
    [({"stages": ["kernels", "sleep"]}, "--stages sleep"), ({"limit": 0.0}, "--limit 0"), ({"seed": -1}, "--seed -1")],
)
def test_requests_that_cannot_be_run(tmp_path: Path, change: dict, words: str) -> None:
    args = arguments(tmp_path)
    vars(args).update(change)
    with pytest.raises(UserError, match=words):
        bench_gpu(args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        bench_gpu(arguments(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_commands_are_understood(tmp_path: Path) -> None:
    """Every stage that is a `dla` command parses, and every module that one runs is there."""
    import importlib.util

    for stage in STAGES:
        argv = [part.format(out=tmp_path, seed=3) for part in stage.argv]
        where = argv.index("-m")
        if argv[where + 1] == "megatron_dla.cli":
            assert callable(build_parser().parse_args(argv[where + 2 :]).func)
        else:
            assert importlib.util.find_spec(argv[where + 1]) is not None
    assert len({stage.name for stage in STAGES}) == len(STAGES)


def test_the_program_for_the_sanitizer_runs(capsys) -> None:
    race.main("cpu", tokens=40, dim=16)
    assert capsys.readouterr().out == "done\n"


def test_generation_is_timed(tmp_path: Path) -> None:
    found = rates(demo_like("gdn").eval(), 16, 4, (1, 2), Stopwatch(torch.device("cpu"), budget_s=0.05, least=1))
    assert list(found) == ["prefill batch 1", "decode batch 1", "prefill batch 2", "decode batch 2"]
    assert all(rate > 0 for rate in found.values())
