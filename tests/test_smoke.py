"""`dla smoke` on a CPU: what it finds, what it skips, and that it needs nothing but torch and numpy."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_dla.cli import main
from megatron_dla.config import load_config
from megatron_dla.kernels.bench.inputs import TAU, Problem, make_inputs
from megatron_dla.kernels.bench.stages import FAIL, PASS, SKIP, CheckFailed, Skipped, Stages
from megatron_dla.kernels.dla import partition
from megatron_dla.smoke import kernels, model
from megatron_dla.smoke.text import write_corpus

ROOT = Path(__file__).resolve().parents[1]
TINY = kernels.Sizes(tokens=96, heads=1, dims=(8,), capacity=3, prefix=64, decoded=4)
BLOCKED = (
    "megatron", "deepspeed", "transformers", "webdataset", "fla", "matplotlib", "pydantic", "sentencepiece",
    "safetensors", "huggingface_hub", "yaml", "psutil", "tqdm", "zstandard", "einops", "triton",
)  # fmt: skip
BLOCKER = f"""
import sys
from collections.abc import Iterator
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def checker(sizes: kernels.Sizes = TINY, seed: int = 3) -> kernels.Checker:
    return kernels.Checker(torch.device("cpu"), "torch", sizes, seed, Stages(4))


@pytest.mark.parametrize("device", sorted(model.RECIPES))
def test_the_recipe_s_vocabulary_can_be_trained_on_its_text(device: str, tmp_path: Path) -> None:
    recipe = model.RECIPES[device]
    corpus = write_corpus(tmp_path / "text.jsonl", min(recipe.characters, 400_000), 3)
    command = ["data", "tokenizer", "--input", str(corpus), "--output", str(tmp_path / "tokenizer")]
    assert main([*command, "--vocab-size", str(recipe.vocab_size)]) == 0


def test_stages_report_and_go_on(capsys) -> None:
    def raises(error: Exception) -> None:
        raise error

    stages = Stages(5)
    assert stages.run("a", lambda: None).outcome == PASS
    assert stages.run("b", lambda: raises(Skipped("no GPU"))).outcome == SKIP
    assert stages.run("c", lambda: raises(CheckFailed("too far"))).outcome == FAIL
    assert stages.run("d", lambda: raises(ZeroDivisionError("bug"))).outcome == FAIL
    assert stages.run("e", lambda: None, needs="c").outcome == SKIP
    assert not stages.summary()
    printed = capsys.readouterr().out
    assert "SKIP b" in printed and "no GPU" in printed and "too far" in printed and "ZeroDivisionError: bug" in printed


def test_kernel_checks_pass_on_the_torch_path() -> None:
    check = checker()
    for stage in (check.decisions, check.numerics, check.determinism, check.decoding):
        stage()


@pytest.mark.parametrize("index,name", list(enumerate(["the output", "dq", "dk", "dv", "dg", "dslot_weights"])))
def test_a_wrong_output_or_gradient_is_found(monkeypatch: pytest.MonkeyPatch, index: int, name: str) -> None:
    right = kernels.Checker.attend

    def wrong(self, x, p, part=None, backend=None):
        done = right(self, x, p, part, backend)
        if backend is None:
            done[index] = done[index] * 1.05
        return done

    monkeypatch.setattr(kernels.Checker, "attend", wrong)
    with pytest.raises(CheckFailed, match=f"of {name} is"):
        checker().numerics()


