"""Hugging Face directory + adapter directory -> a model with memory, with errors that name the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.families import check_servable
from megatron_dla.adapters.files import Adapter, fingerprint, read_adapter
from megatron_dla.adapters.hf_model import DeltaMemModel, attach
from megatron_dla.errors import CheckpointError, UserError


def check_backbone(hf_dir: str | Path) -> dict[str, Any]:
    """config.json of a model that can be served; the weights are not looked at.

    Raises:
        CheckpointError: no model there, a damaged file, or one that is not supported.
    """
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{str(hf_dir)!r} is no Hugging Face model: config.json is missing")
    try:
        config = json.loads(path.read_text())
        check_servable(config, repr(str(path)))
    except CheckpointError:
        raise
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged ({error}): fetch it again") from error
    return config


def load_backbone(hf_dir: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> nn.Module:
    """The plain model of a directory, in eval mode. Code in the directory is not run.

    Raises:
        CheckpointError: see `check_backbone`; also weights that are damaged, missing, left over or of another shape,
            of which transformers would only warn. UserError: no such device.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device on this machine: use --device cpu")
    check_backbone(hf_dir)
    other = "the weights and config.json are of different models, or the download is not complete: fetch both again"
    return load_whole(hf_dir, "fetch it again", other, dtype=dtype).eval().to(device)


def load_whole(hf_dir: str | Path, damaged: str, incomplete: str, **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, quiet, and only if every weight came from the files.

    Args:
        damaged, incomplete: the fix, for the messages. options: of transformers.

    Raises:
        CheckpointError: weights that are damaged, missing, left over or of another shape.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report on the weights: ours follows
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(hf_dir), local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # transformers and safetensors raise almost anything for a damaged file
        raise CheckpointError(f"{str(hf_dir)!r} is damaged ({_first_line(error)}): {damaged}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    model, report = loaded
    _check_weights(model, report, repr(str(hf_dir)), incomplete)
    return model


def _check_weights(model: Any, report: dict[str, Any], where: str, fix: str) -> None:
    """CheckpointError unless every weight came from the files, and every weight of the files went somewhere."""
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise CheckpointError(f"{where}: {name} has shape {list(found)}, config.json asks for {list(wanted)}: {fix}")
    for names, what in (
        (report["missing_keys"], "is missing from the weights"),
        (report["unexpected_keys"], "is in the weights and has no place in the model of config.json"),
    ):
        if names:
            raise CheckpointError(f"{where}: {min(names)} {what} ({len(names)} in all): {fix}")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and not torch.equal(head, embedding):
        raise CheckpointError(
            f"{where}: lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings = true: set it "
            "to false in config.json, or remove that weight"
        )


def load_tokenizer(hf_dir: str | Path) -> Any:
    """The directory's tokenizer.

    Raises:
        CheckpointError: there is none, or it has tokens that the model of the same directory does not have (fewer are
            normal: embeddings are padded).
    """
    if not Path(hf_dir).is_dir():
        raise CheckpointError(f"{str(hf_dir)!r}: no such directory: want a Hugging Face model's")
    path = Path(hf_dir) / "config.json"
    rows = check_backbone(hf_dir).get("vocab_size") if path.is_file() else None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(hf_dir), local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{str(hf_dir)!r} has no tokenizer that loads ({_first_line(error)})") from error
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if isinstance(rows, int) and size > rows:
        raise CheckpointError(
            f"{str(path)!r}: vocab_size = {rows}, but the tokenizer beside it has {size} tokens, so that some have no "
            "embedding: put the model's own tokenizer there, or resize the model's embedding"
        )
    return tokenizer


def adapter_of(directory: str | Path | None) -> Adapter:
    """`read_adapter`; without a directory an adapter of no layers, which leaves any model as it is."""
    return Adapter(DeltaMemConfig(layers_to_transform=()), {}) if directory is None else read_adapter(directory)


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
    adapter = adapter_of(adapter_dir)
    return put_on(load_backbone(hf_dir, dtype=dtype, device=device), adapter, any_base=any_base)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
