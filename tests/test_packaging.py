"""The package list, the shipped configs and the README agree with the tree; transformers stays importable."""

import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_dla.cli import build_parser
from megatron_dla.config import AdapterRunConfig, RunConfig, check_model, check_tensor_parallel, load_config
from tests.support import shipped

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"kernels": "megatron_dla.kernels", "launch": "megatron_dla.launch", "data_prep": "megatron_dla.data_prep"}


def test_every_folder_with_code_is_in_the_package_list() -> None:
    found = set()
    for top in ("megatron_dla", *FOLDERS):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.parent.relative_to(ROOT).parts
            found.add(".".join([FOLDERS.get(parts[0], parts[0]), *parts[1:]]))
    data_only = {"megatron_dla.configs", "megatron_dla.slurm", "megatron_dla.slurm.profiles"}
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert found | data_only | {"megatron_dla.kernels"} == set(listed) and len(listed) == len(set(listed))


def read_pins(path: Path) -> dict[str, str]:
    """{package: version} of a constraints file and those it includes."""
    pins: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line.startswith("-c "):
            pins |= read_pins(path.parent / line[3:].strip())
        elif "==" in line:
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version.strip()
    return pins


PINS = {device: read_pins(ROOT / f"constraints-{device}.txt") for device in ("cpu", "cuda")}


def contradictions(pins: dict[str, str], package: str, requires: Iterable[str]) -> list[str]:
    """Requirements of a package, on Linux, that a pin does not satisfy."""
    found = []
    for requirement in map(Requirement, requires):
        pin = pins.get(canonicalize_name(requirement.name))
        linux = {"platform_system": "Linux", "sys_platform": "linux", "extra": ""}
        if pin is None or (requirement.marker and not requirement.marker.evaluate(linux)):
            continue
        if not requirement.specifier.contains(pin, prereleases=True):
            found.append(f"{package} requires {requirement}, pinned is {requirement.name}=={pin}")
    return found


@pytest.mark.parametrize("device", PINS)
def test_constraints_pin_what_pyproject_asks_for(device: str) -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    unpinned = {"megatron-dla", "lm-eval"}
    for name, asked in {"": PYPROJECT["project"]["dependencies"], **extras}.items():
        names = {canonicalize_name(Requirement(text).name) for text in asked} - unpinned
        assert names <= PINS[device].keys(), names - PINS[device].keys()
        assert contradictions(PINS[device], f"megatron-dla[{name}]", asked) == []


def test_pins_of_a_gpu_machine_agree_with_the_recorded_wheels() -> None:
    """Metadata of the CUDA wheels on PyPI, written down by tests/fixtures/record_wheel_metadata.py."""
    recorded = json.loads((ROOT / "tests/fixtures/wheel_metadata.json").read_text())["packages"]
    pins = PINS["cuda"]
    asked = PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["gpu"]
    assert {canonicalize_name(Requirement(text).name) for text in asked} - {"megatron-dla"} <= recorded.keys()
    for package, wheel in recorded.items():
        assert pins.get(package, wheel["version"]) == wheel["version"], f"{package}: record the metadata again"
        assert contradictions(pins, package, wheel["requires"]) == []
    (triton,) = (Requirement(line) for line in recorded["torch"]["requires"] if line.startswith("triton"))
    assert str(triton.specifier) == f"=={pins['triton']}"  # the CUDA wheel's, not one that asks for no triton


def test_pins_agree_with_the_installed_packages() -> None:
    device = "cpu" if torch.version.cuda is None else "cuda"
    pins, checked = PINS[device], set()
    for distribution in importlib.metadata.distributions():
        package = canonicalize_name(distribution.metadata["Name"])
        if distribution.version.split("+")[0] == pins.get(package):
            checked.add(package)
            assert contradictions(pins, package, distribution.requires or []) == []
    if "torch" not in checked:
        pytest.skip(f"torch {torch.__version__} is installed, not the pinned {pins['torch']}")
    assert {"megatron-core", "deepspeed", "transformers", "numpy"} <= checked


