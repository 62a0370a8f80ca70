"""`--dry-run`: exact parameter counts of a rank, traffic as it really is, the errors of a real start."""

import dataclasses
import time
from pathlib import Path

import pytest

from megatron_dla.cli import main
from megatron_dla.config import LETTERS, ParallelSection, load_config
from megatron_dla.model.counts import count_parameters, parameters_per_rank
from megatron_dla.model.gpt import padded_vocab
from megatron_dla.parallel.groups import initialize_distributed
from megatron_dla.tasks import pretrain
from megatron_dla.training import plan
from megatron_dla.training.device import Device
from tests.support import workers
from tests.support.engine_workers import BASE

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


AT_SCALE = sorted(path.stem for size in ("780m", "800m", "1b3") for path in CONFIGS.glob(f"*_{size}.yaml"))


@pytest.mark.parametrize("name", AT_SCALE)
def test_counts_equal_the_real_module(name: str, monkeypatch) -> None:
    section = load_config(CONFIGS / f"{name}.yaml").model
    initialize_distributed("cpu")
    workers.lay_out(1)
    model = workers.meta_model(section, ParallelSection(), 32_000, monkeypatch)
    real = sum(p.numel() for p in model.parameters())
    vocab = padded_vocab(32_000, section.vocab_multiple)
    assert count_parameters(section, vocab) == parameters_per_rank(section, vocab, 1) == real


@pytest.mark.parametrize(
    ("reference", "arms"),
    [
        ("dla_mamba2_780m", ["softmax_780m", "mamba2_780m", "log_linear_mamba2_780m"]),
        ("dla_gdn_1b3", ["softmax_1b3", "gdn_1b3", "log_linear_gdn_1b3"]),
    ],
)
def test_arms_at_scale_differ_in_the_mixer_alone(reference: str, arms: list[str]) -> None:
    wanted = load_config(reference)
    for name in arms:
        arm = load_config(name)
        assert arm.run.name == name and arm.model.pattern != wanted.model.pattern
        same = {"pattern": wanted.model.pattern, "ffn_hidden_size": wanted.model.ffn_hidden_size}
        assert dataclasses.replace(arm, run=wanted.run, model=dataclasses.replace(arm.model, **same)) == wanted
        parameters = [count_parameters(config.model, 32_000) for config in (arm, wanted)]
        assert parameters[0] == pytest.approx(parameters[1], rel=0.01)


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize(
    "change",
    [
        {"num_groups": 1},
        {"backbone": "gdn", "num_groups": 4},
        {"num_groups": 2, "ffn_hidden_size": 0, "conv_bias": True, "gated_norm": "group"},
        {"pattern": "AN", "attention_groups": 1, "attention_head_dim": 12, "qk_norm": True},
    ],
    ids=str,
)
def test_counts_of_a_rank_equal_the_real_module(ranks, tensor: int, change: dict) -> None:
    section = dataclasses.replace(BASE, **change)
    want = parameters_per_rank(section, padded_vocab(60, section.vocab_multiple), tensor)
    assert set(ranks(tensor).run(workers.parameter_count, section, ParallelSection(tensor), 60)) == {want}


@pytest.mark.parametrize("scheme", ["heads", "chain"])
@pytest.mark.parametrize("groups", [1, 4])
def test_context_traffic_is_what_is_sent(ranks, scheme: str, groups: int) -> None:
    section = dataclasses.replace(
        BASE, backbone="gdn", num_groups=groups, pattern="".join(LETTERS), num_layers=len(LETTERS)
    )
    parallel = ParallelSection(context_parallel_size=2, cp_scheme=scheme)
    sent = ranks(2).run(workers.sent_forward, section, parallel)
    scalars = sent[0].pop("scalars", 0)  # counts and positions of the slots, not part of the plan
    assert sent[0]["bytes"] == sent[0]["planned"] and scalars < sent[0]["bytes"]


@pytest.mark.parametrize("name", ["dla_mamba2_780m", "dla_gdn_1b3"])
def test_dry_run_of_the_big_configs_on_32_gpus(capsys, name: str) -> None:
    started = time.monotonic()
    overrides = ["training.recompute=full", "parallel.tensor_model_parallel_size=2"] if name == "dla_gdn_1b3" else []
    assert main(["train", str(CONFIGS / f"{name}.yaml"), "--dry-run", "--world-size", "32", *overrides]) == 2
    assert time.monotonic() - started < 30
    printed = capsys.readouterr()
    for word in ("32 processes", "parameters (tensor", "memory       about", "slot states", "traffic", "FLOP a token"):
        assert word in printed.out, word
    assert len(printed.err.splitlines()) == 1 and "data/shards" in printed.err  # a real start would stop there


@pytest.mark.parametrize(
    "override,words",
    [
        ("model.capacity=70", "model.capacity = 70 (at most 64)"),
        ("model.key_dim=300", "model.key_dim = 300 (at most 256)"),
        ("model.value_dim=1024", "model.value_dim = 1024 (at most 512)"),
        ("training.log_every=7", None),
    ],
)
def test_a_plan_for_gpus_says_where_the_kernels_are_left_out(capsys, override: str, words: str | None) -> None:
    main(["train", str(CONFIGS / "dla_mamba2_780m.yaml"), "--dry-run", "--world-size", "32", override])
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning ")]
    assert ("torch path" in warned[0] and words in warned[0]) if words else warned == []


def test_a_start_says_that_triton_is_missing(monkeypatch) -> None:
    config = load_config(CONFIGS / "dla_mamba2_780m.yaml")
    task = pretrain.PretrainTask(config)
    assert "warning" not in task.describe(Device("cpu", bf16=False))
    monkeypatch.setattr(pretrain, "kernels_missing", lambda: "No module named 'triton'")
    assert "warning" not in task.describe(Device("cuda", bf16=True, planned=True))
    assert "No module named 'triton'" in task.describe(Device("cuda", bf16=True))["warning"]


