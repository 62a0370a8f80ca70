"""The models of a comparison, with their tokenizers: exports, plain Hugging Face directories, and runs."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_dla.errors import UserError
from megatron_dla.hf.directory import CONFIG, read_config
from megatron_dla.serving.hf_model import DeltaMemModel

_ROWS = 64  # of every weight that is hashed


@dataclass
class Subject:
    """A model that is evaluated.

    Attributes:
        name: in tables. path: as given. model, tokenizer: of transformers, the model in eval mode. adapter: δ-mem on
            `model`, which reads and writes in every call; None = there is none.
    """

    name: str
    path: str
    model: Any
    tokenizer: Any
    adapter: DeltaMemModel | None = None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids. `special`: with the tokens that the tokenizer puts around a text (bos)."""
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def prefix(self) -> int:
        """The token before a text without context: bos, or else eos."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.model.config.eos_token_id):
            if isinstance(token, int):
                return token
        raise UserError(f"{self.path!r}: the tokenizer has no bos and no eos token, so an empty context has no token")

    @cached_property
    def digest(self) -> str:
        """Of the weights (the first rows of each) and the tokenizer: tells whether finished items are of this model."""
        digest = hashlib.sha256(self.tokenizer_digest.encode())
        weights = sorted(self.model.state_dict().items())
        if self.adapter is not None:
            digest.update(repr(sorted(self.adapter.config.to_dict().items())).encode())
            weights += sorted(self.adapter.state_dict().items())
        for name, x in weights:
            part = x[:_ROWS] if x.ndim else x
            digest.update(f"{name}{list(x.shape)}{x.dtype}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def tokenizer_digest(self) -> str:
        inner = getattr(self.tokenizer, "backend_tokenizer", None)
        text = inner.to_str() if inner is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(text.encode()).hexdigest()


def read_names(given: Sequence[str], taken: Iterable[str] = (), kind: str = "model") -> dict[str, str]:
    """Name -> directory of arguments DIR or NAME=DIR; the name of a bare directory is its path.

    Args:
        taken: names that are given already. kind: `model` or `adapter`, for the messages.

    Raises:
        UserError: a name occurs twice, or a directory does not exist.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        name, path = (name, path) if equals and not Path(text).exists() else (text.rstrip("/") or text, text)
        if not Path(path).is_dir():
            wanted = "an export, a Hugging Face model, or a run" if kind == "model" else "one of `dla convert adapter`"
            raise UserError(f"{path!r} is not a directory: give {wanted}")
        if name in (*found, *taken):
            raise UserError(f"{name!r} is given twice: name the {kind}s, as in a={path}")
        found[name] = path
    return found


def load_subject(name: str, path: str, *, device: str = "cpu", dtype: str = "auto") -> Subject:
    """An export, a plain model of `hf.families`, or the newest checkpoint of a run, converted on the way.

    Raises:
        UserError: none of these, or damaged. CheckpointError: see `hf.load` and `hf.convert`.
    """
    from megatron_dla.hf.load import load_backbone, load_export, load_export_tokenizer, load_tokenizer

    if (Path(path) / CONFIG).is_file():
        if read_config(path).get("model_type") == "dla":
            return Subject(name, path, load_export(path, dtype=dtype, device=device), load_export_tokenizer(path))
        return Subject(name, path, load_backbone(path, dtype=dtype, device=device), load_tokenizer(path))
    from megatron_dla.hf.convert import to_hf

    with tempfile.TemporaryDirectory(prefix="dla-eval-") as place:
        export = to_hf(path, Path(place) / "hf")
        model, tokenizer = load_export(export, dtype=dtype, device=device), load_export_tokenizer(export)
    return Subject(name, path, model, tokenizer)


def with_adapter(base: Subject, name: str, path: str) -> Subject:
    """A model of `load_subject` with a δ-mem adapter of a directory on it, in place.

    Raises:
        UserError: it writes by message. CheckpointError: see `read_adapter` and `attach_adapter`.
    """
    from megatron_dla.adapters.files import read_adapter
    from megatron_dla.serving.load import attach_adapter

    adapter = read_adapter(path)
    if adapter.config.write == "message":
        raise UserError(f"--adapter {path}: writes by message, and these texts and questions have no messages")
    memory = attach_adapter(base.model, adapter)
    return Subject(name, f"{base.path} + {path}", memory.stay_on(), base.tokenizer, memory)
