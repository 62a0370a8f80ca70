"""Reading Hugging Face directories: config.json, weights in one file or several, fingerprints."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_dla.errors import CheckpointError
from megatron_dla.hf.directory import WEIGHTS_INDEX, DirectoryWeights, fingerprint, read_config
from megatron_dla.hf.load import load_backbone
from tests.support.tiny_hf import build_base, save_base


def test_fingerprint_is_of_the_weights_whatever_the_dtype_and_place(tmp_path):
    save_base(tmp_path / "base")
    model = load_backbone(tmp_path / "base")
    want = fingerprint(tmp_path / "base").sha256
    assert want == fingerprint(model).sha256 == fingerprint(build_base().state_dict()).sha256
    assert fingerprint(model.bfloat16()).sha256 == want and fingerprint(build_base(seed=1)).sha256 != want
    changed = build_base()
    with torch.no_grad():
        changed.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.1
    assert fingerprint(changed).sha256 != want
    with pytest.raises(CheckpointError, match="embed_tokens"):
        fingerprint({"a": torch.ones(1)})


def test_weights_in_several_files_are_those_of_one(tmp_path):
    model = build_base()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="4KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    one, several = DirectoryWeights(tmp_path / "one"), DirectoryWeights(tmp_path / "several")
    stored = load_file(tmp_path / "one" / "model.safetensors")
    assert set(one) == set(several) == set(stored) and len(several) == len(stored)
    for name, x in stored.items():
        assert torch.equal(one[name], x) and torch.equal(several[name], x)
        assert one.shapes[name] == several.shapes[name] == tuple(x.shape)
    assert fingerprint(tmp_path / "several").sha256 == fingerprint(tmp_path / "one").sha256


@pytest.mark.parametrize("damage", ["none", "cut", "shard", "index", "mapping"])
def test_weights_that_cannot_be_read_are_named(tmp_path, damage):
    build_base().save_pretrained(tmp_path, max_shard_size="4KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    named = shard.name
    if damage == "none":
        (tmp_path / WEIGHTS_INDEX).unlink()
        named = "model.safetensors"
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "shard":
        shard.unlink()
    else:
        (tmp_path / WEIGHTS_INDEX).write_text("{" if damage == "index" else json.dumps({"weight_map": [1]}))
        named = WEIGHTS_INDEX
    with pytest.raises(CheckpointError, match=named):
        DirectoryWeights(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]", b"\xff\xfe"])
def test_a_config_that_cannot_be_read_names_the_fix(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"config\.json.*: try again$"):
        read_config(tmp_path, "try again")
