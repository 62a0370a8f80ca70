"""Layout-independent optimizer state: each rank writes its pieces with their place in the whole parameter.

step_N/optimizer/tp_00_dp_0000.safetensors ...   flat fp32 pieces, key "parameter|quantity|first element"

Pieces are of the parameter as its tensor-parallel rank has it, flattened. Nothing is gathered to save. To load, the
pieces are joined to whole sections (see `Tag.keys`), one parameter at a time, and split for the layout of the new run:
another tensor-, context- or data-parallel size, another ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megatron_dla.checkpoint.weights import CheckpointLayout
from megatron_dla.errors import CheckpointError
from megatron_dla.files import check_weight
from megatron_dla.parallel.tags import Tag, get_tag

OPTIMIZER = "optimizer"
MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")


@dataclass
class Fragment:
    """The part of a parameter's optimizer state that this rank holds: views into a flat fp32 tensor.

    Attributes:
        start: its first element in the flattened parameter. length: number of elements.
        flat: what the inner optimizer steps; offset: the fragment's place in it.
    """

    start: int
    length: int
    flat: Tensor
    offset: int

    def views(self, state: dict[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
        """{quantity: flat view} of the master weights and the moments."""
        tensors = {MASTER: self.flat} | {key: state[self.flat][key] for key in MOMENTS}
        return {k: x.detach().view(-1).narrow(0, self.offset, self.length) for k, x in tensors.items()}


def _inner(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _flats(engine: Any) -> list[Tensor]:
    """The tensors that the inner optimizer steps, by DeepSpeed's wrapper (ZeRO-3, ZeRO-1/2, bf16 at stage 0, none)."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    for name in names:
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return [p for group in _inner(engine).param_groups for p in group["params"]]


def fragments(engine: Any) -> Iterator[tuple[str, Fragment]]:
    """(parameter name, fragment) of everything this rank holds."""
    flats = _flats(engine)
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        if hasattr(p, "ds_id"):  # ZeRO-3: equal pieces, the last one padded
            group, offset, size = engine.optimizer.grad_position[engine.optimizer.get_param_id(p)]
            start = size * torch.distributed.get_rank(p.ds_process_group)
            length = min(size, p.ds_numel - start)
            if length > 0:
                yield name, Fragment(start, length, flats[group], offset)
        elif hasattr(p, "_hp_mapping"):
            if (mapping := p._hp_mapping) is not None:
                where, place = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                yield name, Fragment(where.start, where.numel, flats[mapping.param_group_index], place.start)
        else:
            yield name, Fragment(0, p.numel(), p, 0)


def optimizer_file(tensor_rank: int, data_rank: int) -> str:
    """Path inside a checkpoint; `data_rank` is over data x context."""
    return f"{OPTIMIZER}/tp_{tensor_rank:02d}_dp_{data_rank:04d}.safetensors"


def optimizer_pieces(engine: Any, data_rank: int) -> dict[str, Tensor]:
    """{key: view} of this rank's fragments; nothing where a rank before it holds the same ones (no ZeRO)."""
    if data_rank and not engine.zero_optimization_stage() and not hasattr(engine.optimizer, "optimizer"):
        return {}
    state = _with_moments(engine).state
    return {
        f"{name}|{quantity}|{fragment.start}": view
        for name, fragment in fragments(engine)
        for quantity, view in fragment.views(state).items()
    }


def updates_seen(engine: Any) -> int:
    """The number of updates that the moments have seen."""
    return int(next(iter(_with_moments(engine).state.values()))["step"])


def _with_moments(engine: Any, updates: int | None = None) -> torch.optim.Optimizer:
    """The inner optimizer, with zeros for moments that it has not made, or for all of them with `updates`.

    It makes them at its first update, which all steps so far may have left out.
    """
    inner = _inner(engine)
    fused = bool(inner.defaults.get("fused"))
    for flat in _flats(engine):
        if updates is not None or MOMENTS[0] not in inner.state[flat]:
            step = torch.tensor(float(updates or 0), device=flat.device if fused else "cpu")
            inner.state[flat] = {"step": step} | {key: torch.zeros_like(flat) for key in MOMENTS}
    return inner


