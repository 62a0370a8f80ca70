"""The wheel, built and installed without the network, does from another directory what a checkout does."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
OLD = ROOT / "tests/fixtures/62bb8a7"
FOLDERS = ("megatron_dla", "kernels", "launch", "data_prep", "configs", "slurm")


def call(command: list[str], cwd: Path, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")} | env
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its build directory in the source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = call([*pip, "--wheel-dir", str(source / "dist"), "."], source)
    assert done.returncode == 0, done.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def dla(wheel: Path, tmp_path_factory: pytest.TempPathFactory):
    """`dla(*arguments, **environment)`: the installed command in an empty directory.

    Its environment has the wheel alone. A .pth file adds this environment's packages, but not the checkout: .pth files
    of a directory that is added this way are not read.
    """
    place = tmp_path_factory.mktemp("environment")
    assert call([sys.executable, "-m", "venv", "--without-pip", "venv"], place).returncode == 0
    python = place / "venv/bin/python"
    (site,) = (place / "venv/lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = call(pip, place)
    assert done.returncode == 0, done.stderr
    empty = place / "empty"
    empty.mkdir()
    found = call([str(python), "-c", "import megatron_dla; print(*megatron_dla.__path__)"], empty)
    assert found.stdout.split() == [str(site / "megatron_dla")], found
    return lambda *arguments, **env: call([str(python.parent / "dla"), *arguments], empty, timeout=1800, **env)


def test_every_shipped_file_is_in_the_wheel(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    for folder in FOLDERS:
        top = "" if folder == "megatron_dla" else "megatron_dla/"
        for path in (ROOT / folder).rglob("*"):
            if (
                path.suffix in (".py", ".yaml", ".sbatch", ".json", ".css", ".js", ".html")
                and "__pycache__" not in path.parts
            ):
                assert top + str(path.relative_to(ROOT)) in packed, path
    assert not [name for name in packed if name.startswith(("tests/", "docs/"))]


def test_help(dla) -> None:
    done = dla("--help")
    assert done.returncode == 0 and "submit" in done.stdout, done.stderr


def test_submit_takes_the_shipped_config_profile_and_batch_script(dla) -> None:
    model = yaml.safe_load((OLD / "gdn.yaml").read_text())["model"]
    sizes = [f"model.{key}={value}" for key, value in model.items()]
    overrides = [f"data.dir={OLD / 'data'}", "data.num_streams=2", "data.seq_len=96", "training.device=cpu", *sizes]
    done = dla("submit", "demo_cpu", *overrides, "--profile", "cpu", "--nodes", "2", "--dry-run", PATH="")  # no sbatch
    assert done.returncode == 0, done.stderr
    (command,) = (line for line in done.stdout.splitlines() if line.startswith("command "))
    script = Path(next(word for word in command.split() if word.endswith("pretrain.sbatch")))
    assert "venv" in script.parts and script.read_text() == (ROOT / "slurm/pretrain.sbatch").read_text()


def test_a_name_that_is_not_shipped_gives_the_names_that_are(dla) -> None:
    done = dla("train", "nothing", "--dry-run")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "'nothing'" in done.stderr and "demo_cpu" in done.stderr
    done = dla("submit", "demo_cpu", "--profile", "nothing", "--nodes", "1", "--dry-run")
    assert done.returncode == 2 and "'nothing'" in done.stderr and "h100" in done.stderr


@pytest.mark.long
def test_convert(dla, tmp_path: Path) -> None:
    """The exported code files come out of the installed package."""
    step, out = OLD / "trained/gdn/checkpoints/step_3", tmp_path / "hf"
    done = dla("convert", "to-hf", str(step), str(out))
    assert done.returncode == 0, done.stderr
    assert (out / "modeling_dla.py").is_file()
    done = dla("convert", "from-hf", str(out), str(tmp_path / "step_0"))
    assert done.returncode == 0 and (tmp_path / "step_0/complete.json").is_file(), done.stderr


@pytest.mark.long
def test_smoke(dla) -> None:
    done = dla("smoke", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "$ dla run " in done.stdout  # Megatron and DeepSpeed, not the plain loop of a machine without them
