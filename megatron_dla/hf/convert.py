"""Checkpoint -> Hugging Face directory and back. No Megatron and no DeepSpeed: torch and transformers are enough."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dla.checkpoint.find import COMPLETE, LAYOUT, resolve_checkpoint
from megatron_dla.checkpoint.integrity import seal
from megatron_dla.checkpoint.weights import CheckpointLayout, MergedWeights, split_merged, weight_file
from megatron_dla.config import ModelSection
from megatron_dla.config.checks import check_tensor_parallel
from megatron_dla.console import progress_bar
from megatron_dla.errors import CheckpointError, UserError
from megatron_dla.files import TensorWriter, check_weight, file_sha256, naming_full_disk
from megatron_dla.hf import mapping
from megatron_dla.hf.backbones import read_backbone, read_weights
from megatron_dla.hf.card import check_license, model_card
from megatron_dla.hf.code_files import AUTO_MAP, code_files
from megatron_dla.hf.directory import (
    CONFIG,
    MAX_FILE_BYTES,
    TOKENIZER,
    TOKENIZER_JSON,
    DirectoryWeights,
    read_config,
    tokenizer_digest,
    write_weights,
)
from megatron_dla.hf.fast_tokenizer import SpecialTokens, write_tokenizer
from megatron_dla.hf.linear_models import LINEAR_FAMILIES, is_linear, linear_weights, read_linear
from megatron_dla.hf.load import check_tokenizer
from megatron_dla.hf.section import read_section, section_fields
from megatron_dla.mixers.layout import FP32_PARAMETERS
from megatron_dla.model.counts import count_parameters
from megatron_dla.model.parameters import model_parameters
from megatron_dla.parallel.tags import Tag

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def fresh_directory(out: Path, overwrite: bool | None, marker: str) -> Iterator[Path]:
    """A temporary directory that replaces `out` if the body succeeds; `overwrite`: None where that is not a choice."""
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if not overwrite:
            again = "" if overwrite is None else " (an earlier export: --overwrite)"
            raise UserError(f"{str(out)!r} exists: choose another directory{again}")
        if not (out / marker).is_file():
            raise UserError(
                f"{str(out)!r} is not an earlier export ({marker} is missing) and is not replaced: remove it yourself"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    new, old = (out.with_name(f".{out.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    new.mkdir()
    try:
        with naming_full_disk(out):
            yield new
        if out.exists():
            out.rename(old)
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def tokenizer_file(checkpoint: Path, given: str | Path | None, layout: CheckpointLayout) -> Path:
    """The tokenizer of the run, checked against the hash in the layout (empty: of a model imported without one)."""
    path = Path(given) if given is not None else checkpoint.resolve().parent.parent
    if path.is_dir():
        names = [name for name in (TOKENIZER, TOKENIZER_JSON) if (path / name).is_file()]
        path = path / (names or [TOKENIZER])[0]
    if not path.is_file():
        raise CheckpointError(f"{str(path)!r}: no tokenizer here: pass --tokenizer <data.dir>/{TOKENIZER}")
    digest = file_sha256(path)
    if layout.tokenizer_sha256 and digest != layout.tokenizer_sha256:
        raise CheckpointError(
            f"vocabulary mismatch: {str(path)!r} has sha256 {digest}, the checkpoint was trained with "
            f"{layout.tokenizer_sha256}: pass --tokenizer with the {TOKENIZER} of its data.dir"
        )
    return path


def _config(layout: CheckpointLayout, tokens: SpecialTokens, dtype: torch.dtype) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["DLAForCausalLM"],
        "model_type": "dla",
        "auto_map": AUTO_MAP,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": layout.vocab_size,
        **section_fields(layout.model),
        "training_length": layout.seq_len,
        "bos_token_id": None,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
        "tokenizer_sha256": layout.tokenizer_sha256,
        "tokenizer_size": tokens.size,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_state(
    weights: MergedWeights,
    out: Path,
    title: str,
    dtype: torch.dtype | None = None,
    dense: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> int:
    """Write a checkpoint's tensors under their Hugging Face names, one after another, with progress; returns how many
    parameters there are.

    In `dtype` (None: as they are), but those that must be fp32. `dense`: see `mapping.entries`.
    """
    state = mapping.to_hf_names(weights, weights.layout.model, dense)
    names = sorted(state, key=lambda name: not _is_fp32(name))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with progress_bar(weights.parameters, f"writing {title}", unit=" parameters") as bar:
            for name in names:
                try:
                    x = check_weight(name, state[name], weights.where, "use an older checkpoint")
                except (RuntimeError, IndexError) as error:
                    raise CheckpointError(f"{weights.where}: {name} cannot be read ({str(error)[:200]})") from error
                yield name, x if dtype is None else x.to(torch.float32 if _is_fp32(name) else dtype)
                bar.update(x.numel())

    return write_weights(tensors(), names, out, max_file_bytes)


def _is_fp32(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in FP32_PARAMETERS


def to_hf(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    license: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write a directory that `AutoModelForCausalLM.from_pretrained(out_dir, trust_remote_code=True)` loads.

    Args:
        checkpoint_dir: a step_N directory, or a run directory (its newest complete checkpoint).
        tokenizer: tokenizer.model or tokenizer.json (or its directory); default: the run's copy.
        dtype: `fp32` or `bf16`; default: as stored. Decay, threshold and slot parameters are fp32 always.
        overwrite: replace an earlier export. The directory appears only when it is complete.
        license: identifier of the Hugging Face hub, for the card.
        max_file_bytes: of a weights file; the tensors of one file are in memory together.

    Raises:
        CheckpointError: an incomplete checkpoint, missing or left-over weights, another tokenizer.
        UserError: `out_dir` exists, an unknown dtype, or a license that is not one line.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}: use one of {', '.join(DTYPES)}")
    check_license(license)
    checkpoint, out = resolve_checkpoint(checkpoint_dir), Path(out_dir)
    with fresh_directory(out, overwrite, CONFIG) as new:
        held = CheckpointLayout.load(checkpoint)
        if held.adapter:
            raise CheckpointError(f"{str(checkpoint)!r} holds a δ-mem adapter: use `dla convert adapter`")
        source = tokenizer_file(checkpoint, tokenizer, held)
        weights = MergedWeights(checkpoint)
        layout = weights.layout
        _check_sizes(weights.parameters, layout.model, layout.vocab_size, checkpoint)
        tokens = write_tokenizer(new, source, layout.vocab_size)
        if tokens.size > layout.vocab_size:
            raise CheckpointError(
                f"{str(source)!r} has {tokens.size} tokens, but the embedding of {str(checkpoint)!r} "
                f"{layout.vocab_size} rows: pass --tokenizer with the {TOKENIZER} of that model"
            )
        layout = replace(layout, tokenizer_sha256=file_sha256(source))
        _write_json(
            new / CONFIG,
            _config(layout, tokens, DTYPES[dtype] if dtype else weights["decoder.final_layernorm.weight"].dtype),
        )
        _write_json(new / "generation_config.json", _generation_config(tokens))
        kept = DTYPES[dtype] if dtype else None
        parameters = write_state(weights, new, out.name, kept, max_file_bytes=max_file_bytes)
        for name, path in code_files().items():
            (new / name).write_bytes(path.read_bytes())  # whose error on a full disk does not blame the source
        run = checkpoint.resolve().parent.parent
        (new / "README.md").write_text(model_card(layout, out.name, parameters, tokens.size, run, license))
    return out


def _generation_config(tokens: SpecialTokens) -> dict[str, Any]:
    """generation_config.json: ends at eos, and never draws a row of the embedding that stands for nothing."""
    config: dict[str, Any] = {"eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
    return config | ({"suppress_tokens": list(tokens.unused)} if tokens.unused else {})


def _check_sizes(held: int, section: ModelSection, vocab_size: int, path: Path) -> None:
    wanted = count_parameters(section, vocab_size)
    if held != wanted:
        raise CheckpointError(
            f"{str(path)!r}: the weights hold {held:,} parameters, its configuration describes {wanted:,}: restore both"
        )


def _training_rows(config: dict[str, Any], section: ModelSection, path: Path) -> int:
    """Rows of the embedding that training with the tokenizer's shards has, whatever a client resized it to.

    Raises:
        CheckpointError: the embedding has rows for tokens that those shards cannot hold, or too few.
    """
    rows, tokens = config["vocab_size"], config["tokenizer_size"]
    wanted = -(-tokens // section.vocab_multiple) * section.vocab_multiple
    if not tokens <= rows <= wanted:
        raise CheckpointError(
            f"{str(path)!r}: the embedding has {rows} rows, but training with the {tokens} tokens of its {TOKENIZER} "
            f"has {wanted}: undo added tokens with model.resize_token_embeddings({wanted}) and save again"
        )
    return wanted


class PaddedRows(Mapping[str, Tensor]):
    """Layout-free tensors with `rows` rows in both embeddings: unused ones that a client cut off come as zeros."""

    def __init__(self, merged: Mapping[str, Tensor], rows: int) -> None:
        self._merged, self._rows = merged, rows

    def __getitem__(self, key: str) -> Tensor:
        x = self._merged[key]
        if key not in ("embedding.word_embeddings.weight", "output_layer.weight"):
            return x
        return torch.nn.functional.pad(x, (0, 0, 0, self._rows - x.shape[0]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._merged)

    def __len__(self) -> int:
        return len(self._merged)


def _local(
    merged: Mapping[str, Tensor], name: str, tag: Tag, rank: int, size: int, wanted: tuple[int, ...], source: Path
) -> Tensor:
    """One rank's part of a parameter. Raises CheckpointError where the whole one would have another shape."""
    try:
        local = split_merged(merged, {name: tag}, rank, size)[name]
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(f"{str(source)!r}: {name} cannot be cut ({str(error)[:200]}): fetch it again") from error
    if tuple(tag.full_shape(local.shape, size)) != tuple(wanted):
        raise CheckpointError(
            f"{str(source)!r}: {name} has shape {list(local.shape)} on {size} rank(s), the config describes "
            f"{list(wanted)} in all: they are of different models"
        )
    return local


