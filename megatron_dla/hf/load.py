"""Loading an exported directory the way a user does, with errors that name the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_dla.adapters.load import load_whole
from megatron_dla.errors import CheckpointError, UserError
from megatron_dla.files import file_sha256

TOKENIZER = "tokenizer.model"


def check_device(device: str) -> str:
    """`device`, if it is there. Raises UserError where CUDA is asked for and absent."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device on this machine: use --device cpu")
    return device


def load_model(hf_dir: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> Any:
    """The causal language model of an exported directory, in eval mode.

    Raises:
        CheckpointError: the directory holds no exported model, or not all of it. UserError: no such device.
    """
    check_device(device)
    _check_directory(hf_dir)
    again = "export it again with `dla convert to-hf --overwrite`"
    model = load_whole(hf_dir, again, again, dtype=dtype, trust_remote_code=True)
    return model.eval().to(device)


def load_tokenizer(hf_dir: str | Path) -> Any:
    """The tokenizer of an exported directory. Raises CheckpointError where there is none."""
    _check_directory(hf_dir)
    check_tokenizer(Path(hf_dir))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(hf_dir), trust_remote_code=True)
    except Exception as error:
        raise _damaged(hf_dir, error) from error


def check_tokenizer(hf_dir: Path) -> str:
    """sha256 of the export's tokenizer.model. Raises CheckpointError if the model was trained with another one."""
    try:
        config = json.loads((hf_dir / "config.json").read_text())
        if "tokenizer_sha256" not in config:
            raise CheckpointError(
                f"{str(hf_dir)!r} holds a model of type {config.get('model_type')}, not an export of DLA layers: use "
                "transformers itself, or `dla generate --adapter` for one that carries a δ-mem"
            )
        wanted = config["tokenizer_sha256"]
        found = file_sha256(hf_dir / TOKENIZER)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise _damaged(hf_dir, error) from error
    if found != wanted:
        raise CheckpointError(
            f"vocabulary mismatch: {str(hf_dir / TOKENIZER)!r} has sha256 {found[:12]}, the model was trained with "
            f"{wanted[:12]}: restore the file, or export again"
        )
    return found


def _damaged(hf_dir: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{str(hf_dir)!r} is damaged ({error}): export it again with `dla convert to-hf --overwrite`"
    )


def _check_directory(hf_dir: str | Path) -> None:
    if not (Path(hf_dir) / "config.json").is_file():
        raise CheckpointError(
            f"{str(hf_dir)!r} is no exported model (config.json is missing): make one with `dla convert to-hf`"
        )
