"""Loading an exported directory the way a user does, with errors that name the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_dla.errors import CheckpointError, UserError


def check_device(device: str) -> str:
    """`device`, if it is there. Raises UserError where CUDA is asked for and absent."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device on this machine: use --device cpu")
    return device


def load_model(hf_dir: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> Any:
    """The causal language model of an exported directory, in eval mode.

    Raises:
        CheckpointError: the directory holds no exported model. UserError: no such device.
    """
    check_device(device)
    _check_directory(hf_dir)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(str(hf_dir), trust_remote_code=True, dtype=dtype)
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval().to(device)


def load_tokenizer(hf_dir: str | Path) -> Any:
    """The tokenizer of an exported directory. Raises CheckpointError where there is none."""
    _check_directory(hf_dir)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(hf_dir), trust_remote_code=True)


def _check_directory(hf_dir: str | Path) -> None:
    if not (Path(hf_dir) / "config.json").is_file():
        raise CheckpointError(
            f"{str(hf_dir)!r} is no exported model (config.json is missing): make one with `dla convert to-hf`"
        )