def test_dockerfile_names_only_what_exists() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*)", text, re.M) for word in line.split()[:-1]]
    for name in copied:
        assert (ROOT / name).exists(), name
    packaged = {path.split("/")[0] for path in PYPROJECT["tool"]["setuptools"]["package-dir"].values()}
    assert packaged | {"pyproject.toml", "constraints.txt", "constraints-cuda.txt", "README.md", "LICENSE"} <= set(
        copied
    )
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])


def test_make_setup_takes_the_device() -> None:
    def printed(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", "-n", "setup", *arguments], cwd=ROOT, capture_output=True, text=True)

    for device, extras in (("cpu", "cpu,dev"), ("cuda", "gpu,dev")):
        text = printed(f"DEVICE={device}", "VENV=absent").stdout
        assert f"constraints-{device}.txt" in text and f"'.[{extras}]'" in text
        assert f"torch=={PINS[device]['torch']}" in text
    wrong = printed("DEVICE=tpu")
    assert wrong.returncode == 2 and "DEVICE = tpu: use cpu, cuda or auto" in wrong.stderr


def test_git_state_is_of_the_checkout_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installed package may lie in another project's repository, or on a machine without git."""
    from megatron_dla.tasks import run

    (tmp_path / "site-packages/megatron_dla/training").mkdir(parents=True)
    commit = ["git", "-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x"]
    for command in (["git", "init", "-q"], commit):
        subprocess.run(command, cwd=tmp_path, check=True)
    with monkeypatch.context() as patch:
        patch.setattr(run, "__file__", str(tmp_path / "site-packages/megatron_dla/tasks/run.py"))
        assert run.git_state() is None
    if (ROOT / ".git").exists():
        assert run.git_state()
    monkeypatch.setenv("PATH", "")
    assert run.git_state() is None


@pytest.mark.long
def test_transformers_imports_beside_our_kernels_folder() -> None:
    code = "from transformers import AutoModelForCausalLM, PreTrainedModel; import megatron_dla.kernels.dla"
    for directory in (ROOT, ROOT.parent):
        subprocess.run([sys.executable, "-c", code], cwd=directory, check=True, env={"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("path", shipped.RUNS, ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    config = load_config(path)
    if isinstance(config, AdapterRunConfig):
        assert config.backbone.dir and bool(config.episodes.train) != bool(config.episodes.documents)
        return
    check_model(config.model)
    check_tensor_parallel(
        config.model, config.parallel.tensor_model_parallel_size, config.parallel.sequence_parallel, config.data.seq_len
    )


def test_kernels_and_export_need_no_megatron() -> None:
    blocked = "import sys\nfor m in ('megatron', 'megatron.core', 'deepspeed', 'triton'): sys.modules[m] = None\n"
    code = blocked + "import megatron_dla.kernels.dla, megatron_dla.hf.convert, megatron_dla.checkpoint.weights"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "kernels").glob("*/README.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_only_what_exists(page: Path) -> None:
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            assert anchor in {_anchor(line) for line in path.read_text().splitlines() if line.startswith("#")}, anchor
    for target in re.findall(r"`make ([a-z0-9-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for path in re.findall(r"configs/[a-z0-9_]+\.yaml", text):
        assert (ROOT / path).exists(), path
    commands = set(build_parser()._subparsers._group_actions[0].choices)
    for command in re.findall(r"^ *dla ([a-z]+)", text, re.M):
        assert command in commands, command


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).replace(" ", "-")


def test_configs_are_plain_yaml_mappings() -> None:
    for path in shipped.RUNS:
        sections = set(yaml.safe_load(path.read_text()))
        kind = AdapterRunConfig if "delta_mem" in sections else RunConfig
        assert sections <= {field.name for field in dataclasses.fields(kind)} - {"debug"} | {"base"}


def test_batch_scripts_parse() -> None:
    paths = sorted((ROOT / "slurm").glob("*.sbatch"))
    assert ROOT / "slurm" / "pretrain.sbatch" in paths
    for path in paths:
        subprocess.run(["bash", "-n", str(path)], check=True)
