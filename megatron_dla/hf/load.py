"""Models and tokenizers of Hugging Face directories, complete or not at all, with errors that name the fix.

`load_backbone` and `load_tokenizer` take a plain model of `families`, `load_export` and `load_export_tokenizer` what
`dla convert to-hf` wrote. None runs code of the directory, unless it is told to trust it.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_dla.errors import CheckpointError, UserError
from megatron_dla.files import check_weight, file_sha256
from megatron_dla.hf.code_files import own_code
from megatron_dla.hf.directory import CONFIG, TOKENIZER, TOKENIZER_JSON, check_stored_dtypes, read_config
from megatron_dla.hf.families import check_servable
from megatron_dla.hf.fast_tokenizer import write_tokenizer

_EXPORT = "write it with `dla convert to-hf` (`--overwrite` replaces a damaged export)"


def check_device(device: str) -> None:
    """Raises UserError where CUDA is asked for and absent."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device on this machine: use --device cpu")


# ---- plain models


def check_backbone(hf_dir: str | Path) -> dict[str, Any]:
    """config.json of a model that can be served; the weights are not looked at.

    Raises:
        CheckpointError: not a model directory, a damaged file, or a model that is not supported.
    """
    config, path = read_config(hf_dir), Path(hf_dir) / CONFIG
    try:
        check_servable(config, repr(str(path)))
    except (ValueError, AttributeError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{str(path)!r} is damaged ({error}): fetch it again") from error
    return config


def load_backbone(hf_dir: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> nn.Module:
    """The plain model of a directory, in eval mode.

    Raises:
        CheckpointError: see `check_backbone`; also weights that are damaged, missing, left over or of another shape,
            of which transformers would only warn. UserError: no such device.
    """
    check_device(device)
    check_backbone(hf_dir)
    other = "the weights and config.json are of different models, or the download is not complete: fetch both again"
    return _load_model(hf_dir, "fetch it again", other, dtype=dtype).eval().to(device)


def _tried(tokenizer: Any) -> Any:
    """The tokenizer, if a text goes through it: settings of a wrong type show here and not later."""
    tokenizer.decode(tokenizer("a")["input_ids"])
    return tokenizer


def load_tokenizer(hf_dir: str | Path) -> Any:
    """The tokenizer of a plain model's directory.

    Raises:
        CheckpointError: there is none, or it has tokens that the model of the same directory does not have (fewer are
            normal: embeddings are padded).
    """
    if not Path(hf_dir).is_dir():
        raise CheckpointError(f"{str(hf_dir)!r} is not a directory: give that of a Hugging Face model")
    path = Path(hf_dir) / CONFIG
    rows = check_backbone(hf_dir).get("vocab_size") if path.is_file() else None
    from transformers import AutoTokenizer

    try:
        tokenizer = _tried(AutoTokenizer.from_pretrained(str(hf_dir), local_files_only=True))
    except Exception as error:
        raise CheckpointError(f"{str(hf_dir)!r} has no tokenizer that loads ({_first_line(error)})") from error
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if isinstance(rows, int) and size > rows:
        raise CheckpointError(
            f"{str(path)!r}: vocab_size = {rows}, but the tokenizer beside it has {size} tokens, so that some have no "
            "embedding: put the model's own tokenizer there, or resize the model's embedding"
        )
    return tokenizer


# ---- exports


def load_export(
    hf_dir: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """The causal language model of an exported directory, in eval mode, with the code of this package.

    Args:
        trust_remote_code: with the code of the directory, which then may do anything.

    Raises:
        CheckpointError: the directory holds no exported model, or not all of it. UserError: no such device, or
            transformers cannot keep the code of exports.
    """
    check_device(device)
    from megatron_dla.hf.section import read_section  # needs pydantic, which `dla smoke --kernels-only` does without

    read_section(Path(hf_dir))
    check_modules_cache()
    if trust_remote_code:
        model = _load_model(hf_dir, _EXPORT, _EXPORT, dtype=dtype, trust_remote_code=True)
    else:
        with own_code(Path(hf_dir)) as directory:
            model = _load_model(directory, _EXPORT, _EXPORT, where=hf_dir, dtype=dtype, trust_remote_code=True)
    model.name_or_path = model.config.name_or_path = str(hf_dir)
    return model.eval().to(device)


def check_modules_cache() -> None:
    """Raises UserError where transformers cannot write to the directory into which it copies the code of exports."""
    from transformers import dynamic_module_utils

    cache = Path(dynamic_module_utils.HF_MODULES_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise UserError(
            f"HF_MODULES_CACHE = {str(cache)!r} cannot be written to ({error.strerror}), and transformers copies the "
            "code of exported models there: set that variable to a directory of yours"
        ) from error


def load_export_tokenizer(hf_dir: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of an exported directory; one without a tokenizer.json gets that of its tokenizer.model.

    Args:
        trust_remote_code: with the code of the directory, if it has any.

    Raises:
        CheckpointError: it is missing or of another model. UserError: see `check_modules_cache`.
    """
    check_tokenizer(hf_dir)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(hf_dir)
    try:
        if trust_remote_code:
            check_modules_cache()
            return _tried(AutoTokenizer.from_pretrained(str(path), trust_remote_code=True))
        if (path / TOKENIZER_JSON).is_file():
            return _tried(PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True))
        with tempfile.TemporaryDirectory() as place:
            from megatron_dla.hf.section import read_section

            write_tokenizer(Path(place), path / TOKENIZER, read_section(path)[1]["vocab_size"])
            return PreTrainedTokenizerFast.from_pretrained(place, local_files_only=True)
    except UserError:
        raise
    except Exception as error:
        raise CheckpointError(f"{str(hf_dir)!r} is damaged ({error}): {_EXPORT}") from error


def check_tokenizer(hf_dir: str | Path) -> str:
    """sha256 of the tokenizer.model that the model was trained with.

    A directory that a client saved may have a tokenizer.json only. Raises CheckpointError where there is neither, or
    another tokenizer.model.
    """
    config, path = read_config(hf_dir, _EXPORT), Path(hf_dir) / TOKENIZER
    if "tokenizer_sha256" not in config:
        raise CheckpointError(
            f"{str(hf_dir)!r} holds a model of type {config.get('model_type')}, not an export of DLA layers: use "
            "transformers itself, or `dla generate --adapter` for one that carries a δ-mem"
        )
    wanted = config["tokenizer_sha256"]
    if not isinstance(wanted, str) or not re.fullmatch("[0-9a-f]{64}", wanted):
        raise CheckpointError(f"{str(Path(hf_dir) / CONFIG)!r}: tokenizer_sha256 = {wanted!r} is no sha256: {_EXPORT}")
    if not path.exists() and path.with_name("tokenizer.json").is_file():
        return wanted
    if not path.exists():
        raise CheckpointError(
            f"{str(hf_dir)!r} has no tokenizer.json and no {TOKENIZER}: save the tokenizer there as well "
            "(tokenizer.save_pretrained), or copy them from the export that the model comes from"
        )
    try:
        found = file_sha256(path)
    except OSError as error:
        raise CheckpointError(f"{str(hf_dir)!r} is damaged ({error}): {_EXPORT}") from error
    if found != wanted:
        raise CheckpointError(
            f"vocabulary mismatch: {str(path)!r} has sha256 {found[:12]}, the model was trained with {wanted[:12]}: "
            "restore the file, or export again"
        )
    return found


# ---- both


def _load_model(
    hf_dir: str | Path, damaged: str, incomplete: str, where: str | Path | None = None, **options: Any
) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, quiet, and only if every weight came from the files.

    Args:
        damaged, incomplete: the fix, for the messages. where: the directory to name, if `hf_dir` is a copy.
        options: of transformers.

    Raises:
        CheckpointError: weights that are damaged, missing, left over or of another shape.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    check_stored_dtypes(Path(hf_dir), where)
    named = repr(str(hf_dir if where is None else where))
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report on the weights: ours follows
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(hf_dir), local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # transformers and safetensors raise almost anything for a damaged file
        raise CheckpointError(f"{named} is damaged ({_first_line(error)}): {damaged}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    model, report = loaded
    _check_token_ids(model, named, damaged)
    _check_weights(model, report, named, incomplete)
    return model


def _check_token_ids(model: Any, where: str, fix: str) -> None:
    """CheckpointError where config.json or generation_config.json names a token that the model does not have."""
    rows = model.get_input_embeddings().weight.shape[0]
    for config in (model.config, model.generation_config):
        for key in ("eos_token_id", "pad_token_id", "bos_token_id", "suppress_tokens"):
            value = getattr(config, key, None)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(token) is int and 0 <= token < rows for token in ids):
                raise CheckpointError(
                    f"{where}: {key} = {str(value)[:200]!r}: must be tokens from 0 to {rows - 1}: {fix}"
                )


def _check_weights(model: Any, report: dict[str, Any], where: str, fix: str) -> None:
    """CheckpointError unless every weight came from the files, is finite, and every weight of the files went
    somewhere."""
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise CheckpointError(f"{where}: {name} has shape {list(found)}, config.json asks for {list(wanted)}: {fix}")
    for names, what in (
        (report["missing_keys"], "is missing from the weights"),
        (report["unexpected_keys"], "is in the weights and has no place in the model of config.json"),
    ):
        if names:
            raise CheckpointError(f"{where}: {min(names)} {what} ({len(names)} in all): {fix}")
    for name, x in model.named_parameters():
        check_weight(name, x.detach(), where, fix)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and not torch.equal(head, embedding):
        raise CheckpointError(
            f"{where}: lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings = true: set it "
            "to false in config.json, or remove that weight"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
