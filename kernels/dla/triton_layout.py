"""How a packed batch is cut for the Triton kernels: segments, blocks, rows of slot tables, windows.

All B * T tokens are numbered in one line. A *segment* is a document, or the part of one inside a row; a *block* is
`block` consecutive tokens of one segment (the last may be shorter: no block straddles two documents, so no kernel needs
a document mask); a *row* is a moment between blocks: before each block and after a segment's last. A *window* is a run
of blocks whose slot states are in memory at the same time, so that the workspace does not grow with T.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from ..common.launch import ceil_div
from .documents import document_borders

# arguments whose value must not compile another kernel
SIZES = ["T", "ROW", "N_TOKENS", "N_BLOCKS", "DQ", "DKS", "block_lo", "row_lo", "tile_lo", "token_lo"]
NEVER = 2**30  # death of a start that lives to the end, in line coordinates


@dataclass(frozen=True)
class Window:
    """Blocks [block_lo, block_hi) with the rows [row_lo, row_hi] around them.

    Attributes:
        segments: int32 [n, 4] on the device: first block, blocks, segment, and whether the segment began earlier.
        resumes, continues: the first segment began in an earlier window; the last one continues in the next.
    """

    block_lo: int
    block_hi: int
    row_lo: int
    row_hi: int
    segments: Tensor
    segment_lo: int
    resumes: bool
    continues: bool

    @property
    def rows(self) -> int:
        return self.row_hi - self.row_lo + 1


@dataclass(frozen=True)
class BlockLayout:
    """Tables on the device (int32), and the windows.

    Attributes:
        blocks: [n, 4]: first token, end, row before it, and whether it is its segment's last. rows: [n, 3]: token it
            precedes, first token of the segment, segment. segments: [n, 3]: first token, end, first row. tiles: [n, 4]:
            first token, end, block, place in the block.
    """

    tokens: int
    block: int
    firsts: tuple[int, ...]  # first token of each block, and the end
    blocks: Tensor
    rows: Tensor
    segments: Tensor
    tiles: Tensor
    tiles_before: tuple[int, ...]  # each block, and all of them
    spans: tuple[tuple[int, int], ...]  # first token and end of each segment
    last_segments: Tensor  # int64 [B]: of each row of the batch
    windows: tuple[Window, ...]
    window_segments: Tensor  # of all windows, see `Window`


def make_layout(
    batch: int, length: int, cu_seqlens: Tensor | None, block: int, window_rows: int, device, tile: int | None = None
) -> BlockLayout:
    """The layout of [batch, length] tokens; `cu_seqlens` int [n + 1] over the flattened tokens, or None; a block
    is one tile unless `tile` says how many tokens a tile has.

    Empty documents are dropped; every row start begins a segment. Reads `cu_seqlens` on the host (one synchronisation
    if it is on a GPU).
    """
    cuts = document_borders(cu_seqlens, batch, length)
    return _layout(length, cuts, block, window_rows, torch.device(device), tile or block)


@lru_cache(maxsize=64)
def _layout(
    length: int, cuts: tuple[int, ...], block: int, window_rows: int, device: torch.device, tile: int
) -> BlockLayout:
    segments = list(zip(cuts, cuts[1:], strict=False))
    blocks: list[tuple[int, int, int, int]] = []  # first token, end, row before it, segment
    rows: list[tuple[int, int, int]] = []  # token, first token of the segment, segment
    first_block: list[int] = []
    spans: list[tuple[int, int, int]] = []  # first token, end, first row
    for s, (begin, end) in enumerate(segments):
        first_block.append(len(blocks))
        spans.append((begin, end, len(rows)))
        for first in range(begin, end, block):
            blocks.append((first, min(first + block, end), len(rows), s))
            rows.append((first, begin, s))
        rows.append((end, begin, s))
    first_block.append(len(blocks))
    tiles = [
        (begin, min(begin + tile, end), b, (begin - first) // tile)
        for b, (first, end, _, _) in enumerate(blocks)
        for begin in range(first, end, tile)
    ]
    before = tuple(accumulate((ceil_div(x[1] - x[0], tile) for x in blocks), initial=0))
    windows, window_segments = _windows(blocks, first_block, window_rows, device)

    def table(x: list) -> Tensor:
        return torch.tensor(x, dtype=torch.int32, device=device)

    block_table = table([(first, end, row, int(end == segments[s][1])) for first, end, row, s in blocks])
    last = tuple(s for s, (_, end) in enumerate(segments) if end % length == 0)
    last_segments = torch.tensor(last, device=device)
    firsts = (*(x[0] for x in blocks), cuts[-1])
    return BlockLayout(
        cuts[-1], block, firsts, block_table, table(rows), table(spans), table(tiles), before, tuple(segments),
        last_segments, windows, window_segments,
    )  # fmt: skip


def _windows(
    blocks: list[tuple[int, int, int, int]], first_block: list[int], window_rows: int, device: torch.device
) -> tuple[tuple[Window, ...], Tensor]:
    cuts: list[tuple[int, int, int, int]] = []
    table: list[tuple[int, int, int, int]] = []
    rows = blocks[-1][2] + 2
    window_rows = min(window_rows, 1 + ceil_div(rows, ceil_div(rows, window_rows)))  # about equal ones
    lo = 0
    while lo < len(blocks):
        hi = lo + 1
        while hi < len(blocks) and blocks[hi][2] + 1 - blocks[lo][2] < window_rows:
            hi += 1
        begin = len(table)
        for s in range(blocks[lo][3], blocks[hi - 1][3] + 1):
            first, last = max(lo, first_block[s]), min(hi, first_block[s + 1])
            table.append((first, last - first, s, int(first > first_block[s])))
        cuts.append((lo, hi, begin, len(table)))
        lo = hi
    segments = torch.tensor(table, dtype=torch.int32, device=device)  # one copy to the device for all windows
    windows = tuple(
        Window(
            block_lo=lo,
            block_hi=hi,
            row_lo=blocks[lo][2],
            row_hi=blocks[hi - 1][2] + 1,
            segments=segments[begin:end],
            segment_lo=blocks[lo][3],
            resumes=lo > first_block[blocks[lo][3]],
            continues=hi < first_block[blocks[hi - 1][3] + 1],
        )
        for lo, hi, begin, end in cuts
    )
    return windows, segments
