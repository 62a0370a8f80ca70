"""The README.md of an exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from megatron_dla.checkpoint.weights import CheckpointLayout
from megatron_dla.config import LETTERS, ModelSection, attention_head_dim, layer_letters
from megatron_dla.data.remote import local_directory
from megatron_dla.errors import UserError
from megatron_dla.files import parse_json
from megatron_dla.hf.releases import tested_range
from megatron_dla.metrics.sinks import read_metrics
from megatron_dla.model.counts import recurrent_states

LORA_MODULES = ["in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- custom_code
- dynamic-linear-attention
{license}---
# {name}

A base language model with Dynamic Linear Attention (arXiv 2606.10650), pretrained with megatron-dla for {step} steps on
rows of {seq_len} tokens. {layers} layers ({letters}), hidden size {hidden}, {parameters:,} parameters.
{mixers}

| | |
|---|---|
| length | trained on rows of {seq_len} tokens; the model has no limit, and longer contexts are not measured here |
| cache of a sequence | {cache} |
{facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```

It needs torch and transformers (tested on {releases}). The Python files here are plain torch: read them before you
trust them. Batches of unequal length are padded on the left (the default here); padded tokens never enter the memory.
The per-head decay, threshold and slot parameters stay fp32 when the model is loaded in bf16. The embedding has {vocab}
rows, of which the tokenizer uses {tokens}. There is no bos token: begin with a prompt.

## Fine-tuning

Trainer and TRL's SFTTrainer work with their defaults (bf16, gradient checkpointing), packed rows included. For PEFT:

```python
from peft import LoraConfig

LoraConfig(target_modules={lora}, task_type="CAUSAL_LM")
```

## Evaluation

```
lm_eval --model hf --model_args pretrained={name},trust_remote_code=True --tasks piqa,lambada_openai --batch_size 8
```

## Serving

`model.generate` on a left-padded batch; `DLACache.clone()` forks a session. megatron-dla has an engine that batches
requests continuously (its docs/serving.md). Engines with CUDA kernels of their own (vLLM, SGLang) do not know the
architecture.
"""


def model_card(
    layout: CheckpointLayout, name: str, parameters: int, tokens: int, run: Path, license: str | None = None
) -> str:
    """What the model is, how it was trained, how to load and use it.

    Args:
        name: the directory's. tokens: the tokenizer's vocabulary. license: an identifier of the Hugging Face hub.
        run: the run directory, whose metrics and config are read where they are there.

    Raises:
        UserError: see `check_license`.
    """
    check_license(license)
    m = layout.model
    letters = layer_letters(m)
    return CARD.format(
        name=name, step=layout.step, seq_len=layout.seq_len, layers=m.num_layers, letters=letters,
        hidden=m.hidden_size, mixers="\n".join(f"- {x}: {_mixer(m, x)}" for x in dict.fromkeys(letters)),
        parameters=parameters, vocab=layout.vocab_size, tokens=tokens, releases=tested_range(),
        license=_front_matter({"license": license}) if license else "", cache=_cache(m, letters),
        facts="\n".join(f"| {key} | {value} |" for key, value in _facts(run, layout.step, license).items()),
        lora=json.dumps([x for x in LORA_MODULES if _has(x, m)]),
    )  # fmt: skip


def check_license(license: str | None) -> None:
    """Raises UserError where it is not one printable line."""
    if license is not None and not (license.strip() and license.isprintable()):
        raise UserError(f"--license {license[:80]!r}: give one printable line, such as apache-2.0")


def _front_matter(values: dict[str, str]) -> str:
    """Lines of the card's front matter, quoted where YAML needs it."""
    return yaml.safe_dump(values, allow_unicode=True, width=float("inf"))


def _mixer(m: ModelSection, letter: str) -> str:
    """What the card says of a letter's mixer."""
    mixer = LETTERS[letter]
    text = f"{mixer.label}, {getattr(m, mixer.heads)} heads"
    if mixer.softmax:
        return f"{text}, the last {m.sliding_window:,} tokens" if mixer.window else text
    size = f"{m.key_dim} x {m.value_dim}, a memory of constant size, whatever the length of the context"
    if not mixer.states:
        return f"{text} of {size}"
    return f"{text}, backbone `{m.backbone}`, {mixer.states} {getattr(m, mixer.states)}: states of {size}"


def _has(module: str, m: ModelSection) -> bool:
    """Whether a layer of the model has a module of that name."""
    softmax, mlp = {LETTERS[letter].softmax for letter in layer_letters(m)}, m.ffn_hidden_size > 0
    return {"in_proj": False in softmax, "out_proj": False in softmax, "gate_up_proj": mlp, "down_proj": mlp}.get(
        module, True in softmax
    )


def cache_bytes(m: ModelSection, letter: str, element: int) -> tuple[int, int]:
    """Bytes a sequence of one layer's cache: constant, and a token of the context. `element`: bytes of an activation.

    States and the sums of scores are fp32 whatever the model is loaded in, counters int64.
    """
    mixer = LETTERS[letter]
    if mixer.softmax:
        token = 2 * m.attention_groups * attention_head_dim(m) * element
        return ((m.sliding_window - 1) * token, 0) if mixer.window else (0, token)
    slots = m.num_heads * recurrent_states(m, letter)
    tails = (m.conv_kernel - 1) * (m.num_heads * m.value_dim + 2 * m.num_groups * m.key_dim)
    return slots * (m.key_dim * m.value_dim * 4 + 20) + m.num_heads * 8 + 8 + tails * element, 0


def _cache(m: ModelSection, letters: str) -> str:
    constant, growing = (sum(x) for x in zip(*(cache_bytes(m, letter, 2) for letter in letters), strict=True))
    text = f"{constant:,} bytes, whatever the context" if constant else ""
    grows = f"{growing:,} bytes a token of the context" if growing else ""
    return " and ".join(filter(None, (text, grows))) + " (activations in bf16, states in fp32)"


def _facts(run: Path, step: int, license: str | None) -> dict[str, str]:
    """Rows of the table from the run's files; what they do not say is left for the publisher to write."""
    unknown = "not recorded: write it here before you publish"
    facts = {"licence": (license or unknown).replace("|", "\\|"), "data": unknown, "tokens": unknown, "losses": unknown}
    path = run / "metrics.jsonl"
    lines = [x for x in read_metrics(path) if x["step"] <= step] if path.is_file() else []
    if lines:
        facts["tokens"] = f"{lines[-1]['tokens']:,}"
        last: dict[str, Any] = {key: value for line in lines for key, value in line.items()}
        names = {"loss": "training", "val_loss": "held-out", "val_bpb": "held-out, bits a byte"}
        facts["losses"] = ", ".join(f"{names[key]} {last[key]:.4f}" for key in names if last.get(key) is not None)
    if (source := _data(run)) is not None:
        facts["data"] = source
    return facts | {"evaluation": "the held-out loss above; for tasks see below"}


def _data(run: Path) -> str | None:
    """The inputs of the shards that the run's config names, where both are still there."""
    try:
        data = yaml.safe_load((run / "config.yaml").read_text())["data"]
        mixed = [source["dir"] for source in (data.get("sources") or {}).values()]
        texts = []
        for directory in mixed or [data["dir"]]:
            index = parse_json((local_directory(directory, data.get("cache_dir", "")) / "index.json").read_text())
            tokens = sum(shard["tokens"] for shard in index["shards"] if shard["split"] == "train")
            texts.append(f"{tokens:,} tokens of {', '.join(source['input'] for source in index['sources'])}")
        return "; ".join(texts) + (" (a mixture, see config.yaml)" if mixed else "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None
