"""Wrong inputs give one clear line and exit code 2, before anything is written."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_dla.cli import main
from megatron_dla.training.fence import Fence
from tests.support import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.build_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny.config_dict(data, tmp_path / "runs")))
    return path


def refused(capsys, *arguments: object) -> str:
    """Runs `dla`, which must exit with 2 and print one line on stderr; returns the line."""
    code = main([str(a) for a in arguments])
    printed = capsys.readouterr()
    assert code == 2, printed
    assert len(printed.err.strip().splitlines()) == 1, printed.err
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    "override,words",
    [
        ("model.hiden_size=3", ["model.hiden_size", "hidden_size"]),
        ("modle.tau=3", ["'modle'", "'model'"]),
        ("model.tau=high", ["model.tau", "'high'", "float"]),
        ("training.steps=2.5", ["training.steps", "2.5", "int"]),
        ("model.backbone=rwkv", ["model.backbone = 'rwkv'", "mamba2", "gdn"]),
        ("parallel.tensor_model_parallel_size=3", ["model.num_heads = 4", "parallel.tensor_model_parallel_size = 3"]),
        ("model.pattern=DX", ["model.pattern", "'DX'"]),
        ("training.global_batch_size=7", ["global_batch_size = 7", "multiple"]),
        ("data.num_streams=64 training.global_batch_size=64", ["data.num_streams = 64", "train shards"]),
        ("data.dir=/nowhere", ["/nowhere"]),
        ("parallel.sequence_parallel=true", ["parallel.sequence_parallel", "parallel.tensor_model_parallel_size"]),
        ("model.capacity=1", ["model.capacity = 1", "2"]),
        ("optimizer.lr=-1", ["optimizer.lr"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "nan"]),
        ("optimizer.beta1=1.5", ["optimizer.beta1 = 1.5", "less than 1"]),
        ("model.rope_theta=-1", ["model.rope_theta"]),
        ("data.dir=[a: b: c", ["data.dir=[a:"]),
        ("run.name=a/b", ["run.name = 'a/b'"]),
        ("run.seed=99999999999999", ["run.seed"]),
        ("nonsense", ["section.key=value"]),
    ],
)
def test_bad_configs_are_refused(capsys, config: Path, override: str, words: list[str]) -> None:
    line = refused(capsys, "run", config, "--nproc", "1", *override.split())
    for word in words:
        assert word in line
    assert not (config.parent / "runs").exists()


def test_missing_and_broken_config_files(capsys, tmp_path: Path) -> None:
    assert "no_such.yaml" in refused(capsys, "train", tmp_path / "no_such.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [1, 2")
    assert str(broken) in refused(capsys, "train", broken)
    broken.write_bytes(b"run: {name: \xff}")
    assert str(broken) in refused(capsys, "train", broken)


@pytest.mark.parametrize(
    "number,filename,code",
    [
        (errno.ENOENT, "/shared/runs", 2),  # as wrong the next time
        (errno.EACCES, "/shared/runs", 2),
        (errno.EIO, "/shared/runs", 1),  # the file system may recover: a launcher tries again
        (errno.ESTALE, "/shared/runs", 1),
        (errno.ENOSPC, None, 1),  # of a write, which does not say to which file
    ],
)
def test_errors_of_the_file_system_are_one_line_and_only_wrong_paths_are_bad_input(
    capsys, monkeypatch: pytest.MonkeyPatch, number: int, filename: str | None, code: int
) -> None:
    def fail(runs: Path) -> None:
        raise OSError(number, os.strerror(number), filename)

    monkeypatch.setattr("megatron_dla.launch.jobs.list_jobs", fail)
    assert main(["jobs"]) == code
    where = f"{filename!r}: " if filename else ""
    assert capsys.readouterr().err == f"dla jobs: {where}{os.strerror(number)}\n"


def test_a_copy_that_does_not_fit_names_its_target(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(runs: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/source", None, "/full/target")

    monkeypatch.setattr("megatron_dla.launch.jobs.list_jobs", fail)
    assert main(["jobs"]) == 1
    assert capsys.readouterr().err == "dla jobs: '/full/target': No space left on device\n"


def test_an_error_of_the_system_without_a_file_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(runs: Path) -> None:
        raise OSError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr("megatron_dla.launch.jobs.list_jobs", fail)
    with pytest.raises(OSError, match="Connection reset"):
        main(["jobs"])


@pytest.mark.skipif("torch" in sys.modules and sys.modules["torch"].cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(capsys, config: Path) -> None:
    assert "training.device = cuda" in refused(capsys, "train", config, "training.device=cuda")


def test_processes_that_do_not_fit_the_layout(capsys, config: Path) -> None:
    key = "parallel.tensor_model_parallel_size"
    line = refused(capsys, "run", config, "--nproc", 3, f"{key}=2")
    assert f"{key} = 2" in line and "3 processes" in line


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_and_missing_shards(capsys, data: Path, config: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    for shard in sorted((copy / "train").glob("*.tar")):
        if damage == "remove":
            shard.unlink()
        else:
            content = bytearray(shard.read_bytes())
            content[700] ^= 1
            shard.write_bytes(content if damage == "flip" else content[:-600])
    line = refused(capsys, "train", config, f"data.dir={copy}", "training.steps=1")
    assert "train-00000" in line
    assert main(["data", "verify", str(copy)]) == 2


def test_one_missing_shard_is_found_before_the_start(capsys, data: Path, config: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    shards = sorted((copy / "train").glob("*.tar"))
    shards[3].unlink()
    line = refused(capsys, "run", config, "--nproc", 1, "--dry-run", f"data.dir={copy}")
    assert shards[3].name in line
    shards[3].write_bytes(shards[2].read_bytes() + bytes(512))
    line = refused(capsys, "run", config, "--nproc", 1, "--dry-run", f"data.dir={copy}")
    assert shards[3].name in line and str(shards[3].stat().st_size) in line
    shards[2].unlink()
    assert refused(capsys, "data", "verify", copy).count("train-0000") >= 2


def test_another_tokenizer_than_the_shards(capsys, data: Path, config: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    other = tiny.build_data(tmp_path / "other", vocab_size=310, seed=3)
    shutil.copy(other / "tokenizer.model", copy / "tokenizer.model")
    capsys.readouterr()  # the progress of building the other shards
    assert f"{copy}/tokenizer.model" in refused(capsys, "train", config, f"data.dir={copy}")


def test_no_processes_and_paths_that_are_files(capsys, config: Path) -> None:
    assert "--nproc 1" in refused(capsys, "run", config, "--nproc", 0)
    assert "--nproc 1" in refused(capsys, "run", config, "--nproc", -1, "--dry-run")
    assert str(config) in refused(capsys, "train", config, f"run.dir={config}")


@pytest.mark.parametrize(
    "override, words",
    [
        ("run.dir={tmp}/file", "file' is not a directory"),
        ("run.dir={tmp}/file/deeper", "file' is not a directory"),
        ("run.dir={tmp}/loop", "symbolic links"),
        ("run.dir={tmp}/gone", "gone' is not a directory"),
        ("run.dir={tmp} run.name=file", "file' is not a directory"),
        (f"run.dir={{tmp}}/{'x' * 300}", "too long"),
    ],
)
def test_run_directories_that_cannot_be_made(capsys, config: Path, override: str, words: str) -> None:
    folder = config.parent
    (folder / "file").write_text("mine")
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nowhere")
    before = sorted(folder.iterdir())
    given = override.format(tmp=folder).split()
    for command in (["train"], ["train", "--dry-run"], ["run", "--nproc", 1], ["run", "--nproc", 1, "--dry-run"]):
        line = refused(capsys, command[0], config, *given, *command[1:])
        assert "run.dir = " in line and "run.name = " in line and words in line
    assert sorted(folder.iterdir()) == before and (folder / "file").read_text() == "mine"


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MEETING = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("dry", [[], ["--dry-run"], ["--replay"]])
@pytest.mark.parametrize(
    "environment, words",
    [
        *(({name: value}, f"{name} = {value[:40]!r}"[:45])
          for name in LAUNCHED if name != "MASTER_ADDR" for value in ("abc", "-1", "9" * 5000)),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT = '65536'"),
        ({"RANK": "1"}, "RANK = 1 in the environment: want less than WORLD_SIZE = 1"),
        (MEETING | {"RANK": "2"}, "RANK = 2 in the environment: want less than WORLD_SIZE = 2"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK = 2"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
        *(({k: v for k, v in MEETING.items() if k not in (name, "RANK")} | ({} if name == "RANK" else {"RANK": "1"}),
           f"WORLD_SIZE = 2 in the environment, but {name} is not set") for name in list(MEETING)[1:]),
    ],
)  # fmt: skip
def test_what_a_launcher_would_set(capsys, config: Path, monkeypatch, environment, words: str, dry: list[str]) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = refused(capsys, "train", config, *dry)
    assert words in line and "unset" in line and "torchrun" in line and len(line) < 400
    assert not (config.parent / "runs").exists()


def test_a_run_directory_in_use(capsys, config: Path) -> None:
    run_dir = config.parent / "runs" / "tiny"
    run_dir.mkdir(parents=True)
    other = Fence(run_dir, "another")
    other.claim()
    assert "another" in refused(capsys, "train", config)
    other.check()
    assert not (run_dir / "config.yaml").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(capsys, config: Path) -> None:
    assert main(["run", str(config), "--nproc", "2", "--dry-run", "parallel.tensor_model_parallel_size=2"]) == 0
    printed = capsys.readouterr().out
    assert "2 processes = tensor 2 x data 1" in printed and "parameters" in printed
    assert not (config.parent / "runs").exists()


def test_unknown_options_and_commands_exit_with_2(config: Path) -> None:
    for arguments in (["run", str(config), "--nproc", "1", "--fast"], ["fly"], ["plot"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


def test_plot_without_a_run(capsys, tmp_path: Path) -> None:
    assert "metrics.jsonl" in refused(capsys, "plot", tmp_path)


RANK = """
import atexit, os, sys
import torch.distributed as dist
from megatron_dla import cli

class Aborts:
    def __del__(self):
        os.abort()

kept = sys.modules["kept"] = Aborts()
atexit.register(print, "at exit")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
cli.main = lambda: 5
cli.entry()
"""


INTERRUPTED = """
from megatron_dla import cli

def build_parser():
    raise KeyboardInterrupt

cli.build_parser = build_parser
cli.entry()
"""


def test_control_c_before_a_command_has_begun_is_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_rank_keeps_its_exit_code_whatever_the_interpreter_does_at_its_end() -> None:
    done = subprocess.run([sys.executable, "-c", RANK], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (5, "at exit\n"), done.stderr
