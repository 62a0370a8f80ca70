"""Adapter directories: the same logits from both formats, and everything else refused with a reason."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dla.adapters import upstream
from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.files import CONFIG, WEIGHTS, read_adapter, write_adapter
from megatron_dla.adapters.fingerprint import Fingerprint
from megatron_dla.errors import CheckpointError, ConfigError
from megatron_dla.hf.directory import fingerprint
from megatron_dla.serving.load import attach_adapter
from tests.support.tiny_hf import CONFIGS, adapter_of, build_adapted, build_base, logits

PARTIAL = DeltaMemConfig(
    rank=16, target_modules=("o_proj",), layers_to_transform=(0, 2), couple_lambda=False, update="lambda_outside"
)
STORED = {**CONFIGS, "partial": PARTIAL, "static": DeltaMemConfig(memory="static"),
          "bounded": DeltaMemConfig(max_output_ratio=0.01, half_life=20.0),
          "pre_call": DeltaMemConfig(write="message", message_read="pre_call")}  # fmt: skip
PUBLISHED = ["TSW", "MSW", "partial", "pre_call"]


@pytest.fixture
def published(tmp_path):
    """A published-form directory of a TSW adapter, as others write it: with inactive heads of zeros."""
    model = build_adapted()
    write_adapter(tmp_path / "a", adapter_of(model), formats=["upstream"])
    path = tmp_path / "a" / upstream.WEIGHTS
    flat = torch.load(path, weights_only=True)
    for layer in range(3):
        for head in "kv":
            flat[f"model.layers.{layer}.self_attn.delta_{head}_proj"] = torch.zeros(12, 8)
    torch.save(flat, path)
    return tmp_path / "a", flat


def change(directory, **values) -> None:
    path = directory / upstream.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- acceptance 12: round trips


@pytest.mark.parametrize("name", STORED)
def test_saved_adapter_computes_the_same_on_a_fresh_model(tmp_path, name):
    model = build_adapted(STORED[name])
    write_adapter(tmp_path, adapter_of(model))
    found = read_adapter(tmp_path)
    assert found.config == STORED[name] and found.base == fingerprint(model.base, "tiny")
    assert found.sha256() == adapter_of(model).sha256()
    assert torch.equal(logits(attach_adapter(build_base(), found)), logits(model))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_form_computes_the_same(tmp_path, name):
    model = build_adapted(STORED[name])
    write_adapter(tmp_path, adapter_of(model), formats=["upstream"])
    found = read_adapter(tmp_path)
    assert found.config == STORED[name] and found.base is None
    assert torch.equal(logits(attach_adapter(build_base(), found)), logits(model))
    flat = torch.load(tmp_path / upstream.WEIGHTS, weights_only=True)
    heads = {f"delta_{module}" for module in STORED[name].target_modules}
    gates = {"beta_proj", "beta_bias"} | (set() if STORED[name].couple_lambda else {"lambda_proj", "lambda_bias"})
    wanted = {"memory_q_proj", "memory_k_proj", "memory_v_proj"} | heads | gates
    layers = STORED[name].layers_to_transform or range(3)
    assert set(flat) == {f"model.layers.{layer}.self_attn.{key}" for layer in layers for key in wanted}


def test_published_config_says_what_other_loaders_need(tmp_path):
    config = DeltaMemConfig(num_states=2, beta_bias=-5.0, rowwise_gates=False, layers_to_transform=(1,))
    write_adapter(tmp_path, adapter_of(build_adapted(config)), formats=["upstream"])
    values = json.loads((tmp_path / upstream.CONFIG).read_text())
    assert {key: values[key] for key in (
        "rank", "alpha", "num_state_heads", "memory_write_granularity", "rankwise_gates", "beta_bias_init",
        "delta_heads", "target_layers", "output_init", "normalize_qk",
    )} == {
        "rank": 8, "alpha": 16.0, "num_state_heads": 2, "memory_write_granularity": "token", "rankwise_gates": False,
        "beta_bias_init": -5.0, "delta_heads": ["q", "o"], "target_layers": [1], "output_init": "base_slice_fixed",
        "normalize_qk": True,
    }  # fmt: skip


def test_bf16_storage_halves_the_file_and_rounds_once(tmp_path):
    model = build_adapted()
    for name, dtype in (("full", None), ("half", torch.bfloat16)):
        write_adapter(tmp_path / name, adapter_of(model), dtype=dtype, formats=["safetensors", "upstream"])
    size = {name: (tmp_path / name / WEIGHTS).stat().st_size for name in ("full", "half")}
    assert 0.5 < size["half"] / size["full"] < 0.65
    half = read_adapter(tmp_path / "half").tensors
    for layer, named in model.tensors().items():
        for name, want in named.items():
            assert half[layer][name].dtype == torch.bfloat16 and torch.equal(half[layer][name], want.bfloat16())
    (tmp_path / "half" / CONFIG).unlink()  # now the published pair is read
    again = read_adapter(tmp_path / "half").tensors
    assert all(torch.equal(again[i][n], half[i][n]) for i in half for n in half[i])


def test_inactive_heads_of_zeros_are_dropped_and_others_refused(published):
    directory, flat = published
    assert torch.equal(logits(attach_adapter(build_base(), read_adapter(directory))), logits(build_adapted()))
    flat["model.layers.1.self_attn.delta_v_proj"][3, 4] = 1e-3
    torch.save(flat, directory / upstream.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"delta_v_proj of layer 1 is not zero.*'v' is not supported"):
        read_adapter(directory)
    flat["model.layers.1.self_attn.delta_v_proj"].zero_()
    torch.save(flat, directory / upstream.WEIGHTS)
    change(directory, delta_heads=["q"])
    with pytest.raises(CheckpointError, match=r"delta_o_proj of layer 0 is not zero.*switched off"):
        read_adapter(directory)


# ---- refused


@pytest.mark.parametrize("key, value", [
    ("memory_write_granularity", "sentence_mean"), ("normalize_qk", False), ("trainable_delta_scale", True),
    ("delta_o_rmsnorm", True), ("memory_readout_mode", "latent"), ("rank", 4), ("rank", "8"), ("surprise", 1),
    ("state_update_mode", "other"), ("num_memory_partitions", 2),
])  # fmt: skip
def test_published_config_that_asks_for_something_else_is_refused(published, key, value):
    change(published[0], **{key: value})
    with pytest.raises(CheckpointError, match=upstream.CONFIG):
        read_adapter(published[0])


def test_published_config_with_inert_keys_is_taken(published):
    change(published[0], slot_read_top_k=0, latent_memory_slots=4, delta_scale_init=1.0, delta_o_rmsnorm_eps=1e-6,
           global_memory_mode="shared_rw", memory_partition_routing="soft")  # fmt: skip
    assert read_adapter(published[0]).config == DeltaMemConfig()


def test_forms_that_the_published_files_cannot_hold(tmp_path):
    for name, reason in (("static", "static"), ("SSW", "streaming"), ("bounded", "max_output_ratio = 0.01")):
        with pytest.raises(ConfigError, match=reason):
            write_adapter(tmp_path / name, adapter_of(build_adapted(STORED[name])), formats=["upstream"])
        assert not (tmp_path / name).exists()


class Trap:
    def __reduce__(self):
        return open, ("sprung", "w")


@pytest.mark.parametrize("content", ["pickle", "list", "key", "cut", "missing"])
def test_published_weights_that_are_not_plain_tensors_run_no_code(published, content, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    directory, flat = published
    path = directory / upstream.WEIGHTS
    if content == "pickle":
        torch.save({**flat, "model.layers.0.self_attn.beta_bias": Trap()}, path)
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "key":
        torch.save({**flat, "lm_head.weight": torch.ones(1)}, path)
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:200])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=upstream.WEIGHTS):
        read_adapter(directory)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", ["pickle", "cut", "missing", "config", "peft", "key", "unknown key"])
def test_damaged_directories_are_refused(tmp_path, content):
    write_adapter(tmp_path, adapter_of(build_adapted()))
    path = tmp_path / WEIGHTS
    values = json.loads((tmp_path / CONFIG).read_text())
    if content == "pickle":
        path.write_bytes(pickle.dumps(Trap()))
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif content == "missing":
        path.unlink()
    elif content == "config":
        (tmp_path / CONFIG).write_text("{")
    elif content == "peft":
        (tmp_path / CONFIG).write_text(json.dumps(values | {"peft_type": "LORA"}))
    elif content == "unknown key":
        (tmp_path / CONFIG).write_text(json.dumps(values | {"delta_mem": values["delta_mem"] | {"surprise": 1}}))
    else:
        save_file({**load_file(path), "other": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_adapter(tmp_path)


@pytest.mark.parametrize("change", ["transposed", "sign", "config", "null"])
def test_an_adapter_is_known_by_its_checksum(tmp_path, change):
    """Also a square matrix that is transposed, whose shape is right."""
    write_adapter(tmp_path, adapter_of(build_adapted()))
    values, flat = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    name = next(key for key, x in flat.items() if x.dim() == 2)
    if change == "transposed":
        flat[name] = flat[name].mT.contiguous().view(flat[name].shape)
    elif change == "sign":
        flat[name] = -flat[name]
    elif change == "config":
        values["delta_mem"]["alpha"] *= 2
    else:
        values["sha256"] = None
    save_file(flat, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}.*sha256"):
        read_adapter(tmp_path)


def test_keys_that_came_later_are_not_stored_at_their_default():
    """Else the checksum of an older adapter would be another one."""
    assert {"half_life", "max_output_ratio"} & {*DeltaMemConfig().to_dict()} == set()
    values = DeltaMemConfig(half_life=9.0).to_dict()
    assert values["half_life"] == 9.0 and DeltaMemConfig.from_dict(values) == DeltaMemConfig(half_life=9.0)


@pytest.mark.parametrize("value", [None, 0, [], {}, True, ""], ids=repr)
@pytest.mark.parametrize("key", ["peft_type", "base_model_sha256", "base_model_name_or_path", "delta_mem"])
def test_fields_of_another_type_are_refused(tmp_path, key, value):
    model = adapter_of(build_adapted())
    write_adapter(tmp_path, model)
    values = json.loads((tmp_path / CONFIG).read_text())
    for changed in ({**values, key: value}, {name: x for name, x in values.items() if name != key}):
        (tmp_path / CONFIG).write_text(json.dumps(changed))
        if key in changed and (key, value) in [("base_model_name_or_path", ""), ("delta_mem", {})]:
            continue  # a model without a name; all defaults
        with pytest.raises(CheckpointError, match=CONFIG):
            read_adapter(tmp_path)


def test_an_adapter_is_not_overwritten_unasked(tmp_path):
    adapter = adapter_of(build_adapted())
    write_adapter(tmp_path, adapter)
    with pytest.raises(CheckpointError, match="exists"):
        write_adapter(tmp_path, adapter, formats=["upstream"])
    write_adapter(tmp_path, replace(adapter, base=Fingerprint("other", "0")), overwrite=True)
    assert read_adapter(tmp_path).base == Fingerprint("other", "0")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_tensors_that_do_not_fit_change_nothing():
    model = build_adapted()
    before = model.tensors()[0]["beta_bias"].clone()
    wrong = {layer: {name: x + 1 for name, x in named.items()} for layer, named in model.tensors().items()}
    wrong[2]["memory_q_proj"] = torch.zeros(8, 99)
    with pytest.raises(CheckpointError, match=r"layer 2.*memory_q_proj is \[8, 99\]"):
        model.load_tensors(wrong)
    del wrong[2]["memory_q_proj"]
    with pytest.raises(CheckpointError, match="memory_q_proj missing"):
        model.load_tensors(wrong)
    with pytest.raises(CheckpointError, match=r"layers \[0, 1\]"):
        model.load_tensors({0: wrong[0], 1: wrong[1]})
    assert torch.equal(model.tensors()[0]["beta_bias"], before)
