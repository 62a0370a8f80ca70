"""The package list, the shipped configs and the README agree with the tree; transformers stays importable."""

import dataclasses
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from megatron_dla.cli import build_parser
from megatron_dla.config import AdapterRunConfig, RunConfig, check_model, check_tensor_parallel, load_config

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"kernels": "megatron_dla.kernels", "launch": "megatron_dla.launch", "data_prep": "megatron_dla.data_prep"}


def test_every_folder_with_code_is_in_the_package_list() -> None:
    found = set()
    for top in ("megatron_dla", *FOLDERS):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.parent.relative_to(ROOT).parts
            found.add(".".join([FOLDERS.get(parts[0], parts[0]), *parts[1:]]))
    assert found - {"megatron_dla.kernels"} == set(PYPROJECT["tool"]["setuptools"]["packages"]) - {
        "megatron_dla.kernels"
    }


def test_constraints_pin_what_pyproject_asks_for() -> None:
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    asked = [*PYPROJECT["project"]["dependencies"], *(text for extra in extras for text in extra)]
    names = {re.split(r"[<>=\[]", text)[0].lower() for text in asked} - {"megatron-dla", "lm-eval"}
    assert names <= pins, names - pins


def test_transformers_imports_beside_our_kernels_folder() -> None:
    code = "from transformers import AutoModelForCausalLM, PreTrainedModel; import megatron_dla.kernels.dla"
    for directory in (ROOT, ROOT.parent):
        subprocess.run([sys.executable, "-c", code], cwd=directory, check=True, env={"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
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
    for target in re.findall(r"`make ([a-z-]+)", text):
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
    for path in (ROOT / "configs").glob("*.yaml"):
        sections = set(yaml.safe_load(path.read_text()))
        kind = AdapterRunConfig if "delta_mem" in sections else RunConfig
        assert sections <= {field.name for field in dataclasses.fields(kind)} - {"debug"}


def test_batch_scripts_parse() -> None:
    for path in (ROOT / "slurm").glob("*.sbatch"):
        subprocess.run(["bash", "-n", str(path)], check=True)