def test_world_size_is_for_plans_only(capsys) -> None:
    assert main(["train", str(CONFIGS / "demo_cpu.yaml"), "--world-size", "4"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_zero_recomputation_and_offload_lower_the_estimate() -> None:
    from megatron_dla.training.plan import make_plan

    config = load_config(CONFIGS / "dla_mamba2_780m.yaml", ["training.keep_states=false"])

    def plan(**training):
        changed = dataclasses.replace(config.training, **training)
        return make_plan(dataclasses.replace(config, training=changed), 32, 32_000, True)

    base = plan(zero_stage=1)
    assert base.memory["weights"] == 2 * base.parameters and base.memory["optimizer"] == 12 * base.parameters / 32
    assert plan(zero_stage=2).memory["gradients"] < base.memory["gradients"]
    assert plan(zero_stage=3).memory["weights"] == base.memory["weights"] / 32
    assert plan(recompute="full").memory["activations"] < plan(recompute="selective").memory["activations"]
    assert plan(recompute="selective").memory["activations"] < base.memory["activations"]
    m = config.model
    layer = 16384 / 512 * m.num_heads * m.capacity * m.key_dim * m.value_dim * 2
    assert base.memory["slot states"] == 2 * layer  # and their gradients
    assert plan(keep_states=True).memory["slot states"] == (1 + m.num_layers) * layer
    assert plan(keep_states=True, recompute="full").memory["slot states"] == 2 * layer
    delta = load_config(CONFIGS / "dla_gdn_1b3.yaml", ["training.keep_states=true"])
    m = delta.model
    layer = 16384 / 512 * m.num_heads * m.capacity * m.key_dim * m.value_dim * 2
    inverses = m.num_heads * (16384 * 64 * 4 + 16384 / 512 * m.key_dim**2 * 2)
    kept = make_plan(delta, 32, 32_000, True).memory["slot states"]
    assert delta.training.micro_batch_size == 1 and delta.data.seq_len == 16384
    assert kept == (1 + m.num_layers) * layer + m.num_layers * inverses
    offloaded = plan(offload_optimizer=True)
    assert offloaded.memory["optimizer"] == 0 and offloaded.host == base.memory["optimizer"]


def test_slot_states_of_a_long_row_are_those_of_a_window() -> None:
    from megatron_dla.training.plan import BLOCK, TILE, WINDOW_BYTES, WINDOW_ROWS, make_plan

    launch = pytest.importorskip("megatron_dla.kernels.dla.triton_launch")
    assert (launch.WINDOW_ROWS, launch.WINDOW_BYTES) == (WINDOW_ROWS, WINDOW_BYTES)
    assert TILE == {2: launch.TILE, 4: launch.WIDE_TILE}
    assert BLOCK == {2: launch.TILE * launch.TILES, 4: launch.WIDE_TILE * launch.WIDE_TILES}
    config = load_config(CONFIGS / "dla_mamba2_780m.yaml", ["data.seq_len=1048576", "training.keep_states=false"])
    assert make_plan(config, 32, 32_000, True).memory["slot states"] == 2 * WINDOW_BYTES


def test_layers_without_mlp_cost_what_the_mixers_do() -> None:
    from megatron_dla.training.plan import make_plan

    config = load_config(CONFIGS / "dla_mamba2_780m.yaml", ["parallel.tensor_model_parallel_size=2"])
    bare = dataclasses.replace(config, model=dataclasses.replace(config.model, ffn_hidden_size=0))
    with_mlp, without = (make_plan(x, 32, 32_000, True) for x in (config, bare))
    assert without.traffic["tensor"] == with_mlp.traffic["tensor"] / 2  # one all-reduce less a layer and direction
    tokens = config.training.micro_batch_size * config.data.seq_len
    mlp = 2 * config.model.hidden_size * 2 + 3 * config.model.ffn_hidden_size // 2 * 2  # bytes a token, TP 2, bf16
    assert with_mlp.memory["activations"] - without.memory["activations"] == tokens * config.model.num_layers * mlp


def test_the_plan_says_what_the_checkpoints_take_and_what_is_free(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(CONFIGS / "demo_cpu.yaml", ["training.steps=100", "training.save_every=10"])
    parameters = count_parameters(config.model, 1024)
    one, number = plan.checkpoint_bytes(config, parameters, bf16=False), plan.checkpoints_kept(config)
    assert one == parameters * 16 and number == config.training.keep_checkpoints + 1
    kept = load_config(
        CONFIGS / "demo_cpu.yaml", ["training.steps=100", "training.save_every=10", "checkpoint.keep_every=50"]
    )
    assert plan.checkpoint_bytes(kept, parameters, bf16=True) == parameters * 14
    assert plan.checkpoints_kept(kept) == number + 2
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: type("Usage", (), {"free": one * number})())
    assert "do not fit" not in plan.render_disk(one, number, tmp_path / "runs/new")
    assert str(tmp_path) in plan.render_disk(one, number + 1, tmp_path / "runs/new").splitlines()[1]
    (tmp_path / "runs/old/checkpoints/step_10").mkdir(parents=True)
    assert "do not fit" not in plan.render_disk(one, number + 1, tmp_path / "runs/old")
    main(["train", str(CONFIGS / "demo_cpu.yaml"), "--dry-run", "--world-size", "2", f"run.dir={tmp_path}"])
    assert "a checkpoint" in capsys.readouterr().out
