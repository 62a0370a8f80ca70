"""The README.md of an exported model."""

from __future__ import annotations

from megatron_dla.checkpoint.weights import CheckpointLayout
from megatron_dla.config import LETTERS, ModelSection, layer_letters
from megatron_dla.hf.releases import tested_range

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A language model with Dynamic Linear Attention (arXiv 2606.10650), pretrained with megatron-dla for {step} steps on rows
of {seq_len} tokens. {layers} layers ({letters}), hidden size {hidden}, {parameters:,} parameters.
{mixers}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```

It needs torch and transformers (tested on {releases}). The Python files here are plain torch: read
them before you trust them. Batches of unequal length are padded on the left (the default here); padded tokens never
enter the memory. The per-head decay, threshold and slot parameters stay fp32 when the model is loaded in bf16. The
embedding has {vocab} rows, of which the tokenizer uses {tokens}.
"""


def model_card(layout: CheckpointLayout, name: str, parameters: int, tokens: int) -> str:
    """What the model is and how to load it. `name`: the directory's; `tokens`: the tokenizer's vocabulary."""
    m = layout.model
    mixers = [f"- {letter}: {_mixer(m, letter)}" for letter in dict.fromkeys(layer_letters(m))]
    return CARD.format(
        name=name, step=layout.step, seq_len=layout.seq_len, layers=m.num_layers, letters=layer_letters(m),
        hidden=m.hidden_size, mixers="\n".join(mixers), parameters=parameters, vocab=layout.vocab_size, tokens=tokens,
        releases=tested_range(),
    )  # fmt: skip


def _mixer(m: ModelSection, letter: str) -> str:
    """What the card says of a letter's mixer."""
    mixer = LETTERS[letter]
    text = f"{mixer.label}, {getattr(m, mixer.heads)} heads"
    if mixer.softmax:
        return text
    size = f"{m.key_dim} x {m.value_dim}, a memory of constant size, whatever the length of the context"
    return f"{text}, backbone `{m.backbone}`, {m.capacity} slots of {size}" if mixer.slots else f"{text} of {size}"
