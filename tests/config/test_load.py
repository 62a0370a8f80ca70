"""Loading, overrides and the round trip of a resolved config."""

from pathlib import Path

import pytest

from megatron_dla.config import (
    RunConfig,
    check_config,
    check_precision,
    dump_config,
    from_dict,
    load_any,
    load_config,
    to_dict,
)
from megatron_dla.config.docs import render
from megatron_dla.errors import ConfigError


def test_the_resolved_config_alone_reproduces_it(tmp_path) -> None:
    first = tmp_path / "a.yaml"
    first.write_text("model: {tau: 1, pattern: DDA}\ntraining:\n  steps: 1e3\noptimizer: {lr: 1e-3}\n")
    config = load_config(first, ["model.capacity=7", "run.name=007", "optimizer.clip_grad=0"])
    assert (config.model.tau, config.training.steps, config.optimizer.lr) == (1.0, 1000, 1e-3)
    assert config.model.capacity == 7 and config.optimizer.clip_grad == 0.0
    dump_config(config, tmp_path / "b.yaml")
    assert load_config(tmp_path / "b.yaml") == config == from_dict(to_dict(config))


def test_empty_sections_are_defaults(tmp_path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("model:\n")
    assert load_config(path) == RunConfig()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"model": {"num_groups": 5}}, "model.num_groups = 5 does not divide model.num_heads = 48"),
        ({"parallel": {"tensor_model_parallel_size": 5}}, r"parallel.tensor_model_parallel_size in \{1, 2, 4, 8, 16\}"),
        ({"model": {"tau_mode": "learned", "merge": "ward"}}, "needs model.merge = density"),
        ({"training": {"tau_gate": "annealed"}}, "needs model.tau_mode = learned"),
        ({"training": {"tau_anneal_share": 1.0}}, "tau_anneal_share = 1.0: must be between 0 and 1"),
        ({"training": {"tau_temperature_end": 0.5}}, "tau_temperature_end = 0.5: must be positive and at most"),
        (
            {"model": {"num_groups": 3, "num_heads": 48}, "parallel": {"tensor_model_parallel_size": 2}},
            r"one must divide the other.*in \{1\}",
        ),
        ({"training": {"global_batch_size": 30, "micro_batch_size": 4}}, "= 4 x 4 = 16: use a multiple of 16"),
        ({"data": {"num_streams": 12, "dir": "x"}}, "not a multiple of data.num_streams = 12"),
        ({"data": {"dir": ""}}, "data.dir is empty"),
    ],
)
def test_cross_checks_name_key_value_and_fix(change: dict, message: str) -> None:
    values = {"data": {"dir": "x"}} | change
    with pytest.raises(ConfigError, match=message):
        check_config(
            from_dict(values), 4 if "parallel" not in change else change["parallel"]["tensor_model_parallel_size"] * 2
        )


@pytest.mark.parametrize("stage", [0, 3])
def test_zero_stages_that_cannot_train_in_bf16(stage: int) -> None:
    with pytest.raises(ConfigError, match=rf"zero_stage = {stage} in bf16: .*use training.zero_stage 1 or 2"):
        check_precision(stage, True)
    check_precision(stage, False)
    check_precision(1, True)


def test_the_generated_page_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "config.md"
    assert page.read_text() == render(), "run: python -m megatron_dla.config.docs > docs/config.md"


OLD = "parallel: {tensor: 2, sequence: true}\noptimizer: {clip: 0.5}\n"


def test_old_keys_are_read_under_their_new_names(tmp_path, capsys) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    config = load_config(path, ["parallel.tensor=4"])
    assert (config.parallel.tensor_model_parallel_size, config.parallel.sequence_parallel) == (4, True)
    assert config.optimizer.clip_grad == 0.5
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 4 and all("parallel.tensor_model_parallel_size" in notes[n] for n in (0, 3))
    adapter = tmp_path / "adapter.yaml"
    adapter.write_text("delta_mem: {heads: [q], layers: [1]}\n")
    memory = load_any(adapter).delta_mem
    assert (memory.target_modules, memory.layers_to_transform) == (("q_proj",), (1,))


def test_an_override_of_either_name_wins_over_the_file(tmp_path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    assert load_config(path, ["optimizer.clip_grad=0.1"]).optimizer.clip_grad == 0.1
    path.write_text("optimizer: {clip_grad: 0.5}\n")
    assert load_config(path, ["optimizer.clip=0.1"]).optimizer.clip_grad == 0.1


def test_both_names_of_a_key_with_different_values_are_an_error(tmp_path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("optimizer: {clip: 0.5, clip_grad: 0.5}\n")
    assert load_config(path).optimizer.clip_grad == 0.5
    with pytest.raises(ConfigError, match=r"optimizer.clip_grad = 0.2.*optimizer.clip = 0.1"):
        load_config(path, ["optimizer.clip=0.1", "optimizer.clip_grad=0.2"])
    path.write_text("optimizer: {clip: 0.5, clip_grad: 0.25}\n")
    with pytest.raises(ConfigError, match=r"optimizer.clip_grad = 0.25.*optimizer.clip = 0.5"):
        load_config(path)
