"""The README's commands, as written, on a small corpus: text to shards, and dry runs on a GPU, a node and a cluster."""

import random
import re
import shlex
import string
from pathlib import Path

import pytest

from megatron_dla.cli import main

ROOT = Path(__file__).resolve().parents[1]


def readme_commands() -> list[list[str]]:
    """The `dla` commands of the README's code blocks, in order, without the name of the program."""
    text = re.sub(r" *\\\n *", " ", (ROOT / "README.md").read_text())
    return [shlex.split(line, comments=True) for line in re.findall(r"^(?:    )?dla (.+)$", text, re.MULTILINE)]


def dry_runs(commands: list[list[str]]) -> list[list[str]]:
    """`train`, `run` and `submit` of a pretraining config, each with --dry-run."""
    pretraining = [c for c in commands if c[0] in ("train", "run", "submit") and "delta_mem" not in c[1]]
    return [[*c, *(["--dry-run"] if "--dry-run" not in c else [])] for c in pretraining]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the README's corpus/, and the repository's configs and profiles."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    rng = random.Random(0)
    (folder / "corpus").mkdir()
    for number in range(150):  # enough different words for a vocabulary of 32,000
        words = ["".join(rng.choices(string.ascii_lowercase, k=9)) for _ in range(120)]
        (folder / "corpus" / f"{number}.txt").write_text(" ".join(words) + "\n")
    return folder


def test_the_readme_shows_the_whole_sequence() -> None:
    shown = [" ".join(command[:2]) for command in readme_commands()]
    steps = [shown.index(f"data {name}") for name in ("tokenizer", "shards", "verify")]
    assert steps == sorted(steps)
    assert {command[0] for command in dry_runs(readme_commands())} == {"train", "run", "submit"}


def test_the_commands_run_as_written(checkout: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = readme_commands()
    data = [command for command in commands if command[0] == "data"]
    output = data[1][data[1].index("--output") + 1]
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("PATH", str(checkout))  # no sbatch: `dla submit --dry-run` does not ask Slurm then
    for command in [*data, *dry_runs(commands)]:
        if command[0] == "submit":  # on a cluster the shards are on a shared file system
            command = [f"data.dir={output}" if word.startswith("data.dir=") else word for word in command]
        assert main(command) == 0, (command, capsys.readouterr())
    assert not (checkout / "runs").exists()
