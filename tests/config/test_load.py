"""Loading, overrides and the round trip of a resolved config."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dla.config import (
    AdapterRunConfig,
    ModelSection,
    RunConfig,
    check_config,
    check_model,
    check_precision,
    dump_config,
    from_dict,
    load_config,
    to_dict,
)
from megatron_dla.config.docs import render
from megatron_dla.config.load import fill
from megatron_dla.errors import ConfigError

TP = "parallel.tensor_model_parallel_size"


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


MIXTURE = {"data.dir": "", "data.sources": {"a": {"dir": "y"}, "b": {"dir": "z", "weight": 3}}}


def stage(tokens: int, **weights: float) -> dict:
    return {"from_tokens": tokens, "weights": weights}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.num_groups": 5}, ["model.num_groups = 5", "model.num_heads = 48", "1, 2, 3, 4, 6"]),
        ({"parallel.tensor_model_parallel_size": 5}, [f"{TP} = 5", "{1, 2, 4, 8, 16}"]),
        ({"model.tau_mode": "learned", "model.merge": "ward"}, ["model.tau_mode = learned", "model.merge = density"]),
        (
            {"model.tau_mode": "learned", "model.slot_weights": "content"},
            ["model.tau_mode = learned", "model.slot_weights = content"],
        ),
        ({"model.dt_min": 0.2}, ["model.dt_min = 0.2", "model.dt_max = 0.1"]),
        (
            {"model.boundary": "every", "model.tau_mode": "learned"},
            ["model.boundary = every", "model.tau_mode = learned", "model.tau_mode=fixed"],
        ),
        (
            {"model.tau_mode": "calibrated", "training.zero_stage": 3},
            ["training.zero_stage = 3", "model.tau_mode = calibrated", "1 or 2"],
        ),
        (
            {"model.tau_mode": "calibrated", "tau.calibration_steps": 1000},
            ["tau.calibration_steps = 1000", "training.steps = 1000", "100"],
        ),
        ({"model.tau_mode": "calibrated", "model.boundary": "random"}, ["model.boundary = random", "calibrated"]),
        ({"tau.gate": "annealed"}, ["tau.gate = annealed", "model.tau_mode = learned"]),
        (
            {"tau.gate": "annealed", "model.tau_mode": "learned", "model.pattern": "GA"},
            ["tau.gate = annealed", "model.pattern = GA"],
        ),
        (
            {"parallel.cp_scheme": "chain", "parallel.context_parallel_size": 2, "model.tau_mode": "learned"},
            ["parallel.cp_scheme = chain", "model.tau_mode = learned"],
        ),
        (
            {"parallel.cp_scheme": "chain", "parallel.context_parallel_size": 2, "model.slot_weights": "content"},
            ["parallel.cp_scheme = chain", "model.slot_weights = content"],
        ),
        ({"tau.temperature_end": 0.5}, ["tau.temperature_end = 0.5", "tau.temperature_start = 0.3"]),
        (
            {"model.num_groups": 3, "parallel.tensor_model_parallel_size": 2},
            ["model.num_groups = 3", f"{TP} = 2", "{1}"],
        ),
        ({"parallel.sequence_parallel": True}, ["parallel.sequence_parallel = true", TP]),
        ({"training.global_batch_size": 30}, ["training.global_batch_size = 30", "micro_batch_size", "16"]),
        ({"data.num_streams": 12}, ["training.global_batch_size = 32", "data.num_streams = 12", "1, 2, 4, 8, 16, 32"]),
        ({"data.num_streams": 6}, ["data.num_streams = 6", "multiple of 4"]),
        ({"data.dir": ""}, ["data.dir"]),
        ({"data.sources": {"a": {"dir": "y"}}}, ["data.dir = 'x'", "data.sources = a"]),
        ({"data.dir": "", "data.sources": {"a": {"dir": ""}}}, ["data.sources.a.dir"]),
        ({"data.dir": "", "data.sources": {"a": {"dir": "y", "weight": 0}}}, ["data.sources", "{'a': 0.0}"]),
        ({"data.stages": [stage(5, a=1)]}, ["data.stages", "data.sources"]),
        ({**MIXTURE, "data.stages": [stage(5, c=1)]}, ["data.stages[0].weights", "'c'", "a, b"]),
        ({**MIXTURE, "data.stages": [stage(5, a=0)]}, ["data.stages[0].weights", "{'a': 0.0}"]),
        ({**MIXTURE, "data.stages": [stage(5, a=1), stage(5, b=1)]}, ["data.stages[1].from_tokens = 5"]),
        ({"run.name": "a/b"}, ["run.name = 'a/b'"]),
        ({"training.offload_optimizer": True, "training.zero_stage": 0}, ["training.offload_optimizer = true"]),
    ],
    ids=str,
)
def test_cross_checks_name_key_value_and_fix(changes: dict, words: list[str]) -> None:
    values: dict[str, dict] = {"data": {"dir": "x"}}
    for key, value in changes.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    with pytest.raises(ConfigError) as error:
        check_config(from_dict(values), 4 * values.get("parallel", {}).get("tensor_model_parallel_size", 1))
    assert all(word in str(error.value) for word in words), error.value


def test_without_slots_a_learned_tau_does_not_forbid_the_chain() -> None:
    parallel = {"cp_scheme": "chain", "context_parallel_size": 2}
    model = {"pattern": "G", "tau_mode": "learned"}
    check_config(from_dict({"model": model, "parallel": parallel, "data": {"dir": "x"}}), 8)


# what YAML may hold for a key, and what the config holds then
READ = {
    "model.tau": [(1, 1.0), ("1e-1", 0.1), (0.5, 0.5)],
    "training.steps": [(7, 7), (7.0, 7), ("1e3", 1000), ("12", 12)],
    "data.reset_at_documents": [(True, True), (False, False)],
    "run.name": [("a", "a"), (7, "7"), (1.5, "1.5")],
    "delta_mem.layers_to_transform": [(None, None), ([0, 2], (0, 2)), (["1"], (1,))],
    "delta_mem.alpha": [("2e1", 20.0)],
}
REFUSED = {
    "model.tau": [True, "warm", ".nan", float("inf"), None, 3.5, -1, [1], 10**400],
    "training.steps": [0, 2.5, True, "1e400", "many", None],
    "model.capacity": [1],
    "parallel.context_parallel_size": [0, -2],
    "optimizer.lr": [0, -1e-3],
    "optimizer.beta1": [1, -0.1],
    "optimizer.min_lr_ratio": [1.1],
    "tau.anneal_share": [0, 1],
    "run.seed": [-1, 2**31],
    "training.zero_stage": [4],
    "data.reset_at_documents": [1, "true", None],
    "run.name": [True, None, ["a"]],
    "model.backbone": ["mamba", True, 3],
    "model.gated_norm": ["all", True],
    "model.conv_bias": [1, "yes"],
    "model.ffn_hidden_size": [-1],
    "training.save_every": [-1],
    "episodes.write_length": [1],
    "gate_loss.target": [1.5],
    "delta_mem.rank": [4, 8.5],
    "delta_mem.num_states": [9],
    "data.prefetch_rows": [-1],
    "data.packing": ["first_fit"],
    "data.sources": ["x", ["a"]],
    "data.stages": [5],
    "delta_mem.target_modules": ["q", ["k_proj"], []],
}


def filled(key: str, value: object) -> object:
    section, name = key.split(".")
    kind = AdapterRunConfig if section in ("delta_mem", "episodes", "gate_loss") else RunConfig
    return getattr(getattr(fill(kind, {section: {name: value}}), section), name)


@pytest.mark.parametrize("key", READ)
def test_values_are_read_as_their_fields_type(key: str) -> None:
    for value, want in READ[key]:
        got = filled(key, value)
        assert got == want and type(got) is type(want), value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"sources": {"a": {"weight": -1}}}, "data.sources.a.weight = -1"),
        ({"sources": {"a": {"share": 1}}}, "data.sources.a.share = 1"),
        ({"sources": {"a": {"max_epochs": 0.5}}}, "data.sources.a.max_epochs = 0.5"),
        ({"stages": [{"from_tokens": 0, "weights": {}}]}, "data.stages[0].from_tokens = 0"),
        ({"stages": [{"from_tokens": 5, "weights": {"a": -1}}]}, "data.stages[0].weights.a = -1"),
    ],
)
def test_values_inside_sources_and_stages_are_named(data: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        from_dict({"data": data})


@pytest.mark.parametrize("key", REFUSED)
def test_values_of_a_wrong_type_or_range_are_refused(key: str) -> None:
    for value in REFUSED[key]:
        with pytest.raises(ConfigError, match=rf"{re.escape(key)}\b") as error:
            filled(key, value)
        assert repr(value)[:100] in str(error.value) or key == "delta_mem.target_modules", (value, error.value)


def test_lists_and_mappings_name_the_item() -> None:
    for value, at in (([0, "x"], "delta_mem.layers_to_transform[1] = 'x'"), ([1.5], "layers_to_transform[0] = 1.5")):
        with pytest.raises(ConfigError, match=re.escape(at)):
            filled("delta_mem.layers_to_transform", value)


def test_unknown_keys_are_named_with_the_nearest_known_one() -> None:
    for values, unknown, known in (
        ({"modle": {}}, "'modle'", "'model'"),
        ({"model": {"hiden_size": 8}}, "'model.hiden_size'", "'hidden_size'"),
        ({"tau": {"zzz": 1}}, "'tau.zzz'", "anneal_share"),
    ):
        with pytest.raises(ConfigError) as error:
            from_dict(values)
        assert unknown in str(error.value) and known in str(error.value)
    with pytest.raises(ConfigError, match="model = 3"):
        from_dict({"model": 3})


def test_an_adapters_sections_keep_their_own_defaults(tmp_path) -> None:
    path = tmp_path / "adapter.yaml"
    path.write_text("delta_mem:\noptimizer: {lr: 1.0e-3}\ntraining: {steps: 90}\n")
    config = load_config(path)
    own, training = config.optimizer, config.training
    assert (own.lr, own.warmup_steps, own.weight_decay, own.min_lr_ratio) == (1e-3, 7, 0.0, 0.0)
    assert (training.steps, training.micro_batch_size, training.log_every, training.eval_every) == (90, 1, 1, 0)


def test_programmatic_configs_are_checked_for_ranges_too() -> None:
    config = from_dict({"data": {"dir": "x"}})
    check_config(config, 1)
    config.training.micro_batch_size = 0
    with pytest.raises(ConfigError, match=r"training\.micro_batch_size = 0"):
        check_config(config, 1)
    with pytest.raises(ConfigError, match=r"model\.conv_kernel = 0"):
        check_model(ModelSection(conv_kernel=0))


NO_PYDANTIC = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "pydantic_core", "annotated_types"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
from megatron_dla.cli import build_parser
import megatron_dla.hf.code_files, megatron_dla.hf.load, megatron_dla.kernels.bench.run
import megatron_dla.smoke.model, megatron_dla.smoke.run
build_parser()
megatron_dla.hf.code_files.code_files()
"""


def test_kernels_and_the_gpu_smoke_test_do_not_need_pydantic() -> None:
    done = subprocess.run([sys.executable, "-c", NO_PYDANTIC], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stage", [0, 3])
def test_zero_stages_that_cannot_train_in_bf16(stage: int) -> None:
    with pytest.raises(ConfigError, match=rf"training\.zero_stage = {stage}\b"):
        check_precision(stage, True)
    check_precision(stage, False)
    check_precision(1, True)


def test_the_generated_page_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "config.md"
    assert page.read_text() == render(), "run: python -m megatron_dla.config.docs docs/config.md"


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
    memory = load_config(adapter).delta_mem
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
