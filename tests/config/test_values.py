"""Values that people type: twice given keys, text that looks like a number, sizes that no machine has."""

from pathlib import Path

import pytest

from megatron_dla.cli import main
from megatron_dla.config import RunConfig, check_config, load_config
from megatron_dla.config.load import fill
from megatron_dla.config.yaml_text import parse_yaml
from megatron_dla.errors import ConfigError
from megatron_dla.launch.profile import load_profile


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {steps: 4}\nrun: {}\ntraining: {}\n", ["'training'", "1", "3"]),
        ("run: {name: a, name: b}", ["'name'", "1"]),
        ("a: " + "[" * 3000, ["deep"]),
        ("a: !!int b", ["'b'"]),
        ("a: !!timestamp 2020-13-45", ["month"]),
        ("a: " + "9" * 5000, ["5000"]),
        ('a: "\\0"', ["NUL"]),
        ('a: "\\uD800"', ["character"]),
        ("? [a]\n: b", ["YAML"]),
    ],
)
def test_yaml_that_is_refused(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_yaml(text)
    assert all(word in str(error.value) for word in words), error.value


def test_merged_keys_are_no_duplicates() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")["b"] == {"x": 3, "y": 2}


def test_a_value_that_yaml_repeats_a_million_times_is_shown_in_short(tmp_path: Path) -> None:
    lines = ["x0: &x0 [lol, lol]", *(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 12))]
    values = parse_yaml("\n".join(lines))
    with pytest.raises(ConfigError) as error:
        fill(RunConfig, {"run": {"name": values["x11"]}})
    assert len(str(error.value)) < 5000


def test_text_stays_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "account: 0123456\nexclude: 012\ntime: 24:00:00\nqos: 1_0\nconstraint: 2020-01-01\n"
        "env: {NCCL_IB_TC: 0106, A: 1.50}\nsrun_args: [012]\nprocesses_per_node: 010\n"
    )
    profile = load_profile(path)
    assert (profile.account, profile.exclude, profile.time) == ("0123456", "012", "24:00:00")
    assert (profile.qos, profile.constraint, profile.srun_args) == ("1_0", "2020-01-01", ["012"])
    assert profile.env == {"NCCL_IB_TC": "0106", "A": "1.50"}
    assert profile.processes_per_node == 8  # a number is read as YAML reads it
    (tmp_path / "c.yaml").write_text("run: {name: 007}\ndata: {sources: {a: {dir: 010, weight: 1}}}")
    config = load_config(tmp_path / "c.yaml", ["run.dir=1e3"])
    assert isinstance(config, RunConfig)
    assert (config.run.name, config.run.dir, config.data.sources["a"].dir) == ("007", "1e3", "010")


def test_paths_may_hold_the_home_directory_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NO_SUCH", raising=False)
    path = tmp_path / "c.yaml"
    path.write_text("run: {dir: ~/runs}\ndata: {sources: {a: {dir: $SCRATCH/a}, b: {dir: '${SCRATCH}/b'}}}")
    config = load_config(path)
    assert isinstance(config, RunConfig)
    assert config.run.dir == "/home/me/runs"
    assert [source.dir for source in config.data.sources.values()] == ["/scratch/me/a", "/scratch/me/b"]
    site = tmp_path / "site.yaml"
    site.write_text("cache_dir: $SCRATCH/cache\nprocesses_per_node: 1")
    assert load_profile(site).cache_dir == "/scratch/me/cache"
    for override in ("run.dir=$NO_SUCH/runs", "data.dir=~nobody-of-that-name/x"):
        with pytest.raises(ConfigError, match=override.split("=")[0]):
            load_config(path, [override])


def test_null_is_the_default_of_keys_without_one(tmp_path: Path) -> None:
    """So that an override can take back `data.dir` for a mixture."""
    (tmp_path / "c.yaml").write_text("data: {dir: x, cache_dir: null}")
    config = load_config(tmp_path / "c.yaml", ["data.dir=null", "data.sources.web.dir=y"])
    assert isinstance(config, RunConfig)
    assert (config.data.dir, config.data.cache_dir) == ("", "")
    for override in ("run.dir=null", "run.name=null", "data.seq_len=null"):
        with pytest.raises(ConfigError, match=override.split("=")[0]):
            load_config(tmp_path / "c.yaml", [override])