@torch.no_grad()
def load_optimizer(engine: Any, directory: Path, updates: int, tensor_rank: int, tensor_size: int) -> None:
    """Set this rank's fragments from a checkpoint of any layout.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    inner, parameters = _with_moments(engine, updates), dict(engine.module.named_parameters())
    saved = SavedState(directory)
    for name, fragment in fragments(engine):
        tag = get_tag(parameters[name])
        for quantity, view in fragment.views(inner.state).items():
            full = saved.parameter(name, tag, quantity)
            mine = tag.shard(full, tensor_rank, tensor_size).reshape(-1)
            view.copy_(mine.narrow(0, fragment.start, fragment.length))


class SavedState:
    """Reads whole parameters' state from the pieces of a checkpoint, one at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.layout = directory, CheckpointLayout.load(directory)
        self._pieces: dict[tuple[int, str, str], list[tuple[int, str, Any]]] = {}
        for path in sorted((directory / OPTIMIZER).glob("tp_*_dp_*.safetensors")):
            file = safe_open(path, "pt")
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                name, quantity, start = key.split("|")
                place = (int(path.name.split("_")[1]), name, quantity)
                self._pieces.setdefault(place, []).append((int(start), key, file))
        # layout-free key -> (parameter that holds it there, number of the section)
        self._where = {
            key: (name, number)
            for name, tag in self.layout.tags.items()
            for number, key in enumerate(tag.keys(name))
        }  # fmt: skip
        self._last: tuple[tuple[str, str], tuple[Tensor, ...]] | None = None

    def parameter(self, name: str, tag: Tag, quantity: str) -> Tensor:
        """The whole model's value for a parameter of the new layout, whose sections may lie elsewhere in the old."""
        sections = []
        for key in tag.keys(name):
            if key not in self._where:
                raise CheckpointError(f"{str(self.directory)!r} has no optimizer state of {key}: use another step")
            old, number = self._where[key]
            sections.append(self._sections(old, quantity)[number])
        return torch.cat(sections, tag.dim)

    def _sections(self, name: str, quantity: str) -> tuple[Tensor, ...]:
        if self._last is None or self._last[0] != (name, quantity):
            tag, size = self.layout.tags[name], self.layout.tensor_parallel
            holders = range(size) if tag.kind == "sharded" else range(1)
            shape = self._shape(name)
            full = tag.unshard([self._joined(rank, name, quantity, shape) for rank in holders])
            self._last = ((name, quantity), tag.split(full))
        return self._last[1]

    def _shape(self, name: str) -> torch.Size:
        return torch.Size(self.layout.shapes[name])

    def _joined(self, tensor_rank: int, name: str, quantity: str, shape: torch.Size) -> Tensor:
        flat = torch.empty(shape.numel())
        end = 0
        for start, key, file in sorted(self._pieces.get((tensor_rank, name, quantity), []), key=lambda x: x[0]):
            piece = self._checked(key, quantity, file.get_tensor(key))
            if start != end:
                break
            flat[start : start + len(piece)] = piece
            end = start + len(piece)
        if end != len(flat):
            raise CheckpointError(
                f"{str(self.directory / OPTIMIZER)!r} is incomplete ({quantity} of {name} on tensor-parallel rank "
                f"{tensor_rank} ends at element {end} of {len(flat)}): restore its files or use another step"
            )
        return flat.view(shape)

    def _checked(self, key: str, quantity: str, piece: Tensor) -> Tensor:
        """Values that no optimizer has would be trained on until the weights are lost."""
        where, fix = f"{str(self.directory / OPTIMIZER)!r}", "restore its files or use another step"
        check_weight(key, piece, where, fix)
        if quantity == MOMENTS[1] and bool((piece < 0).any()):
            raise CheckpointError(f"{where}: {key} has negative values, which squares do not have: {fix}")
        return piece


def local_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Each trained parameter's shape on a tensor-parallel rank, before ZeRO-3 partitions it."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.requires_grad}
