"""The cache of a DLA language model between calls (copied into every exported directory)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import Partition, SlotCache


@dataclass
class LayerMemory:
    """One layer's memory: slots and convolution tail (DLA), or keys and values (softmax attention).

    Attributes:
        slots: the K states. tail: the last W - 1 inputs of the value, query and key convolutions, [B, W - 1, C].
        keys, values: [B, G, S, D], rotated keys; they grow with the context, or to the sliding window less one.
        decided: the partition of a pass that fills no cache, for its recomputation under gradient checkpointing: a
            boundary that rounded to the other side would give the gradient of another function.
        attend: instead of `keys` and `values`, where an engine keeps them itself: takes the rotated queries, keys and
            values of the new tokens, [B, heads, T, D], and returns the attention's output, shaped as the queries.
    """

    slots: SlotCache | None = None
    tail: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    decided: Partition | None = None
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.tail, self.keys, self.values) if x is not None]

    def select(self, index: Tensor) -> LayerMemory:
        """The sequences `index` (int64 [B']) of the batch, copied. Raises ValueError where an engine keeps the keys."""
        if self.attend is not None:
            raise ValueError("keys and values of this cache are kept by an engine: only it can copy a sequence")

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index.to(x.device)]

        return LayerMemory(
            slots=None if self.slots is None else self.slots.select(index.to(self.slots.live.device)),
            tail=pick(self.tail),
            keys=pick(self.keys),
            values=pick(self.values),
        )


class DLACache:
    """`past_key_values` of a DLA model. Calls change it in place; `clone()` forks a session.

    Constant in size for a model without softmax layers, whatever the length of the context. It cannot be cropped
    (tokens cannot be removed from a recurrent state), so assisted decoding is not supported.

    Attributes:
        layers: one `LayerMemory` a layer. seen: tokens read, padding included.
        padding: int64 [B], leading padded tokens of each sequence, or None.
        lengths: int64 [B], tokens read of each sequence, where an engine batches sequences of different lengths
            without padding; it sets them before each call. None: `seen` of all.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerMemory() for _ in range(num_layers)]
        # "linear" caches are those of transformers' own classes: generate() reads the whole history again for them
        self.is_linear = [False] * num_layers
        self.seen = 0
        self.padding: Tensor | None = None
        self.lengths: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no upper bound on the context."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        slots = sum(layer.slots.nbytes for layer in self.layers if layer.slots is not None)
        return slots + sum(x.nbytes for layer in self.layers for x in layer.tensors())

    @property
    def batch_size(self) -> int | None:
        """Sequences held, None before the first call."""
        for layer in self.layers:
            if layer.slots is not None:
                return layer.slots.live.shape[0]
            if layer.keys is not None:
                return layer.keys.shape[0]
        return None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (int64 [B']), in that order."""
        self.layers = [layer.select(indices) for layer in self.layers]
        for name in ("padding", "lengths"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, x[indices.to(x.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i continues sequence `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times in a row."""
        self.batch_select_indices(torch.arange(self.batch_size or 0).repeat_interleave(repeats))

    def clone(self) -> DLACache:
        """An independent copy. Raises ValueError where an engine keeps the keys."""
        if any(layer.attend is not None for layer in self.layers):
            raise ValueError("keys and values of this cache are kept by an engine: only it can copy a sequence")
        copy = DLACache(len(self.layers))
        copy.seen, copy.padding, copy.lengths = self.seen, self.padding, self.lengths
        copy.layers = [
            LayerMemory(
                slots=None if layer.slots is None else layer.slots.clone(),
                tail=layer.tail,  # replaced, never written to, by a call; keys and values too
                keys=layer.keys,
                values=layer.values,
            )
            for layer in self.layers
        ]
        return copy

    def crop(self, max_length: int) -> None:
        """Raises ValueError: tokens cannot be taken back out of a recurrent state."""
        raise ValueError("a DLA cache cannot be cropped: keep a clone() of the earlier one (no assisted decoding)")


__all__ = ["DLACache", "LayerMemory"]