@pytest.mark.parametrize(
    "override", ["training=", "training={steps: 3}", "model=null", "logging.wandb=", "logging.wandb={mode: offline}"]
)
def test_an_override_of_a_whole_section_is_refused(tmp_path: Path, override: str) -> None:
    (tmp_path / "c.yaml").write_text("training: {steps: 7}")
    with pytest.raises(ConfigError, match=f"{override.split('=')[0]}.key"):
        load_config(tmp_path / "c.yaml", [override])


DATA = Path(__file__).parents[1] / "fixtures/62bb8a7/data"
ABSURD = {
    "model": {
        "hidden_size": 2**31, "num_layers": 2**31, "num_heads": 2**31, "num_groups": 2**31, "key_dim": 2**31,
        "value_dim": 2**31, "conv_kernel": 2**31, "capacity": 2**31, "ffn_hidden_size": 2**31, "attention_heads": 2**31,
        "attention_head_dim": 2**31, "vocab_multiple": 2**31, "rope_theta": 1e300, "rope_factor": 1e300,
        "norm_eps": 1e10, "init_std": 1e20, "dt_min": 1e-300, "dt_max": 1e300, "a_max": 1e300, "pattern": "D" * 5000,
        "rope_original_length": 2**31, "sliding_window": 2**31, "levels": 2**31,
    },
    "data": {"seq_len": 2**31, "num_streams": 2**31, "prefetch_rows": 2**31, "cache_gb": 1e300},
    "optimizer": {
        "lr": 1e12, "eps": 1e308, "weight_decay": 1e30, "clip_grad": 1e30, "tau_lr_ratio": 1e30, "warmup_steps": 2**31,
    },
    "training": {
        "steps": 2**31, "global_batch_size": 2**31, "micro_batch_size": 2**31, "log_every": 2**31, "save_every": 2**31,
        "eval_every": 2**31, "eval_rows": 2**31, "keep_checkpoints": 2**31,
    },
    "parallel": {"tensor_model_parallel_size": 2**31, "context_parallel_size": 2**31},
    "tau": {"temperature_start": 1e300, "temperature_end": 1e-300},
    "run": {"name": "a\0b", "dir": "a\nb"},
    "debug": {"check_replicas": 2**31},
}  # fmt: skip


@pytest.mark.parametrize("key", [f"{section}.{key}" for section, keys in ABSURD.items() for key in keys])
def test_absurd_values_are_refused_by_name(key: str) -> None:
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=f"^{key} = "):
        config = fill(
            RunConfig,
            {"data": {"dir": "x"}, section: {name: ABSURD[section][name]}}
            if section != "data"
            else {"data": {"dir": "x", name: ABSURD[section][name]}},
        )
        check_config(config, 1)


@pytest.mark.parametrize("name", ["\x1b[31m", "a\nb", "é" * 101, "..", "a/b", "", "\ud800"])
def test_names_that_are_no_directory(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^run\.name = "):
        check_config(fill(RunConfig, {"run": {"name": name}, "data": {"dir": "x"}}), 1)


def test_the_defaults_reach_their_learning_rate() -> None:
    config = RunConfig()
    assert config.optimizer.warmup_steps <= config.training.steps / 5


def test_a_warm_up_longer_than_the_run_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"run: {{dir: {tmp_path}}}\ndata: {{dir: {DATA}, num_streams: 2}}\n"
        "optimizer: {warmup_steps: 1024}\ntraining: {steps: 200, device: cpu}\n"
    )
    assert main(["train", str(path), "--dry-run"]) == 0
    assert "warmup_steps = 1024" in (out := capsys.readouterr().out) and "training.steps = 200" in out
    assert main(["train", str(path), "--dry-run", "optimizer.warmup_steps=20"]) == 0
    assert "warmup_steps" not in capsys.readouterr().out
