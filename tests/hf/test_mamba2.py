"""Mamba-2 models of transformers become DLA models that compute the same logits and train on."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM

from megatron_dla.checkpoint.weights import load_merged
from megatron_dla.cli import main
from megatron_dla.data_prep.shards import build_shards
from megatron_dla.errors import CheckpointError, ConfigError
from megatron_dla.hf.convert import from_hf, to_hf
from megatron_dla.hf.verify import megatron_logits, megatron_model, verify
from tests.support import tiny, train_workers
from tests.support.byte_level import byte_level

pytestmark = pytest.mark.usefixtures("modules_cache")
SIZES = {
    "hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "num_hidden_layers": 2, "n_groups": 1,
    "vocab_size": 64, "chunk_size": 16,
}  # fmt: skip


def save_model(directory: Path, **changes) -> Mamba2ForCausalLM:
    """A random model, no two of whose parameters are alike."""
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def edit(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"n_groups": 2}, {"use_conv_bias": False, "tie_word_embeddings": True, "conv_kernel": 3}], ids=str
)
@pytest.mark.parametrize("capacity, tau", [(2, 0.0), (4, 1.2)])
def test_logits_are_those_of_transformers(tmp_path, changes, capacity, tau):
    """Also where slots open and merge at every token (tau 0)."""
    oracle = save_model(tmp_path / "model", **changes)
    if oracle.config.n_groups > 1 and not hasattr(oracle.backbone.layers[0].mixer.norm, "group_size"):
        pytest.skip("this release of transformers averages over all groups (5.17), unlike mamba_ssm and later ones")
    step = from_hf(tmp_path / "model", tmp_path / "step_0", 2, capacity=capacity, tau=tau)
    model, layout = megatron_model(step)
    assert (layout.model.capacity, layout.model.tau, layout.vocab_size) == (capacity, tau, 64)
    ids = torch.randint(0, 64, (2, 100), generator=torch.Generator().manual_seed(1))
    got, want = megatron_logits(model, ids), oracle(ids).logits
    assert want.std() > 0.5 and (got - want).abs().max() < 1e-4


def test_a_model_without_a_tokenizer_is_exported_with_the_one_given(tokenizer, tmp_path):
    for rows in (320, 64):
        save_model(tmp_path / f"model_{rows}", vocab_size=rows)
        step = from_hf(tmp_path / f"model_{rows}", tmp_path / f"step_{rows}", capacity=2)
    out = to_hf(tmp_path / "step_320", tmp_path / "out", tokenizer=tokenizer.path)
    assert json.loads((out / "config.json").read_text())["tokenizer_sha256"] == tokenizer.sha256
    assert verify(tmp_path / "step_320", out, weights_only=True) is None
    with pytest.raises(CheckpointError, match=r"tokenizer\.model' has 300 tokens, .* 64 rows: pass --tokenizer"):
        to_hf(step, tmp_path / "small", tokenizer=tokenizer.path)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_it_is_trained_on_and_exported(ranks, tmp_path, name):
    save_model(tmp_path / "model", vocab_size=304)
    if name == "tokenizer.json":
        corpus, data = tiny.write_corpus(tmp_path / "corpus"), tmp_path / "data"
        byte_level(tmp_path / "model", [json.loads(line)["text"] for line in corpus.open()])
        build_shards([corpus], tmp_path / "model", data, workers=1, min_train_shards=8)
    else:
        data = tiny.build_data(tmp_path / "corpus")
        shutil.copy(data / name, tmp_path / "model")
    step = from_hf(tmp_path / "model", tmp_path / "tiny/checkpoints/step_0", capacity=3, tau=1.2)
    before, layout = load_merged(step)
    values = tiny.config_dict(
        data, tmp_path, parallel={"tensor_model_parallel_size": 2}, training={"steps": 3}
    ) | {"model": asdict(layout.model)}  # fmt: skip
    metrics = ranks(2).run(train_workers.train, values)[0]
    assert len(metrics) == 3 and metrics[-1]["loss"] < metrics[0]["loss"]
    trained = tmp_path / "tiny/checkpoints/step_3"
    after = load_merged(trained)[0]
    assert not [key for key, x in before.items() if torch.equal(x, after[key])]
    out = to_hf(trained, tmp_path / "hf_mamba2", tokenizer=data)
    assert (out / "tokenizer.json").is_file() and (out / "tokenizer.model").is_file() == (name == "tokenizer.model")
    assert main(["convert", "verify", str(trained), str(out)]) == 0


def test_bytes_of_an_export_do_not_depend_on_the_weight_files(tmp_path, tokenizer):
    save_model(tmp_path / "model", vocab_size=384, n_groups=2)
    shutil.copy(tokenizer.path, tmp_path / "model" / "tokenizer.model")
    exports = []
    for size in (1, 2, 4):  # of 4 ranks, two read one group
        step = from_hf(tmp_path / "model", tmp_path / f"of_{size}" / "step_0", size)
        out = to_hf(step, tmp_path / f"of_{size}" / "hf", tokenizer=tokenizer.path)
        exports.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert exports[0] == exports[1] == exports[2]
    merged, layout = load_merged(from_hf(out, tmp_path / "back"))
    want, wanted = load_merged(step)
    assert merged.keys() == want.keys() and all(torch.equal(merged[key], x) for key, x in want.items())
    assert layout.model == replace(wanted.model, pattern="DD")


@pytest.mark.parametrize("key, value", [
    ("use_bias", True), ("hidden_act", "relu"), ("time_step_limit", [0.001, 0.1]), ("time_step_limit", [0.0, 1.0]),
])  # fmt: skip
def test_a_setting_that_is_computed_differently_is_named(tmp_path, key, value):
    save_model(tmp_path / "model")
    edit(tmp_path / "model", **{key: value})
    with pytest.raises(CheckpointError) as error:
        from_hf(tmp_path / "model", tmp_path / "out")
    assert f"{key} = {value}" in str(error.value) and not (tmp_path / "out").exists()


def test_infinity_is_read_however_it_is_written(tmp_path):
    save_model(tmp_path / "model")
    for number, limit in enumerate(([0.0, float("inf")], [0.0, {"__float__": "Infinity"}], (0, "inf"))):
        edit(tmp_path / "model", time_step_limit=limit)
        assert from_hf(tmp_path / "model", tmp_path / f"step_{number}").is_dir()
    edit(tmp_path / "model", time_step_limit=3)
    with pytest.raises(CheckpointError, match="damaged"):
        from_hf(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("name, change", [
    ("backbone.layers.0.mixer.in_proj.weight", lambda x: x[:-1].clone()),
    ("backbone.layers.1.mixer.conv1d.weight", lambda x: x[..., 1:].clone()),
    ("backbone.layers.1.mixer.norm.weight", lambda x: x[:16].clone()),
    ("backbone.layers.0.mixer.conv1d.bias", None),
    ("backbone.layers.0.mixer.extra", lambda x: torch.ones(1)),
])  # fmt: skip
def test_weights_that_do_not_fit_are_named(tmp_path, name, change):
    save_model(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    weights = load_file(path)
    found = weights.pop(name, None)
    if change is not None:
        weights[name] = change(found)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        from_hf(tmp_path / "model", tmp_path / "out")
    assert name in str(error.value) and not (tmp_path / "out").exists()


def test_sizes_that_do_not_divide_are_named(tmp_path):
    """A layer without MLP puts no limit on the ranks."""
    save_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"model\.num_heads = 4 .*\{1, 2, 4\}"):
        from_hf(tmp_path / "model", tmp_path / "out", 3)
