"""Keys and values of softmax layers in pages: where a call's tokens are written, and what its queries see.

Every sequence attends by a call of its own over exactly its own tokens. Padding them to the longest of a batch would
make the rounding of one sequence depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dla.serving.engine.config import PAGE
from megatron_dla.serving.engine.pages import PageTable


@dataclass
class View:
    """One sequence in a call, for all layers of one kind.

    Attributes:
        row: in the batch. places: int64 [T], of the new tokens, counted in tokens. pages: int64 [n], of the table, or a
            slice where they lie side by side, so that they need not be gathered.
        first, last: of the tokens in these pages, those that some query sees. mask: bool [T, last - first] or None.
    """

    row: int
    places: Tensor
    pages: Tensor | slice
    first: int
    last: int
    mask: Tensor | None


def view(row: int, table: PageTable, past: int, tokens: int, device: torch.device) -> View:
    """Of `tokens` new tokens after `past`; the table has their pages."""
    places = torch.tensor([table.slot_of(t) for t in range(past, past + tokens)], device=device)
    used = -(-(past + tokens) // PAGE) - table.behind
    numbers = table.pages[:used]
    pages: Tensor | slice = slice(numbers[0], numbers[0] + used)
    if numbers != list(range(numbers[0], numbers[0] + used)):
        pages = torch.tensor(numbers, device=device)
    begin, offset = table.seen_from(past), table.behind * PAGE
    mask = None
    if tokens > 1:
        behind = torch.arange(past, past + tokens, device=device)[:, None]
        behind = behind - torch.arange(begin, past + tokens, device=device)
        mask = behind >= 0
        if table.window is not None:
            mask &= behind < table.window
    return View(row, places, pages, begin - offset, past + tokens - offset, mask)


class PagedKeys:
    """Keys and values of one layer.

    Attributes:
        keys, values: [pages, 16, G, D]. now: the sequences of the call that runs.
    """

    def __init__(self, pages: int, keys: Tensor) -> None:
        """`keys` [1, G, S, D]: of that shape, dtype and device."""
        _, groups, _, dim = keys.shape
        self.keys, self.values = (keys.new_zeros(pages, PAGE, groups, dim) for _ in "kv")
        self.now: list[View] = []

    @property
    def token_bytes(self) -> int:
        return 2 * self.keys[0, 0].nbytes

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`LayerMemory.attend`: [B, heads, T, D]; zeros in rows of no sequence."""
        out = q.new_zeros(q.shape)
        if not self.now:
            return out
        rows, places = [x.row for x in self.now], torch.cat([x.places for x in self.now])
        for pool, new in ((self.keys, k), (self.values, v)):
            pool.flatten(0, 1).index_copy_(0, places, new[rows].transpose(1, 2).flatten(0, 1))
        grouped = k.shape[1] != q.shape[1]
        for one in self.now:
            keys, values = (
                pool[one.pages].flatten(0, 1)[one.first : one.last].transpose(0, 1)[None]
                for pool in (self.keys, self.values)
            )
            query = q[one.row : one.row + 1].clone()  # at an address of its own: rounding may depend on alignment
            out[one.row] = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=one.mask, enable_gqa=grouped
            )[0]  # fmt: skip
        return out

    def copy(self, table: PageTable, tokens: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Whole pages of a table that hold some of the first `tokens` tokens, [n, 16, G, D] each, on `device`."""
        used = -(-tokens // PAGE) - table.behind
        pages = torch.tensor(table.pages[:used], dtype=torch.int64, device=self.keys.device)
        return self.keys[pages].to(device), self.values[pages].to(device)

    def paste(self, table: PageTable, pair: tuple[Tensor, Tensor]) -> None:
        """Into the first pages of a table that has at least as many."""
        pages = torch.tensor(table.pages[: len(pair[0])], dtype=torch.int64, device=self.keys.device)
        for pool, x in zip((self.keys, self.values), pair, strict=True):
            pool[pages] = x.to(pool.device)
