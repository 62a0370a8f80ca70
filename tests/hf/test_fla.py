"""Models of flash-linear-attention become DLA models that compute the same logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dla.checkpoint.weights import load_merged
from megatron_dla.cli import main
from megatron_dla.config import layer_letters
from megatron_dla.errors import CheckpointError, ConfigError, UserError
from megatron_dla.hf.convert import from_hf
from megatron_dla.hf.verify import megatron_logits, megatron_model

FLA = Path(__file__).parents[1] / "fixtures/fla"


@pytest.mark.parametrize("name", ["groups", "hybrid", "mamba2"])
@pytest.mark.parametrize("capacity, tau", [(2, 0.0), (4, 1.2)])
def test_logits_are_those_of_fla(tmp_path, name, capacity, tau):
    """Also where slots open and merge at every token (tau 0)."""
    model, layout = megatron_model(from_hf(FLA / name, tmp_path / "step_0", 2, capacity=capacity, tau=tau))
    want = load_file(FLA / name / "logits.st")
    assert layer_letters(layout.model) == ("DA" if name == "hybrid" else "DD")
    assert (layout.model.capacity, layout.model.tau, layout.vocab_size) == (capacity, tau, 64)
    assert layout.seq_len == (2048 if name == "mamba2" else 128)  # config.json of Mamba-2 has no length
    # fla adds 1e-6 to the squared norms of q and k
    assert (megatron_logits(model, want["ids"]) - want["logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("name, more", [("groups", set()), ("mamba2", {"D"})])
def test_bf16_weights_keep_the_scalars_of_the_recurrence_fp32(tmp_path, name, more):
    shutil.copytree(FLA / name, tmp_path / "bf16")
    path = tmp_path / "bf16/model.safetensors"
    save_file({name: x.bfloat16() for name, x in load_file(path).items()}, path, metadata={"format": "pt"})
    merged, _ = load_merged(from_hf(tmp_path / "bf16", tmp_path / "step_0"))
    fp32 = {key.rsplit(".", 1)[-1] for key, x in merged.items() if x.dtype == torch.float32}
    assert fp32 == {"A_log", "dt_bias", "slot_scale", "slot_bias"} | more


@pytest.mark.parametrize("name, key, value", [
    ("hybrid", "use_gate", False), ("hybrid", "allow_neg_eigval", True), ("hybrid", "conv_bias", True),
    ("hybrid", "hidden_act", "relu"), ("hybrid", "output_gate_activation", "sigmoid"),
    ("hybrid", "attn.window_size", 64), ("hybrid", "attn.qkv_bias", True),
    ("mamba2", "rmsnorm", False), ("mamba2", "norm_before_gate", True), ("mamba2", "D_has_hdim", True),
    ("mamba2", "n_groups", 2), ("mamba2", "dt_limit", [0.001, 0.1]), ("mamba2", "use_bias", True),
])  # fmt: skip
def test_a_setting_that_is_computed_differently_is_named(tmp_path, name, key, value):
    shutil.copytree(FLA / name, tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    (config["attn"] if key.startswith("attn.") else config)[key.removeprefix("attn.")] = value
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        from_hf(tmp_path / "model", tmp_path / "out")
    assert f"{key} = {value}" in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, change", [
    ("model.layers.0.attn.a_proj.weight", lambda x: x[:3].clone()),
    ("model.layers.0.attn.q_conv1d.weight", lambda x: x[..., 1:].clone()),
    ("model.layers.1.mlp.down_proj.weight", lambda x: x.T.contiguous()),
    ("model.layers.1.attn.o_norm.weight", None),
    ("model.layers.0.attn.extra", lambda x: torch.ones(1)),
])  # fmt: skip
def test_weights_that_do_not_fit_are_named(tmp_path, name, change):
    shutil.copytree(FLA / "groups", tmp_path / "model")
    weights = load_file(FLA / "groups/model.safetensors")
    found = weights.pop(name, None)
    if change is not None:
        weights[name] = change(found)
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        from_hf(tmp_path / "model", tmp_path / "out")
    assert name in str(error.value) and not (tmp_path / "out").exists()


def test_slots_are_options_of_the_command(tmp_path, capsys):
    out = tmp_path / "step_0"
    assert main(["convert", "from-hf", str(FLA / "groups"), str(out), "--capacity", "5", "--tau", "1.1"]) == 0
    model = load_merged(out)[1].model
    assert (model.capacity, model.tau) == (5, 1.1)
    with pytest.raises(ConfigError, match="capacity"):
        from_hf(FLA / "groups", tmp_path / "out", capacity=1)


def test_slots_are_not_options_for_other_models(exported, tmp_path):
    with pytest.raises(UserError, match="--capacity"):
        from_hf(exported("gdn").directory, tmp_path / "out", capacity=4)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path, equal):
    shutil.copytree(FLA / "groups", tmp_path / "model")
    path, weights = tmp_path / "model/config.json", load_file(FLA / "groups/model.safetensors")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    weights["lm_head.weight"] = weights["model.embeddings.weight"] + (not equal)
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    if equal:
        assert "output_layer.weight" not in load_merged(from_hf(tmp_path / "model", tmp_path / "out"))[0]
        return
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs .* tie_word_embeddings = true"):
        from_hf(tmp_path / "model", tmp_path / "out")
