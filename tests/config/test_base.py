"""A config that names another one as its base."""

import pytest

from megatron_dla.config import RunConfig, load_config
from megatron_dla.errors import ConfigError


def test_keys_of_a_config_go_over_those_of_its_base(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "root.yaml").write_text(
        "data: {sources: {a: {dir: x}, b: {dir: y}}}\nmodel: {tau: 1.0, capacity: 8, pattern: DA}\n"
        "optimizer: {lr: 1e-3}\n"
    )
    (tmp_path / "middle.yaml").write_text("base: root.yaml\nmodel: {tau: 0.5}\ntraining: {steps: 3}\nlogging:\n")
    top = tmp_path / "sub" / "top.yaml"
    top.write_text("base: ../middle.yaml\nmodel: {capacity: 9}\ndata: {sources: {a: {dir: z}}}\noptimizer:\n")
    monkeypatch.chdir(tmp_path / "sub")  # a base is looked for beside the config that names it
    config = load_config(top, ["model.pattern=A"])
    assert (config.model.tau, config.model.capacity, config.model.pattern) == (0.5, 9, "A")
    assert (config.optimizer.lr, config.training.steps) == (1e-3, 3)
    assert list(config.data.sources) == ["a"]  # a key is replaced as a whole


def test_a_shipped_config_is_a_base_by_its_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: dla_gdn_1b3\nmodel: {tau: 1.25}\n")
    assert load_config(path) == load_config("dla_gdn_1b3", ["model.tau=1.25"])
    path.write_text("base: delta_mem_base\ntraining: {steps: 7}\n")
    config = load_config(path)
    assert isinstance(config, RunConfig) and config.training.steps == 7


def test_an_old_name_in_a_base_does_not_hide_the_new_one(tmp_path):
    (tmp_path / "old.yaml").write_text("parallel: {tensor: 4}\n")
    (tmp_path / "new.yaml").write_text("base: old.yaml\nparallel: {tensor_model_parallel_size: 2}\n")
    assert load_config(tmp_path / "new.yaml").parallel.tensor_model_parallel_size == 2


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("nowhere", ["base", "'nowhere'", "dla_gdn_1b3"]),
        ("[a]", ["base", "['a']"]),
        ("", ["base", "None"]),
        ("a.yaml", ["base", "'a.yaml'", "itself"]),
        ("b.yaml", ["b.yaml", "base", "'a.yaml'", "itself"]),
        ("c.yaml", ["model.taau"]),
        ("d.yaml", ["d.yaml", "not valid YAML"]),
    ],
)
def test_a_wrong_base_is_named(tmp_path, base, words):
    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    (tmp_path / "c.yaml").write_text("model: {taau: 1}\n")
    (tmp_path / "d.yaml").write_text("model: {\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "a.yaml")
    assert [word for word in words if word not in str(error.value)] == []
