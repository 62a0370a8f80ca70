"""What the imports of plain linear-attention models share: checks of their settings, and weights under our names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_dla.config import ModelSection
from megatron_dla.errors import CheckpointError
from megatron_dla.hf.mapping import Entry
from megatron_dla.mixers.layout import FP32_PARAMETERS, Init, dla_parameters


@dataclass(frozen=True)
class Family:
    """How the models of one model_type become DLA models.

    Attributes:
        architecture: the class that wrote them. embedding, final_norm: names of these weights.
        section: from config.json's contents, the shapes of the weights, and the file's name for messages.
            Raises CheckpointError for a setting that would be computed differently here.
        layer: the entries of a layer, from the section, its number and letter, and the dtype of the weights.
    """

    architecture: str
    embedding: str
    final_norm: str
    section: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]], str], ModelSection]
    layer: Callable[[ModelSection, int, str, torch.dtype], list[Entry]]


def unsupported(where: str, key: str, value: Any, wanted: Any) -> CheckpointError:
    return CheckpointError(f"{where}: {key} = {value} is not supported, only {wanted}: import another model")


def check_supported(
    found: Mapping[str, Any], wanted: Mapping[str, Collection[Any]], where: str, prefix: str = ""
) -> None:
    """Raises CheckpointError for a key that is there with another value than those wanted."""
    for key, values in wanted.items():
        if key in found and found[key] not in values:
            raise unsupported(where, f"{prefix}{key}", found[key], next(iter(values)))


def mixer_entries(
    section: ModelSection, ours: str, theirs: str, names: Mapping[str, tuple[str, ...]], dtype: torch.dtype
) -> list[Entry]:
    """A DLA mixer from the weights of its backbone; what these lack begins with its initial values.

    Args:
        names: their name -> our parameters and sections that it holds, in order; those that the section does not have
            are left out.
    """
    parts: dict[str, tuple[tuple[int, ...], torch.dtype, Init]] = {}
    for name, spec in dla_parameters(section).items():
        kept = torch.float32 if name in FP32_PARAMETERS else dtype
        sections = spec.sections or ((name, spec.shape[0]),)
        inits = spec.inits * (len(sections) // len(spec.inits))
        for (part, rows), init in zip(sections, inits, strict=True):
            parts[part] = ((rows, *spec.shape[1:]), kept, init)
    table = []
    for name, packed in names.items():
        if packed[0] in parts:
            kinds = [parts.pop(part)[:2] for part in packed]
            keys = tuple(f"{ours}.{part}" for part in packed)
            table.append(Entry(keys, (f"{theirs}.{name}",), from_hf=partial(_split, kinds)))
    return table + [Entry((f"{ours}.{part}",), (), from_hf=partial(_initial, *kind)) for part, kind in parts.items()]


def _split(kinds: list[tuple[tuple[int, ...], torch.dtype]], x: Tensor) -> tuple[Tensor, ...]:
    pieces = x.split([shape[0] for shape, _ in kinds])
    # a convolution has an axis of one channel more
    return tuple(piece.reshape(shape).to(dtype) for piece, (shape, dtype) in zip(pieces, kinds, strict=True))


def _initial(shape: tuple[int, ...], dtype: torch.dtype, init: Init) -> tuple[Tensor, ...]:
    return (init(shape, None).to(dtype),)
