"""Random Hugging Face models of every supported family, a byte-level chat tokenizer, and an adapter with every part
in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.files import Adapter
from megatron_dla.adapters.memory import MemoryInputs
from megatron_dla.hf.directory import fingerprint
from megatron_dla.serving.hf_model import DeltaMemModel, attach

FAMILIES = ("llama", "qwen3", "smollm3")
VOCABULARY, LAYERS, LENGTH = 260, 3, 13
CONFIGS = {
    "TSW": DeltaMemConfig(),
    "MSW": DeltaMemConfig(num_states=2),
    "SSW": DeltaMemConfig(write="message"),
}
# default system text, as SmolLM2's template has one
TEMPLATE = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
be kind<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# roles must alternate, as in Mistral's
MISTRAL = """{{ bos_token or '' }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{
raise_exception('roles must alternate user/assistant') }}{% endif %}{%
if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"""


def build_base(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Three layers with grouped heads; Qwen3 with a head width of its own, SmolLM3's layer 1 without positions."""
    import transformers

    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=256, pad_token_id=257,
        initializer_range=0.3, tie_word_embeddings=family == "smollm3",
    )  # fmt: skip
    torch.manual_seed(seed)
    if family == "mistral":  # looks back five tokens only
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=5))
    elif family == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, head_dim=8))
    elif family == "smollm3":
        model = transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**sizes, no_rope_layer_interval=2))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with torch.no_grad():  # norms that matter
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def build_adapted(config: DeltaMemConfig | None = None, family: str = "llama", base: Any = None) -> DeltaMemModel:
    """Gates that depend on the token, all columns of the steering heads in use."""
    base = build_base(family) if base is None else base
    model = attach(base, config or DeltaMemConfig(), seed=1, dtype=base.dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def build_tokenizer() -> Any:
    """Bytes 0..255, then <|im_end|> (end of text) 256, <pad> 257, <|im_start|> 258."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<pad>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_base(directory: Path, family: str = "llama", seed: int = 0) -> Path:
    """Model and tokenizer as a Hugging Face directory."""
    build_base(family, seed).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def adapter_of(model: DeltaMemModel) -> Adapter:
    """The adapter of a model, as it is written to files."""
    return Adapter(model.config, model.tensors(), fingerprint(model.base, "tiny"))


def logits(model: DeltaMemModel) -> Tensor:
    """Of a second call that continues the states of a first one."""
    with torch.no_grad():
        numbers = torch.arange(13).expand(2, -1) // 3
        first = model(tokens(), inputs=MemoryInputs(message=numbers))
        return model(tokens(seed=1), states=first.states, inputs=MemoryInputs(message=numbers)).logits
