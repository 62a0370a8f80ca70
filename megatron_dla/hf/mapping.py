"""Layout-free checkpoint keys <-> Hugging Face names: one table, read in both directions.

Also the tags (how each parameter is cut over tensor-parallel ranks) that a checkpoint needs, from the sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dla.config import LETTERS, ModelSection, attention_head_dim, layer_letters
from megatron_dla.errors import CheckpointError
from megatron_dla.model.parameters import MIXER_PARAMETERS, model_parameters
from megatron_dla.parallel.tags import Tag


@dataclass(frozen=True)
class Entry:
    """Layout-free keys and the Hugging Face names that they become together; `to_hf` and `from_hf` do it."""

    keys: tuple[str, ...]
    names: tuple[str, ...]
    to_hf: Callable[..., tuple[Tensor, ...]] = lambda *x: x
    from_hf: Callable[..., tuple[Tensor, ...]] = lambda *x: x


def _packed(keys: tuple[str, ...], name: str, sizes: list[int]) -> Entry:
    """Sections that are packed in one Hugging Face matrix, in this order: one product, as in Megatron, so that both
    models round alike."""
    return Entry(keys, (name,), lambda *x: (torch.cat(x),), lambda x: tuple(t.contiguous() for t in x.split(sizes)))


_MLP = {
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_MODEL = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}


def _mlp(section: ModelSection, ours: str, theirs: str, dense: bool) -> list[Entry]:
    table = [Entry((f"{ours}.{key}",), (f"{theirs}.{name}",)) for key, name in _MLP.items()]
    if dense:
        return table + [Entry((f"{ours}.mlp.{p}",), (f"{theirs}.mlp.{p}_proj.weight",)) for p in ("gate", "up")]
    keys, sizes = (f"{ours}.mlp.gate", f"{ours}.mlp.up"), [section.ffn_hidden_size] * 2
    return [*table, _packed(keys, f"{theirs}.mlp.gate_up_proj.weight", sizes)]


def _recurrence(section: ModelSection, letter: str, ours: str, theirs: str) -> list[Entry]:
    """A mixer whose parameters have the same names in both models; the sections of a packed one stay together."""
    table = []
    for name, spec in MIXER_PARAMETERS[letter](section, 1).items():
        if spec.sections:
            keys = tuple(f"{ours}.{section}" for section, _ in spec.sections)
            table.append(_packed(keys, f"{theirs}.{name}", [n for _, n in spec.sections]))
        else:
            table.append(Entry((f"{ours}.{name}",), (f"{theirs}.{name}",)))
    return table


def softmax_entries(section: ModelSection, letter: str, ours: str, theirs: str) -> list[Entry]:
    """A softmax mixer, with the names of the Llama family."""
    table = [_qkv(section, ours, theirs), Entry((f"{ours}.linear_proj.weight",), (f"{theirs}.o_proj.weight",))]
    for p in "qk" if section.qk_norm else "":
        table.append(Entry((f"{ours}.{p}_layernorm.weight",), (f"{theirs}.{p}_norm.weight",)))
    return table


def _qkv(section: ModelSection, ours: str, theirs: str) -> Entry:
    """Megatron packs [query heads of the group, key, value] for each key/value group."""
    groups, heads = section.attention_groups, section.attention_heads // section.attention_groups
    dim = attention_head_dim(section)

    def split(x: Tensor) -> tuple[Tensor, ...]:
        packed = x.unflatten(0, (groups, (heads + 2) * dim))
        return tuple(part.flatten(0, 1).contiguous() for part in packed.split([heads * dim, dim, dim], 1))

    def join(*parts: Tensor) -> Tensor:
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1).contiguous()

    names = tuple(f"{theirs}.{p}_proj.weight" for p in "qkv")
    return Entry((f"{ours}.linear_qkv.weight",), names, split, lambda *x: (join(*x),))


def entries(section: ModelSection, dense: bool = False) -> list[Entry]:
    """The whole table of one model, in the order of its layers.

    `dense`: names of the Llama family (gate and up projection apart) instead of those of our own export.
    """
    table = [Entry((key,), (name,)) for key, name in _MODEL.items()]
    if not section.tie_embeddings:
        table.append(Entry(("output_layer.weight",), ("lm_head.weight",)))
    for n, letter in enumerate(layer_letters(section)):
        ours, theirs = f"decoder.layers.{n}", f"model.layers.{n}"
        table.append(Entry((f"{ours}.input_layernorm.weight",), (f"{theirs}.input_layernorm.weight",)))
        if section.ffn_hidden_size:
            table += _mlp(section, ours, theirs, dense)
        mixer = softmax_entries if LETTERS[letter].softmax else _recurrence
        table += mixer(section, letter, f"{ours}.self_attention", f"{theirs}.{LETTERS[letter].hf_module}")
    return table


Renaming = tuple[tuple[str, ...], tuple[str, ...], Callable[..., tuple[Tensor, ...]]]


def check_names(given: set[str], wanted: set[str], what: str) -> None:
    """Raises CheckpointError for a missing or a left-over name."""
    if missing := sorted(wanted - given):
        raise CheckpointError(f"{what}: {missing[0]} is missing ({len(missing)} in all): it is of another model")
    if left := sorted(given - wanted):
        raise CheckpointError(f"{what}: {left[0]} has no place in this model ({len(left)} in all)")


class Renamed(Mapping[str, Tensor]):
    """The tensors of another mapping under the names of the other side, each made when it is asked for.

    The last entry of the table is kept, so that the parts of a packed matrix are made once where they are asked for
    in order.

    Args:
        source: not read here. table: for each entry, its names in `source`, its new names, and the function from the
            first tensors to the second.

    Raises:
        RuntimeError: on reading a tensor whose shape is not what the function takes; the message names it.
    """

    def __init__(self, source: Mapping[str, Tensor], table: Sequence[Renaming]) -> None:
        self._source, self._table = source, table
        self._places = {new: (n, i) for n, (_, news, _) in enumerate(table) for i, new in enumerate(news)}
        self._last: tuple[int, tuple[Tensor, ...]] = (-1, ())

    def __getitem__(self, name: str) -> Tensor:
        n, part = self._places[name]
        if n != self._last[0]:
            self._last = (-1, ())  # before the next one is read
            olds, _, function = self._table[n]
            tensors = [self._source[old] for old in olds]
            try:
                self._last = (n, function(*tensors))
            except (RuntimeError, IndexError) as error:
                shapes = ", ".join(f"{old} {list(x.shape)}" for old, x in zip(olds, tensors, strict=True))
                raise RuntimeError(f"{shapes}: {error}") from error
        return self._last[1][part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def to_hf_names(merged: Mapping[str, Tensor], section: ModelSection, dense: bool = False) -> Renamed:
    """Layout-free tensors (see `MergedWeights`) under their Hugging Face names (`dense`: see `entries`).

    Raises:
        CheckpointError: a key is missing or left over; the message names it.
    """
    table = entries(section, dense)
    check_names(set(merged), {key for entry in table for key in entry.keys}, "checkpoint")
    return Renamed(merged, [(entry.keys, entry.names, entry.to_hf) for entry in table])


def from_hf_names(
    state: Mapping[str, Tensor], section: ModelSection, dense: bool = False, what: str = "Hugging Face weights"
) -> Renamed:
    """The inverse of `to_hf_names`, exact. Raises CheckpointError likewise; the message begins with `what`."""
    table = entries(section, dense)
    check_names(set(state), {name for entry in table for name in entry.names}, what)
    return Renamed(state, [(entry.names, entry.keys, entry.from_hf) for entry in table])


def parameter_tags(section: ModelSection, tensor_parallel: int = 1) -> dict[str, Tag]:
    """Name -> tag of every parameter of the Megatron model, without building it (a test holds the two together)."""
    table = model_parameters(section, section.vocab_multiple, tensor_parallel)
    return {name: Tag(spec.kind, spec.dim, spec.sections) for name, spec in table.items()}
