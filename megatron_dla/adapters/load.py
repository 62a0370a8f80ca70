"""Hugging Face directory + adapter directory -> a model with memory, with errors that name the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.files import Adapter, fingerprint, read_adapter
from megatron_dla.adapters.hf_model import DeltaMemModel, attach, check_supported
from megatron_dla.errors import CheckpointError, UserError


def load_backbone(hf_dir: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> nn.Module:
    """The plain model of a directory, in eval mode. Code in the directory is not run.

    Raises:
        CheckpointError: no model there, a damaged one, or one of an unsupported type. UserError: no such device.
    """
    path = Path(hf_dir) / "config.json"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device on this machine: use --device cpu")
    if not path.is_file():
        raise CheckpointError(f"{str(hf_dir)!r} is no Hugging Face model: config.json is missing")
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged ({error})") from error
    check_supported(model_type)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(str(hf_dir), dtype=dtype, local_files_only=True)
    except Exception as error:  # transformers and safetensors raise almost anything for a damaged file
        raise CheckpointError(f"{str(hf_dir)!r} is damaged ({_first_line(error)}): fetch it again") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval().to(device)


def load_tokenizer(hf_dir: str | Path) -> Any:
    """The directory's tokenizer. Raises CheckpointError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(hf_dir), local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{str(hf_dir)!r} has no tokenizer that loads ({_first_line(error)})") from error


def put_on(base: nn.Module, adapter: Adapter, *, any_base: bool = False) -> DeltaMemModel:
    """`adapter` on a model in memory.

    Args:
        any_base: take it although it was trained on other weights (the shapes must fit).

    Raises:
        CheckpointError: it belongs to another model, or does not fit.
    """
    if adapter.base is not None and not any_base:
        adapter.base.check(fingerprint(base), "the adapter")
    model = attach(base, adapter.config)
    try:
        model.load_tensors(adapter.tensors)
    except CheckpointError:
        model.detach()
        raise
    return model


def load_adapted(
    hf_dir: str | Path,
    adapter_dir: str | Path | None,
    *,
    any_base: bool = False,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
) -> DeltaMemModel:
    """Model and adapter of two directories; without an adapter the plain model in the same interface (no memory).

    Raises:
        CheckpointError: see `load_backbone`, `read_adapter` and `put_on`.
    """
    adapter = Adapter(DeltaMemConfig(layers=()), {}) if adapter_dir is None else read_adapter(adapter_dir)
    return put_on(load_backbone(hf_dir, dtype=dtype, device=device), adapter, any_base=any_base)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
