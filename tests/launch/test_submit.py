"""`dla submit` without a cluster: profiles, sbatch's command line, what is written and what is undone."""

import errno
import fcntl
import json
import re
import resource
import stat
from pathlib import Path

import pytest
import yaml

from megatron_dla.cli import main
from megatron_dla.errors import ConfigError, UserError
from megatron_dla.launch import submit
from megatron_dla.launch.profile import Profile, check_time, load_profile
from megatron_dla.launch.slurm import SlurmError, bad_nodes, clean_environment, known_bad_nodes, run_jobs, submissions
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]


NO_JOBS = ["a\0b", "\ud800", "../../x", "7 8", "-x", "", "\u0667", "7\n", "7_", "7_1_2"]


def write(path: Path, text: str, executable: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if executable:
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    config = write(tmp_path / "c.yaml", yaml.safe_dump(tiny.config_dict(tmp_path / "data", tmp_path / "runs")))
    return config, ROOT / "slurm" / "profiles" / "h100.yaml"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch, scancel and scontrol that record their calls; call N of sbatch fails if the test made the file failN."""
    folder = tmp_path / "bin"
    write(
        folder / "sbatch",
        '#!/bin/sh\ncd "$(dirname "$0")"\necho "sbatch $*" >>calls\nn=$(grep -c ^sbatch calls)\nenv >"environment$n"\n'
        '[ -e "fail$n" ] && { echo "sbatch: error: no such partition" >&2; exit 1; }\necho "10$n"\n',
        executable=True,
    )
    write(folder / "scontrol", "#!/bin/sh\necho Invalid job id specified >&2\nexit 1\n", executable=True)
    write(folder / "scancel", '#!/bin/sh\necho "scancel $*" >>"$(dirname "$0")/calls"\n', executable=True)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_the_profile_of_24_hours_is_not_86400_minutes(paths: tuple[Path, Path]) -> None:
    assert load_profile(paths[1]).time == "24:00:00"


@pytest.mark.parametrize(
    "text,words",
    [
        ("gpus_per_nod: 8", "'gpus_per_node'"),
        ("gpus_per_node: many", "gpus_per_node = 'many'"),
        ("gpus_per_node: 0", "processes_per_node = 0"),
        ("gpus_per_node: 8\nspare_nodes: -1", "spare_nodes = -1"),
        ("gpus_per_node: 8\nsrun_args: ['--a b']", "'--a b'"),
        ("gpus_per_node: 8\nsrun_args: --a", "srun_args = '--a'"),
        ("gpus_per_node: 8\nenv: {A-B: 1}", "env.A-B"),
        ("gpus_per_node: 8\ntime: '2'", "time limit 2 is 120 s"),
        ("gpus_per_node: 8\ntime: soon", "time limit soon"),
        ("- a", "got list"),
        ("a: [b", "YAML"),
    ],
)
def test_wrong_profiles_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "p.yaml", text)
    with pytest.raises(ConfigError) as error:
        load_profile(path)
    assert words in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "time,seconds", [("7", 420), ("5:30", 330), ("1:00:00", 3600), ("1-0", 86400), ("1-2:30", 95400), ("0-0:7:0", 420)]
)
def test_time_limits_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    check_time(time, Profile(save_seconds=seconds - 61))
    with pytest.raises(ConfigError, match=f"{seconds} s"):
        check_time(time, Profile(save_seconds=seconds - 60))


def test_every_key_of_a_profile_reaches_slurm_or_the_batch_script(tmp_path: Path, paths: tuple[Path, Path]) -> None:
    """Each key has a value that no other key has."""
    numbers = {"gpus_per_node": 7, "cpus_per_node": 77, "processes_per_node": 6, "spare_nodes": 2, "save_seconds": 311,
               "max_failures": 13, "hang_timeout": 999, "preflight_timeout": 222}  # fmt: skip
    words = {name: f"x-{name}" for name, value in vars(Profile()).items() if value == "" and name != "time"}
    lists = {"srun_args": ["--x-srun"], "exec_prefix": ["x-exec"], "sbatch_args": ["--x-sbatch"], "env": {"X": "x-env"}}
    flags = {"requeue": False, "preflight": False, "time": "2-0"}
    values = {**numbers, **words, **lists, **flags}
    assert set(values) == set(vars(Profile()))
    profile = write(tmp_path / "p.yaml", yaml.safe_dump(values))
    request = submit.make_request(str(paths[0]), [], str(profile), 3)
    argv, env = submit.sbatch_argv(request), submit.job_environment(request)
    given = " ".join([*argv, *(f"{k}={v}" for k, v in env.items())])
    for value in [*words.values(), "--x-srun", "x-exec", "--x-sbatch", "X=x-env", "--nodes=5", "DLA_WANT_NODES=3",
                  "--cpus-per-task=77", "DLA_NPROC=6", "USR1@311", "DLA_MAX_FAILURES=13", "DLA_HANG_TIMEOUT=999",
                  "DLA_PREFLIGHT_TIMEOUT=222", "DLA_PREFLIGHT=0", "--no-requeue", "--time=2-0", "--gres=x-gres",
                  "OMP_NUM_THREADS=12"]:  # fmt: skip
        assert value in given, value
    values["gres"] = ""
    write(profile, yaml.safe_dump(values))
    request = submit.make_request(str(paths[0]), [], str(profile), 3, limit="1-0")
    assert {"--gpus-per-node=7", "--time=1-0"} <= set(submit.sbatch_argv(request))


def test_bad_nodes_are_excluded(slurm: Path, tmp_path: Path, paths: tuple[Path, Path]) -> None:
    write(slurm / "sinfo", "#!/bin/sh\nexit 1\n", executable=True)  # does not respond
    run = tmp_path / "runs" / "tiny"
    write(run / "bad_nodes", "n3  # no answer; x, 2026\nn5\n\n# a remark\n")
    assert bad_nodes(run) == {"n3": "no answer; x, 2026", "n5": ""}
    request = submit.make_request(str(paths[0]), [], str(paths[1]), 1)
    assert "--exclude=n3,n5" in submit.sbatch_argv(request)
    write(run / "bad_nodes", "n3\ngone17  # sold\nnot a name\n")
    assert "--exclude=n3,gone17" in submit.sbatch_argv(request)
    write(slurm / "sinfo", "#!/bin/sh\nprintf 'n3\\nn5\\n'\n", executable=True)
    assert "--exclude=n3" in submit.sbatch_argv(request)  # Slurm refuses a list with an unknown name
    assert known_bad_nodes(run) == (["n3"], ["gone17", "not a name"])


@pytest.mark.parametrize("lines", ["0", "-3"])
def test_logs_shows_at_least_one_line(capsys, lines: str) -> None:
    assert main(["logs", "x", "-n", lines]) == 2 and f"--lines {lines}" in capsys.readouterr().err


def test_a_submission_is_recorded_and_clears_the_control_files(
    slurm: Path, tmp_path: Path, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "tiny"
    for name in ("halt", "stop", "failures"):
        write(run / name, "2")
    monkeypatch.setenv("SLURM_JOB_ID", "5")  # from inside a job: its variables are not for the new one
    monkeypatch.setenv("SBATCH_ACCOUNT", "other")
    monkeypatch.setenv("SLURM_CONF", "/x/slurm.conf")
    request = submit.make_request(str(paths[0]), ["model.tau=0.7"], str(paths[1]), 2, chain=3)
    assert submit.submit(request, {"git": "abc"}) == ["101", "102", "103"]
    calls = (slurm / "calls").read_text().splitlines()
    assert "dependency" not in calls[0] and "--no-requeue" in calls[0]
    assert "--dependency=afterany:101" in calls[1] and "--dependency=afterany:102" in calls[2]
    given = dict(line.split("=", 1) for line in (slurm / "environment2").read_text().splitlines() if "=" in line)
    assert given["DLA_CHAIN"] == "2" and given["SLURM_CONF"] == "/x/slurm.conf"
    assert "SLURM_JOB_ID" not in given and "SBATCH_ACCOUNT" not in given
    (record,) = submissions(run)
    assert record["jobs"] == ["101", "102", "103"] and record["argv"] == submit.sbatch_argv(request)
    assert record["git"] == "abc" and record["environment"]["DLA_RUN_DIR"] == str(run)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["tau"] == 0.7
    assert {p.name for p in run.iterdir()} == {"config.yaml", "logs", "submissions.jsonl"}


def test_a_job_knows_the_planned_size_of_a_checkpoint(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture, paths: tuple[Path, Path]
) -> None:
    sizes = [f"data.dir={tiny.build_data(tmp_path / 'corpus')}", "training.global_batch_size=16", "data.num_streams=8"]
    assert main(["submit", str(paths[0]), *sizes, "--profile", str(paths[1]), "--nodes", "1"]) == 0
    (record,) = submissions(tmp_path / "runs" / "tiny")
    size = float(record["environment"]["DLA_CHECKPOINT_GB"])
    printed = re.search(r"^disk +about ([\d.]+) MB a checkpoint", capsys.readouterr().out, re.MULTILINE)
    assert size > 0 and printed and abs(size - float(printed[1]) / 1000) < 0.001


def test_a_refusal_leaves_everything_as_it_was(slurm: Path, tmp_path: Path, paths: tuple[Path, Path]) -> None:
    request = submit.make_request(str(paths[0]), [], str(paths[1]), 2, chain=3)
    write(slurm / "fail1", "")
    with pytest.raises(SlurmError, match=r"no such partition.*sbatch --parsable"):
        submit.submit(request, {})
    assert not (tmp_path / "runs").exists()
    run = tmp_path / "runs" / "tiny"
    before = {"halt": "", "config.yaml": "old"}
    for name, text in before.items():
        write(run / name, text)
    (slurm / "fail1").unlink()
    write(slurm / "fail3", "")  # the second job of this chain: the first one goes too
    with pytest.raises(SlurmError):
        submit.submit(request, {})
    assert {p.name: p.read_text() for p in run.iterdir() if p.is_file()} == before
    assert (slurm / "calls").read_text().splitlines()[-1] == "scancel 102"


@pytest.mark.parametrize("full", ["config.yaml", "submissions.jsonl"])
def test_a_full_disk_leaves_no_job_and_everything_as_it_was(
    slurm: Path, tmp_path: Path, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    run = tmp_path / "runs" / "tiny"
    before = {"halt": "", "config.yaml": "old", "submissions.jsonl": json.dumps({"jobs": ["7"]}) + "\n"}
    for name, text in before.items():
        write(run / name, text)
    request = submit.make_request(str(paths[0]), [], str(paths[1]), 2, chain=2)

    whole = Path.open

    def open_full(path: Path, mode: str = "r", *args, **kwargs):  # every write to /dev/full fails
        return whole(Path("/dev/full") if path.name == full and "r" not in mode else path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OSError) as error:
        submit.submit(request, {})
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert {p.name: p.read_text() for p in run.iterdir() if p.is_file()} == before
    calls = (slurm / "calls").read_text().splitlines() if (slurm / "calls").exists() else []
    assert calls == [] if full == "config.yaml" else calls[-1] == "scancel 101 102"


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        '{"jobs": 7}',
        '{"jobs": [7]}',
        "[]",
        "7",
        '{"jobs": ["7"]',
        *(json.dumps({"jobs": ["6", x]}) for x in NO_JOBS),
    ],
)
def test_a_damaged_record_of_submissions_is_named(tmp_path: Path, line: str) -> None:
    record = write(tmp_path / "run" / "submissions.jsonl", '{"jobs": ["6"]}\n' + line + "\n")
    with pytest.raises(UserError, match=re.escape(str(record))):
        run_jobs(tmp_path / "run")


def test_secrets_in_commands_are_not_recorded(slurm: Path, tmp_path: Path, paths: tuple[Path, Path]) -> None:
    profile = yaml.safe_load(paths[1].read_text()) | {
        "exec_prefix": ["apptainer", "exec", "--env", "HF_TOKEN=hf_hidden", "image.sif"],
        "sbatch_args": ["--comment=DB_PASS=hf_hidden"],
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(profile))
    submit.submit(submit.make_request(str(paths[0]), [], str(tmp_path / "site.yaml"), 2), {})
    text = (tmp_path / "runs" / "tiny" / "submissions.jsonl").read_text()
    assert "hf_hidden" not in text and "HF_TOKEN=***" in text


def test_a_record_that_fits_in_part_is_taken_back(
    slurm: Path, tmp_path: Path, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = write(tmp_path / "runs" / "tiny" / "submissions.jsonl", json.dumps({"jobs": ["7"]}) + "\n")
    before, limits = record.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)

    def chain(*_: object) -> list[str]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        return ["101"]

    monkeypatch.setattr(submit, "_submit_chain", chain)
    try:
        with pytest.raises(OSError) as error:
            submit.submit(submit.make_request(str(paths[0]), [], str(paths[1]), 2), {})
        assert error.value.errno == errno.ENOSPC
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert record.read_text() == before and (slurm / "calls").read_text() == "scancel 101\n"


def test_two_submissions_at_once_make_one_job(slurm: Path, tmp_path: Path, paths: tuple[Path, Path]) -> None:
    request = submit.make_request(str(paths[0]), [], str(paths[1]), 2)
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    with (run / "submissions.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the other one, between its query of the queue and its record
        with pytest.raises(SlurmError, match=str(run)):
            submit.submit(request, {})
    assert not (slurm / "calls").exists() and [p.name for p in run.iterdir()] == ["submissions.jsonl"]
    write(slurm / "scontrol", "#!/bin/sh\necho JobId=7 JobState=PENDING\n", executable=True)
    write(run / "submissions.jsonl", '{"jobs": ["7"]}\n')  # submitted between the first query and the lock
    with pytest.raises(SlurmError, match=r"7 \(PENDING\)"):
        submit.submit(request, {})
    assert not (slurm / "calls").exists()


def test_a_refusal_leaves_other_runs(slurm: Path, tmp_path: Path, paths: tuple[Path, Path]) -> None:
    """Both submissions found no directory runs/, and the other one was first."""
    write(slurm / "fail1", "")
    sbatch = slurm / "sbatch"
    other = tmp_path / "runs" / "other" / "config.yaml"
    write(sbatch, sbatch.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\nmkdir -p {other.parent}; : >{other}\n", 1))
    with pytest.raises(SlurmError):
        submit.submit(submit.make_request(str(paths[0]), [], str(paths[1]), 2), {})
    assert other.exists() and not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.parametrize("job", NO_JOBS)
def test_what_is_no_job_is_not_cancelled(slurm: Path, capsys, tmp_path: Path, job: str) -> None:
    run = tmp_path / "runs" / "tiny"
    write(run / "submissions.jsonl", json.dumps({"jobs": [job]}) + "\n")
    assert main(["cancel", str(run)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "submissions.jsonl" in error and "no job ID" in error
    assert [p.name for p in run.iterdir()] == ["submissions.jsonl"] and not (slurm / "calls").exists()


def test_jobs_of_arrays_are_jobs(tmp_path: Path) -> None:
    write(tmp_path / "submissions.jsonl", '{"jobs": ["7", "7_1", "7+12"]}\n')
    assert run_jobs(tmp_path) == ["7", "7_1", "7+12"]


def test_jobs_passes_over_what_is_no_run(slurm: Path, capsys, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write(runs / "tiny" / "submissions.jsonl", '{"jobs": ["7"]}\n')
    write(runs / "README", "x")
    (runs / "loop").symlink_to("loop")
    (runs / "gone").symlink_to("nowhere")
    assert main(["jobs", "--runs", str(runs)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["RUN", "tiny"]
    assert main(["logs", "README", "--runs", str(runs)]) == 2 and "'README'" in capsys.readouterr().err


@pytest.mark.parametrize("name, words", [("file", "is not a directory"), ("nowhere", "does not exist")])
def test_jobs_of_no_directory_are_refused(capsys, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").touch()
    assert main(["jobs", "--runs", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and f"--runs {str(tmp_path / name)!r} {words}" in error


def test_there_may_be_no_runs_yet(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["jobs"]) == 0 and capsys.readouterr().out.startswith("RUN")
    (tmp_path / "runs").touch()
    assert main(["jobs"]) == 2 and "--runs 'runs' is not a directory" in capsys.readouterr().err


def test_logs_are_of_the_newest_attempt_and_other_folders_are_passed_over(capsys, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    write(run / "submissions.jsonl", '{"jobs": ["7"]}\n')
    write(run / "logs" / "job-7.log", "of the job\n")
    for name in ("7.2", "7.10", "7.abc", "7.", "7.\u00b2", "7.99x", "7.11.1", "7.011"):
        write(run / "logs" / name / "n1.log", f"0: of {name}\n")
    assert main(["logs", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "of the job" in printed and [x for x in printed.splitlines() if x.startswith("0: ")] == ["0: of 7.10"]


def test_a_damaged_record_is_reported(capsys, tmp_path: Path) -> None:
    write(tmp_path / "runs" / "tiny" / "submissions.jsonl", '{"jobs": ["7"]}\n{"time": 17, "jo')
    assert main(["jobs", "--runs", str(tmp_path / "runs")]) == 2
    assert f"{tmp_path / 'runs' / 'tiny' / 'submissions.jsonl'}" in capsys.readouterr().err


def test_a_run_that_is_done_is_not_submitted_unless_it_has_become_longer(
    tmp_path: Path, paths: tuple[Path, Path]
) -> None:
    write(tmp_path / "runs" / "tiny" / "done", json.dumps({"step": 5}))
    with pytest.raises(ConfigError, match=r"step 5.*training\.steps = 5"):
        submit.check_free(submit.make_request(str(paths[0]), [], str(paths[1]), 2))
    submit.check_free(submit.make_request(str(paths[0]), ["training.steps=6"], str(paths[1]), 2))


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--nodes", "0"], "--nodes 0"),
        (["--nodes", "1", "--chain", "0"], "--chain 0"),
        (["--nodes", "1", "run.name=a b"], "run.name"),
        (["--nodes", "1", "--time", "6"], "time limit 6 is 360 s"),
        (["--nodes", "1", "model.hiden_size=3"], "hidden_size"),
    ],
)
def test_bad_requests_exit_with_2(
    capsys, tmp_path: Path, paths: tuple[Path, Path], arguments: list[str], words: str
) -> None:
    assert main(["submit", str(paths[0]), "--profile", str(paths[1]), *arguments]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_outside_a_job_the_environment_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    assert clean_environment()["SBATCH_ACCOUNT"] == "mine"


def test_missing_slurm_is_reported(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "tiny"
    write(run / "submissions.jsonl", json.dumps({"jobs": ["7"]}) + "\n")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["jobs", "--runs", str(tmp_path / "runs")]) == 2
    assert "scontrol" in capsys.readouterr().err
    assert main(["logs", "other", "--runs", str(tmp_path / "runs")]) == 2
    assert "'other'" in capsys.readouterr().err


def test_the_environment_reaches_the_job_whatever_the_site_exports(
    slurm: Path, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    submit.submit(submit.make_request(str(paths[0]), [], str(paths[1]), 2), {})
    assert "--export=ALL" in (slurm / "calls").read_text()  # sbatch prefers the command line to its variables
    (line,) = [line for line in submit.SCRIPT.read_text().splitlines() if line.startswith("srun=(")]
    assert "--export=ALL" in line


@pytest.mark.parametrize("key", ["sbatch_args", "srun_args"])
def test_a_profile_cannot_keep_the_environment_back(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "p.yaml", f"gpus_per_node: 8\n{key}: [--exclusive, --export=NONE]\n")
    with pytest.raises(ConfigError, match=f"{key}: '--export=NONE'"):
        load_profile(path)


BANNER = "-----\nWelcome to the cluster, 12 nodes are down\n"


def test_the_job_number_is_found_among_the_lines_of_a_site(slurm: Path, paths: tuple[Path, Path]) -> None:
    sbatch = slurm / "sbatch"
    write(sbatch, sbatch.read_text().replace('echo "10$n"', f"printf '{BANNER}'\necho \"10$n;big\"\necho bye"))
    request = submit.make_request(str(paths[0]), [], str(paths[1]), 2, chain=2)
    assert submit.submit(request, {}) == ["101", "102"]
    assert "--dependency=afterany:101 " in (slurm / "calls").read_text()


def test_no_job_number_is_said_and_the_chain_is_cancelled(
    slurm: Path, tmp_path: Path, paths: tuple[Path, Path]
) -> None:
    sbatch = slurm / "sbatch"
    write(sbatch, sbatch.read_text().replace('echo "10$n"', '[ $n = 2 ] && echo queued || echo "10$n"'))
    with pytest.raises(SlurmError, match="queued"):
        submit.submit(submit.make_request(str(paths[0]), [], str(paths[1]), 2, chain=2), {})
    assert (slurm / "calls").read_text().splitlines()[-1] == "scancel 101"
    assert not (tmp_path / "runs").exists()


def test_secrets_reach_the_job_and_nothing_else(
    slurm: Path, tmp_path: Path, paths: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    env = {"HF_TOKEN": "s3cret1", "WANDB_API_KEY": "s3cret2", "https_proxy": "http://me:s3cret3@proxy:80", "KEYS": "9"}
    values = {"processes_per_node": 1, "env": env}
    profile = write(tmp_path / "p.yaml", yaml.safe_dump(values))
    request = submit.make_request(str(paths[0]), [], str(profile), 2)
    submit.submit(request, {})
    given = (slurm / "environment1").read_text()
    assert all(f"s3cret{i}" in given for i in (1, 2, 3))
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert written and not [path for path in written if "s3cret" in path.read_text()]
    (record,) = submissions(tmp_path / "runs" / "tiny")
    assert record["environment"]["https_proxy"] == "http://me:***@proxy:80"