def from_hf(
    hf_dir: str | Path,
    out_checkpoint_dir: str | Path,
    tensor_parallel: int = 1,
    *,
    capacity: int | None = None,
    tau: float | None = None,
) -> Path:
    """Write a checkpoint (weights and layout, no optimizer state) from an exported directory or another model.

    Args:
        hf_dir: what `to_hf` wrote, or a model of one of `hf.families.FAMILIES` or `hf.linear_models.LINEAR_FAMILIES`.
        tensor_parallel: number of weight files; a checkpoint means the same at every one.
        capacity, tau: slots of the DLA layers that linear attention becomes; default: those of `ModelSection`.

    The pattern comes back spelled out, one letter a layer; the step is 0. The tokenizer stays where it is: only its
    hash is in a checkpoint.

    Raises:
        CheckpointError: another architecture, missing or left-over weights. UserError: the target exists.
        ConfigError: `tensor_parallel` does not divide the model.
    """
    source, out = Path(hf_dir), Path(out_checkpoint_dir)
    merged: Mapping[str, Tensor]
    raw = read_config(source, "give a Hugging Face directory")
    if not is_linear(raw) and (capacity is not None or tau is not None):
        raise UserError(
            f"--capacity and --tau are for a model of type {' or '.join(LINEAR_FAMILIES)}, {str(source)!r} is "
            f"{raw.get('model_type')}"
        )
    if raw.get("model_type") == "dla":
        section, config = read_section(source)
        seq_len = config["training_length"]
        check_tensor_parallel(section, tensor_parallel, False, seq_len)
        digest = check_tokenizer(source)
        stored = DirectoryWeights(source)
        _check_sizes(stored.parameters, section, config["vocab_size"], source)
        vocab_size = _training_rows(config, section, source)
        merged = PaddedRows(mapping.from_hf_names(stored, section), vocab_size)
    else:
        if is_linear(raw):
            default = ModelSection()
            slots = (default.capacity if capacity is None else capacity, default.tau if tau is None else tau)
            section, info = read_linear(source, *slots)
            merged = linear_weights(source, section)
        else:
            section, info = read_backbone(source)
            merged = read_weights(source, section, info.vocab_size)
        vocab_size, seq_len, digest = info.vocab_size, info.max_length, tokenizer_digest(source)
        check_tensor_parallel(section, tensor_parallel, False, seq_len)
    with fresh_directory(out, None, COMPLETE) as new:
        tags = mapping.parameter_tags(section, tensor_parallel)
        total, wanted = count_parameters(section, vocab_size), model_parameters(section, vocab_size, tensor_parallel)
        names = sorted(tags, key=lambda name: not _is_fp32(name))
        for rank in range(tensor_parallel):
            path = new / weight_file(rank)
            path.parent.mkdir(exist_ok=True)
            title = f"writing {out.name}, rank {rank}"
            with TensorWriter(path, names) as writer, progress_bar(total, title, unit=" parameters") as bar:
                for name in names:
                    local = _local(merged, name, tags[name], rank, tensor_parallel, wanted[name].shape, source)
                    writer.add(name, local)
                    bar.update(tags[name].full_shape(local.shape, tensor_parallel).numel())
        CheckpointLayout(
            model=section, vocab_size=vocab_size, tokenizer_sha256=digest, tensor_parallel=tensor_parallel,
            seq_len=seq_len, step=0, tags=tags,
        ).save(new / LAYOUT)  # fmt: skip
        seal(new, {"step": 0, "source": str(source)})
    return out
