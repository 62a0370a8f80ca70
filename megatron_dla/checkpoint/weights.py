"""Weights on disk, loadable at every tensor-parallel size and readable with torch and safetensors alone.

step_N/layout.json            model section, vocabulary, tokenizer, and one tag a parameter
step_N/weights/tp_00.safetensors ...   each tensor-parallel rank's part
step_N/optimizer/...          see `checkpoint.optimizer`
step_N/complete.json          written last: without it the checkpoint does not exist
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dla.checkpoint.find import COMPLETE, LAYOUT
from megatron_dla.checkpoint.integrity import FORMAT_VERSION, damaged_error, find_faults
from megatron_dla.config import ModelSection, check_model, from_dict
from megatron_dla.errors import CheckpointError
from megatron_dla.files import compact, open_tensors, parse_json
from megatron_dla.parallel.tags import Tag, get_tag, is_stored

WEIGHTS = "weights"
_FIX = "restore it or use another step"


@dataclass
class CheckpointLayout:
    """The contents of a checkpoint's `layout.json`.

    Attributes:
        model: the model section of the run's config. vocab_size: padded rows of the embedding.
        tokenizer_sha256: of the tokenizer file it was trained with: the sentencepiece model, or tokenizer.json of an
            imported model (empty: it came without one).
        tensor_parallel: number of weight files. tags: parameter name -> how it is cut. step: optimizer steps done.
        shapes: parameter name -> its shape on a tensor-parallel rank (needed for optimizer state only).
        adapter: of a run that trains one, its `delta_mem` section and frozen `base` (name, sha256); the tensors are
            the adapter's alone then. Empty otherwise.
    """

    model: ModelSection
    vocab_size: int
    tokenizer_sha256: str
    tensor_parallel: int
    seq_len: int
    step: int
    tags: dict[str, Tag]
    shapes: dict[str, list[int]] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)

    def check_types(self) -> None:
        """Raises TypeError where a file gave a field another type, ValueError for a size that is none."""
        kinds = {"vocab_size": int, "seq_len": int, "step": int, "tensor_parallel": int, "tokenizer_sha256": str,
                 "shapes": dict, "adapter": dict}  # fmt: skip
        parts = self.adapter if isinstance(self.adapter, dict) else {}
        wrong = [name for name, kind in kinds.items() if not isinstance(getattr(self, name), kind)]
        if parts:
            wrong += [f"adapter.{key}" for key in ("base", "delta_mem") if not isinstance(parts.get(key), dict)]
        if wrong:
            raise TypeError(f"{wrong[0]} has a wrong type")
        for name, least in {"vocab_size": 1, "seq_len": 1, "step": 0, "tensor_parallel": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}")

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1)

    def save(self, path: Path) -> None:
        path.write_text(self.to_json())

    @classmethod
    def load(cls, directory: Path) -> CheckpointLayout:
        """Raises CheckpointError where the directory holds no complete checkpoint of this format, or it is damaged."""
        if not (directory / COMPLETE).is_file():
            raise CheckpointError(
                f"{str(directory)!r} is not a complete checkpoint ({COMPLETE} is missing): give a step_N directory"
            )
        try:
            values: dict[str, Any] = parse_json((directory / LAYOUT).read_bytes())
            version = values.pop("format_version", None)
            if version not in range(1, FORMAT_VERSION + 1):
                raise CheckpointError(f"{str(directory)!r} has format {version}, this reads up to {FORMAT_VERSION}")
            if version > 1 and (faults := find_faults(directory, [LAYOUT])):
                raise damaged_error(directory, faults, _FIX)
            tags = {
                name: Tag(tag["kind"], tag["dim"], tuple((s, n) for s, n in tag["sections"]))
                for name, tag in values.pop("tags").items()
            }
            model = from_dict({"model": values.pop("model")}).model
            check_model(model)
            layout = cls(model=model, tags=tags, **values)
            layout.check_types()
            return layout
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{str(directory / LAYOUT)!r} is missing or damaged ({error}): {_FIX}"
            raise CheckpointError(message) from error


def parameter_tags(model: nn.Module) -> dict[str, Tag]:
    """Name -> tag of every parameter that a checkpoint holds."""
    return {name: get_tag(p) for name, p in model.named_parameters() if is_stored(p)}


def weight_file(rank: int) -> str:
    """Path inside a checkpoint of a tensor-parallel rank's parameters."""
    return f"{WEIGHTS}/tp_{rank:02d}.safetensors"


class MergedWeights(Mapping[str, Tensor]):
    """The whole model's tensors from all ranks' files, each read when it is asked for.

    {layout-free key: tensor}: sections are apart, e.g. `decoder.layers.0.self_attention.query` [G Dk, hidden],
    `decoder.layers.0.mlp.gate`; a parameter of one section keeps its name. The last parameter is kept, so that sections
    which are asked for in order are read once.

    Args:
        verify: hash the files first; False where that is done.

    Attributes:
        layout: of the checkpoint. parameters: how many numbers the whole model holds. where: its directory, quoted.

    Raises:
        CheckpointError: incomplete, or a file is missing or damaged.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        directory = Path(directory)
        self.where, self.layout = repr(str(directory)), CheckpointLayout.load(directory)
        files = [weight_file(rank) for rank in range(self.layout.tensor_parallel)]
        if verify and (faults := find_faults(directory, files)):
            raise damaged_error(directory, faults, _FIX)
        self._files, self.parameters = [], 0
        for path in (directory / name for name in files):
            try:
                self._files.append(open_tensors(path))
            except Exception as error:  # safetensors raises its own and OSError alike
                raise CheckpointError(f"{str(path)!r} is missing or damaged ({error}): {_FIX}") from error
        names = [set(file.keys()) for file in self._files]
        self._places: dict[str, tuple[str, int]] = {}
        for name, tag in self.layout.tags.items():
            if absent := [rank for rank, found in enumerate(names) if name not in found]:
                raise CheckpointError(f"{str(directory)!r}: {name} is missing in the weights of rank {absent[0]}")
            self._places |= {key: (name, i) for i, key in enumerate(tag.keys(name))}
            shape = torch.Size(self._files[0].get_slice(name).get_shape())
            self.parameters += tag.full_shape(shape, self.layout.tensor_parallel).numel()
        self._last: tuple[str, tuple[Tensor, ...]] = ("", ())

    def __getitem__(self, key: str) -> Tensor:
        name, section = self._places[key]
        if name != self._last[0]:
            self._last = ("", ())  # before the next one is read
            tag = self.layout.tags[name]
            try:
                self._last = (name, tag.split(tag.unshard([file.get_tensor(name) for file in self._files])))
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise CheckpointError(
                    f"{self.where}: {name} does not fit {LAYOUT} ({str(error)[:200]}): use another checkpoint"
                ) from error
        return self._last[1][section].contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def load_merged(directory: str | Path, *, verify: bool = True) -> tuple[dict[str, Tensor], CheckpointLayout]:
    """The tensors of `MergedWeights`, all of them in memory, and the layout. Raises CheckpointError likewise."""
    weights = MergedWeights(directory, verify=verify)
    return dict(weights), weights.layout


def split_merged(merged: Mapping[str, Tensor], tags: dict[str, Tag], rank: int, size: int) -> dict[str, Tensor]:
    """One rank's parameters from layout-free keys: the inverse of `load_merged`, at any tensor-parallel size."""
    local = {}
    for name, tag in tags.items():
        full = torch.cat([merged[key] for key in tag.keys(name)], tag.dim)
        local[name] = compact(tag.shard(full, rank, size))
    return local
