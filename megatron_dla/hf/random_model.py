"""A new model of a config section, with random weights: for benchmarks and small studies in one process."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_dla.config import ModelSection
from megatron_dla.hf.code_files import own_code
from megatron_dla.hf.section import section_fields


def random_model(section: ModelSection, vocab_size: int) -> Any:
    """The causal language model that `dla convert to-hf` would write, in fp32 on the CPU, with weights from torch's
    generator and the section's `init_std`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as place:
        config = {"model_type": "dla", "vocab_size": vocab_size, **section_fields(section)}
        (Path(place) / "config.json").write_text(json.dumps(config | {"initializer_range": section.init_std}))
        with own_code(Path(place)) as directory:
            loaded = AutoConfig.from_pretrained(str(directory), trust_remote_code=True)
            return AutoModelForCausalLM.from_config(loaded, trust_remote_code=True, dtype=torch.float32)