def test_nan_and_noise_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.relative_rms(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    right, calls = kernels.Checker.attend, []

    def noisy(self, *arguments):
        calls.append(1)
        return [x + 1e-9 * len(calls) for x in right(self, *arguments)]

    monkeypatch.setattr(kernels.Checker, "attend", noisy)
    with pytest.raises(CheckFailed, match="two runs"):
        checker().determinism()


def test_wrong_decisions_are_found() -> None:
    p = Problem("mamba2", 400, 16, 4, 2)
    x = make_inputs(p, 1, dtype=torch.float32)
    good = partition(x.k, x.v, x.g, tau=TAU, capacity=p.capacity)
    assert kernels.undecided(good, 1e-3) == 0 and kernels.wrong_merges(good, p.capacity) == 0
    assert kernels.score_error(x.rows(0, 64), good, p.capacity) < 1e-5
    flipped = replace(good, start=good.start.clone())
    flipped.start[0, 7, 0] = ~flipped.start[0, 7, 0]
    assert kernels.undecided(flipped, 1e-3) == 1
    dead = (good.death < p.tokens) & good.start
    late = replace(good, death=torch.where(dead, good.death + 1, good.death))
    assert kernels.wrong_merges(late, p.capacity) > 0
    shifted = replace(good, score=good.score + 0.01)
    assert kernels.score_error(x.rows(0, 64), shifted, p.capacity) > 5e-3


def test_the_100m_model_is_the_shipped_config() -> None:
    wanted = asdict(load_config(ROOT / "configs" / "smoke_gpu.yaml").model)
    mine = model.RECIPES["cuda"].model
    assert {name: wanted[name] for name in mine if name != "vocab_multiple"} == {
        name: value for name, value in mine.items() if name != "vocab_multiple"
    }


def test_a_loss_that_does_not_fall_is_a_failure() -> None:
    smoke = model.ModelSmoke("cpu", model.RECIPES["cpu"], Path("unused"), 0, Stages(1))
    for losses in ([6.0] * 30, [6.0, float("nan")] * 15):
        smoke.losses = losses
        with pytest.raises(CheckFailed, match="loss"):
            smoke._check_losses()


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Exported code is copied here, not into the user's cache, and imported from here: other tests have used theirs."""
    import transformers.dynamic_module_utils as dynamic

    def forget() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]
        return {name: sys.modules.pop(name) for name in names}

    cache = tmp_path / "modules"
    cache.mkdir()
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(cache))
    monkeypatch.setenv("HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    before = forget()
    yield
    forget()
    sys.modules.update(before)


def test_model_stages_without_megatron(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, modules: None) -> None:
    """The way a machine goes that has torch and transformers only."""
    monkeypatch.setattr(model, "TRAINER_NEEDS", ("no_such_package",))
    recipe = replace(model.RECIPES["cpu"], steps=12, seq_len=48, rows=2, characters=20_000)
    smoke = model.ModelSmoke("cpu", recipe, tmp_path, 0, Stages(3))
    smoke.train()
    smoke.export()
    smoke.generate()
    assert not smoke.through_trainer and smoke.stages.facts["cache_bytes"][0] > 0


def run_blocked(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_dla.cli", *arguments]
    return subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True)


def test_smoke_and_bench_need_torch_and_numpy_alone(tmp_path: Path) -> None:
    done = run_blocked(tmp_path, "smoke", "--device", "cpu", "--seed", "4", "--out", str(tmp_path / "smoke"))
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("SKIP training", "not installed: transformers", "no GPU used", "nothing failed", "--seed 4"):
        assert words in done.stdout, done.stdout
    stages = json.loads((tmp_path / "smoke" / "smoke_cpu.json").read_text())["stages"]
    assert [s["outcome"] for s in stages] == [PASS] * 5 + [SKIP] * 4
    assert list((tmp_path / "smoke").iterdir()) == [tmp_path / "smoke" / "smoke_cpu.json"]  # nothing left behind
    small = ["--heads", "1", "--dims", "8", "--capacities", "2", "--lengths", "64", "--budget", "0.01"]
    code = (
        "import sys; from megatron_dla.kernels.bench import targets; targets.recurrence_records.__defaults__ = (32,);"
        "from megatron_dla.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "bench", "kernels", "--device", "cpu", *small, "--out", "bench"]
    bench = subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True)
    assert "plot left out: matplotlib" in bench.stdout, bench.stdout + bench.stderr
    assert "fla is blocked" in bench.stdout and (tmp_path / "bench" / "kernels_cpu.json").exists()


def test_requests_that_cannot_be_done(capsys, tmp_path: Path) -> None:
    assert main(["smoke", "--device", "cpu", "--seed", "-1"]) == 2
    assert "--seed -1" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["smoke", "--device", "cpu", "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
