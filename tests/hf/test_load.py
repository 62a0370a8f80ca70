"""Hugging Face directories as base models: complete weights, tokenizers that fit, and what is refused by name."""

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.errors import CheckpointError
from megatron_dla.hf.load import load_backbone, load_tokenizer
from megatron_dla.serving.hf_model import attach
from megatron_dla.serving.load import load_adapted
from tests.support.tiny_hf import FAMILIES, build_base, save_base, tokens

Q, HEAD, EMBEDDING = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def base(tmp_path):
    """`base(family)`: a directory with random weights; tied embeddings for smollm3."""
    return lambda family="llama": save_base(tmp_path / family, family)


def edit(directory, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(directory) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in load_file(directory / "model.safetensors").items()}


def store(directory, tensors) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_complete_weights_load_bit_for_bit(base, family, capfd) -> None:
    directory = base(family)
    stored, want = weights(directory), build_base(family)
    assert (HEAD in stored) == (family != "smollm3")
    capfd.readouterr()
    got = load_backbone(directory)
    assert all(torch.equal(got.state_dict()[name], x) for name, x in stored.items())
    with torch.no_grad():
        assert torch.equal(got(tokens()).logits, want(tokens()).logits)
    assert capfd.readouterr().err == ""


def test_a_stored_copy_of_tied_embeddings_and_old_buffers_do_no_harm(base) -> None:
    directory = base("smollm3")
    tensors = weights(directory)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3), HEAD: tensors[EMBEDDING].clone()}
    store(directory, tensors | old)
    assert torch.equal(load_backbone(directory).lm_head.weight, tensors[EMBEDDING])


BROKEN = {
    "missing": (lambda t: t.pop(Q), rf"{Q} is missing from the weights \(1 in all\)"),
    "head": (lambda t: t.pop(HEAD), rf"{HEAD} is missing from the weights"),
    "bias": (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}), "q_proj.bias is in the"),
    "layer": (lambda t: t.update({Q.replace("1", "3"): t[Q].clone()}), "layers.3.* has no place in the model"),
    "shape": (
        lambda t: t.update({Q: t[Q][:12].clone()}),
        rf"{Q} has shape \[12, 24\], config.json asks for \[24, 24\]",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_incomplete_weights_are_named_and_nothing_is_invented(base, what, capfd) -> None:
    directory, (change, message) = base(), BROKEN[what]
    tensors = weights(directory)
    change(tensors)
    store(directory, tensors)
    capfd.readouterr()
    with warnings.catch_warnings(action="error"), pytest.raises(CheckpointError, match=message) as error:
        load_backbone(directory)
    assert str(directory) in str(error.value) and "fetch both again" in str(error.value)
    assert capfd.readouterr().err == ""  # no table of transformers' beside it


def test_tied_weights_that_differ_are_refused(base) -> None:
    directory = base("smollm3")
    tensors = weights(directory)
    store(directory, tensors | {HEAD: tensors[EMBEDDING] + 1})
    with pytest.raises(CheckpointError, match=f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings"):
        load_backbone(directory)


def test_padded_vocabularies_are_normal_and_short_ones_are_not(base) -> None:
    directory = base()  # 259 tokens for 260 rows
    assert len(load_tokenizer(directory)) == 259
    tokenizer = load_tokenizer(directory)
    tokenizer.add_tokens(["<one>"])
    tokenizer.save_pretrained(directory)
    assert len(load_tokenizer(directory)) == 260
    tokenizer.add_tokens(["<two>"])
    tokenizer.save_pretrained(directory)
    with pytest.raises(CheckpointError, match=r"vocab_size = 260, .* has 261 tokens"):
        load_tokenizer(directory)


def test_a_tokenizer_setting_of_a_wrong_type_is_found_as_it_loads(base) -> None:
    directory = base()
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": [512]}))
    with pytest.raises(CheckpointError, match=re.escape(repr(str(directory)))):
        load_tokenizer(directory)


SERVED = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                           "original_max_position_embeddings": 16}}),
    "window": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None}),
}  # fmt: skip


@pytest.mark.parametrize("what", SERVED)
def test_what_transformers_computes_is_served(base, what) -> None:
    """Not trained here (`hf.backbones` refuses it), but an adapter trained elsewhere works, wherever calls are cut."""
    family, changes = SERVED[what]
    directory = base(family)
    edit(directory, **changes)
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(directory)
    adapted = attach(load_backbone(directory), DeltaMemConfig(output_init="random", output_gain=1.0), seed=1)
    ids = tokens(1, 30)
    with torch.no_grad():
        whole = adapted(ids)
        first = adapted(ids[:, :11], use_cache=True)
        rest = adapted(ids[:, 11:], states=first.states, past_key_values=first.past_key_values, use_cache=True)
        plain = adapted.base(ids).logits
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole.logits, rtol=0, atol=1e-5)
    assert (whole.logits - plain).abs().max() > 1e-4


REFUSED = {
    "gpt2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "model_type = gpt2 with architecture GPT2"),
    "gemma": ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "model_type = gemma2"),
    "qwen2": ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "model_type = qwen2"),
    "moe": ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "model_type = qwen3_moe"),
    "none": ({"model_type": None}, "model_type = None"),
    "class": ({"architectures": ["LlamaForSequenceClassification"]}, "architecture LlamaForSequenceClassification"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method = gptq"),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type = dynamic"),
    "old longrope": ({"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "rope_type = longrope"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported, only 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_other_models_are_refused_with_the_list(base, what) -> None:
    directory, (changes, message) = base(), REFUSED[what]
    edit(directory, **changes)
    for load in (load_backbone, load_tokenizer, lambda path: load_adapted(path, None)):
        with pytest.raises(CheckpointError, match=re.escape(message)) as error:
            load(directory)
        assert str(directory / "config.json") in str(error.value)
        for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM"):
            assert name in str(error.value)


def test_models_in_memory_are_checked_too() -> None:
    import transformers

    config = build_base().config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(CheckpointError, match="rope_type = dynamic"):
        attach(transformers.LlamaForCausalLM(config), DeltaMemConfig())
    config = build_base().config
    with pytest.raises(CheckpointError, match="architecture LlamaForSequenceClassification"):
        attach(transformers.LlamaForSequenceClassification(config), DeltaMemConfig())

    class Derived(transformers.LlamaForCausalLM):
        pass

    attach(Derived(config), DeltaMemConfig())


def test_base_directories_without_a_supported_model_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="damaged"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(CheckpointError, match=r"model_type = gpt_neox .*: use a model of one of Llama"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="damaged"):
        load_backbone(tmp_path)
