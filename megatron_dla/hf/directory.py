"""Reading a Hugging Face directory: its config.json, its weights one by one, and the fingerprint of the model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dla.adapters.fingerprint import Fingerprint
from megatron_dla.errors import CheckpointError
from megatron_dla.files import TensorWriter, check_weight, file_sha256, open_tensors, parse_json

CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
MAX_FILE_BYTES = 5 * 10**9
_FINGERPRINT_ROWS = 64  # of every tensor that is hashed


def read_config(hf_dir: str | Path, fix: str = "fetch it again") -> dict[str, Any]:
    """The contents of config.json. Raises CheckpointError, which ends in `fix`, where it is missing or damaged."""
    path = Path(hf_dir) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{str(hf_dir)!r} is not a Hugging Face model directory ({CONFIG} is missing): {fix}")
    try:
        config = parse_json(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
        kind, names = config.get("model_type"), config.get("architectures")
        if not isinstance(kind, str | None):
            raise ValueError(f"model_type = {kind!r}: must be a string")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"architectures = {names!r}: must be a list of strings")
        return config
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged ({error}): {fix}") from error


def tokenizer_digest(hf_dir: str | Path) -> str:
    """sha256 of the directory's tokenizer.model, as shards carry it, or tokenizer.json; empty where it has neither."""
    for name in (TOKENIZER, TOKENIZER_JSON):
        path = Path(hf_dir) / name
        if path.is_file():
            return file_sha256(path)
    return ""


class DirectoryWeights(Mapping[str, Tensor]):
    """Name -> tensor of a Hugging Face directory's safetensors, one file or several. A tensor is read when asked for.

    Attributes:
        shapes: name -> shape of every tensor, from the files' headers. parameters: how many numbers they hold.

    Raises:
        CheckpointError: a file is missing or damaged; a tensor that is asked for is no weight or not finite.
    """

    def __init__(self, hf_dir: str | Path) -> None:
        self.hf_dir = hf_dir
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(Path(hf_dir)):
            try:
                file = open_tensors(path)
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    self._files[name] = file
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except Exception as error:  # safetensors raises its own and OSError alike
                raise CheckpointError(f"{str(path)!r} is missing or damaged ({error}): fetch it again") from error

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def leave_out(self, name: str) -> None:
        """Not a name of this mapping from here on."""
        del self._files[name], self.shapes[name]

    def leave_out_tied_head(self, embedding: str, head: str = "lm_head.weight") -> None:
        """Of a model with tie_word_embeddings = true, which may be stored with both.

        Raises:
            CheckpointError: they differ.
        """
        if head not in self or embedding not in self:
            return
        if not torch.equal(self[head], self[embedding]):
            raise CheckpointError(
                f"{str(self.hf_dir)!r}: {head} differs from {embedding}, but tie_word_embeddings = true: set it to "
                "false in config.json, or remove that weight"
            )
        self.leave_out(head)

    def __getitem__(self, name: str) -> Tensor:
        return check_weight(
            name, self._files[name].get_tensor(name), repr(str(self.hf_dir)), "fetch or export it again"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _weight_files(hf_dir: Path) -> list[Path]:
    index = hf_dir / WEIGHTS_INDEX
    if not index.is_file():
        return [hf_dir / WEIGHTS]
    try:
        return [hf_dir / name for name in sorted(set(parse_json(index.read_bytes())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(index)!r} is damaged ({error}): fetch it again") from error


def check_stored_dtypes(hf_dir: Path, where: str | Path | None = None) -> None:
    """CheckpointError where a safetensors file of the directory holds anything but float weights, which transformers
    would convert without a word. Reads the headers only. `where`: the directory that messages name."""
    for path in hf_dir.glob("*.safetensors"):
        named = repr(str(Path(hf_dir if where is None else where) / path.name))
        try:
            file = open_tensors(path)
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except Exception as error:
            raise CheckpointError(f"{named} is damaged ({error}): fetch it again") from error
        for name, dtype in dtypes.items():
            if dtype not in TensorWriter.FLOATS:
                raise CheckpointError(f"{named}: {name} holds {dtype}, not float weights: fetch it again")


def write_weights(
    tensors: Iterable[tuple[str, Tensor]], names: Collection[str], out: Path, max_bytes: int = MAX_FILE_BYTES
) -> int:
    """Write the model's safetensors: one file, or several of at most `max_bytes` (or one tensor) and their index.

    Tensors go to the disk as they come. File names are those of transformers' `save_pretrained`.

    Args:
        tensors: (name, tensor) in the order of the files, the wider dtypes first. names: all of them.

    Returns:
        The number of parameters.
    """
    places: dict[str, int] = {}
    count = total = parameters = 0
    writer: TensorWriter | None = None
    with ExitStack() as stack:
        for name, x in tensors:
            if writer is None or (writer.nbytes and writer.nbytes + x.nbytes > max_bytes):
                stack.close()
                writer = stack.enter_context(TensorWriter(out / f"{count}.part", names))
                count += 1
            writer.add(name, x)
            places[name] = count - 1
            total, parameters = total + x.nbytes, parameters + x.numel()
    files = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)] if count > 1 else [WEIGHTS]
    for n, file in enumerate(files):
        (out / f"{n}.part").rename(out / file)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: files[n] for name, n in places.items()}}
        (out / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return parameters


def fingerprint(source: nn.Module | Mapping[str, Tensor] | str | Path, name: str | None = None) -> Fingerprint:
    """Of a Hugging Face model, its state dict, or its directory (a few megabytes are read).

    Hashed are the first rows, rounded to bf16, of the embedding, the first layer's query projection, the last layer's
    down projection and the last norm: the same whatever dtype the model is loaded in.

    Raises:
        CheckpointError: one of these weights is missing, so the model is not of a supported family.
    """
    weights: Mapping[str, Tensor]
    if isinstance(source, nn.Module):
        weights, name = source.state_dict(), name or getattr(source, "name_or_path", "")
    elif isinstance(source, Mapping):
        weights = source
    else:
        weights, name = DirectoryWeights(source), name or str(source)
    layers = [int(key.split(".")[2]) for key in weights if key.startswith("model.layers.")]
    keys = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        f"model.layers.{max(layers, default=0)}.mlp.down_proj.weight",
        "model.norm.weight",
    ]
    if missing := [key for key in keys if key not in weights]:
        raise CheckpointError(f"the base model {name!r} has no weight {missing[0]}: its family is not supported")
    digest = hashlib.sha256()
    for key in keys:
        x = weights[key]
        digest.update(f"{key}{list(x.shape)}".encode())
        part = x[:_FINGERPRINT_ROWS].detach().cpu().to(torch.bfloat16).contiguous()
        digest.update(part.view(torch.int16).numpy().tobytes())
    return Fingerprint(name or "", digest.hexdigest())
