"""DLA on Triton kernels: forward and backward over windows of the sequence (the `triton` backend).

The forward pass keeps, for the backward one, its inputs, the partition and the K-slot cache at every window's start;
snapshots of the slot states exist for one window at a time, so the workspace does not grow with T.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..common.launch import ceil_div, power_of_two
from . import triton_tables
from .autocast import without_autocast
from .triton_backward import (
    decay_gradient_kernel,
    group_gradient_kernel,
    key_gradient_kernel,
    pairs_backward_kernel,
    slot_query_gradient_kernel,
    state_gradient_kernel,
    token_gradient_kernel,
    value_gradient_kernel,
)
from .triton_carry import block_states_kernel, carry_gradients_kernel, carry_states_kernel
from .triton_compose import (
    compose_backward_kernel,
    compose_kernel,
    tile_decay_kernel,
    transition_backward_kernel,
    transition_kernel,
)
from .triton_forward import output_kernel, read_slots_kernel
from .triton_launch import ALL_REGISTERS, PRECISION, THREE_PROGRAMS, LaunchPlan
from .triton_layout import BlockLayout, Window
from .triton_local import (
    dphi_kernel,
    inverse_kernel,
    local_forward_kernel,
    local_gradient_kernel,
    local_inverse_backward_kernel,
    local_pairs_kernel,
)
from .triton_scan import reverse_scan_kernel, state_scan_kernel
from .triton_slots import slot_columns_kernel, slot_reverse_kernel, slot_scan_kernel
from .triton_sums import add_heads
from .triton_tables import decay_cumsum_kernel, live_anchor_kernel, live_table_kernel, tile_counts_kernel

# chunk-local kernels that know a tile's place in its block
TILED = ("local", "local_gradient", "compose", "compose_backward", "compose_backward_keys", "transition_backward")
ENOUGH_PROGRAMS = 1056  # eight for each processor of an H100


@dataclass
class Inputs:
    """Contiguous inputs in line order: q, k [T, G, DK]; v [T, H, DV]; g, beta [T, H]; lam [T, H, K]."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    lam: Tensor
    beta: Tensor | None


@dataclass
class Tables:
    """Lookups shared by all kernels; see `triton_tables.py`."""

    life: Tensor  # int32 [H, T]
    cg: Tensor  # fp32 [H, T]
    cg_tile: Tensor  # the same, from the start of each tile (Gated DeltaNet)
    counts: Tensor  # int32 [H, TILES, T]
    pos: Tensor  # int32 [rows, H, K]
    death: Tensor
    live: Tensor  # int32 [rows, H]
    columns: Tensor  # int16 [blocks, H, 5, KP], see `triton_slots.py`
    moves: Tensor  # int32 [blocks, H, 4]

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def block_decay(g: Tensor, blocks: Tensor, block: int, tiles: int = 1) -> tuple[Tensor, Tensor]:
    """Cumulative log-decay inside each of `blocks` (int32 [n, 4]: first token, end, ..), and inside each of their
    `tiles` tiles: fp32 [H, T] from [T, H]."""
    T, H = g.shape
    cg = torch.empty(H, T, dtype=torch.float32, device=g.device)
    cg_tile = torch.empty_like(cg) if tiles > 1 else cg
    decay_cumsum_kernel[(len(blocks), H)](g, cg, cg_tile, blocks, T, H, BLOCK=block, TILES=tiles, num_warps=4)
    return cg, cg_tile


def make_tables(
    plan: LaunchPlan, layout: BlockLayout, g: Tensor, life: Tensor, cache: tuple[Tensor, Tensor] | None
) -> Tables:
    """`cache`: live slots [B, H] and their deaths [B, H, K] by recency, int32."""
    T, H, K = layout.tokens, plan.H, plan.K

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=g.device)

    rows, blocks = len(layout.rows), len(layout.blocks)
    cg, cg_tile = block_decay(g, layout.blocks, plan.block, plan.tiles if plan.gdn else 1)
    tables = Tables(
        life=life, cg=cg, cg_tile=cg_tile, counts=new(H, plan.tiles, T),
        pos=new(rows, H, K), death=new(rows, H, K), live=new(rows, H),
        columns=new(blocks, H, 5, plan.slots_padded, dtype=torch.int16), moves=new(blocks, H, 4),
    )  # fmt: skip
    cache_live, cache_death = cache if cache is not None else (life, life)
    live = (tables.pos, tables.death, tables.live, T, H, K)
    spans = dict(BLOCK=plan.block, SPAN=max(triton_tables.LIVE_SPAN, plan.block), KP=plan.slots_padded, num_warps=4)
    live_anchor_kernel[(len(layout.segments), H)](
        life, layout.segments, cache_live, cache_death, *live, HAS_CACHE=cache is not None, **spans
    )
    live_table_kernel[(rows, H)](life, layout.rows, *live, **spans)
    if not plan.staged:
        slot_columns_kernel[(len(layout.window_segments), H)](
            layout.blocks, layout.window_segments, tables.pos, tables.death, tables.live, tables.columns, tables.moves,
            H, K, KP=plan.slots_padded, num_warps=1,
        )  # fmt: skip
    tile_counts_kernel[(blocks * plan.tiles, H)](life, layout.blocks, tables.counts, T, **plan.tiled(), num_warps=4)
    return tables


@dataclass
class Kept:
    """What the forward pass leaves of a window for the backward one, which computes it again otherwise."""

    states: Tensor  # snapshots, see `WindowPass.scan`
    inv: Tensor  # of each tile, see `chunk_inverse` (Gated DeltaNet; else an input)
    r_matrix: Tensor  # of each block, see `transition_kernel` (likewise)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


class WindowPass:
    """One window: its chunk-local arrays and state snapshots, and the kernels over them."""

    def __init__(
        self, plan: LaunchPlan, layout: BlockLayout, window: Window, x: Inputs, tables: Tables, backward: bool = False,
        kept: Kept | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.layout, self.window, self.x, self.tables = plan, layout, window, x, tables
        self.blocks = window.block_hi - window.block_lo
        self.token_lo = layout.firsts[window.block_lo]
        self.tokens = layout.firsts[window.block_hi] - self.token_lo
        self.tiles = self.blocks * plan.tiles
        self.at: Tensor = x.v
        self.qt, self.kh, self.r_matrix = x.q, x.k, x.v
        self.inv: Tensor = x.v
        self.qt_tile, self.kh_tile, self.passing = x.q, x.k, x.k  # see `compose_kernel`
        if plan.gdn:
            self._local(backward, kept)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.x.v.device)

    def states(self, dtype: torch.dtype | None = None, rows: int | None = None) -> Tensor:
        """[rows, H, K, DK, DV], uninitialised."""
        plan = self.plan
        return self.new(rows or self.window.rows, plan.H, plan.K, plan.DK, plan.DV, dtype=dtype or plan.state_dtype)

    @property
    def tile_lo(self) -> int:
        return self.layout.tiles_before[self.window.block_lo]

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Of a program a tile and head: tiles that have tokens."""
        return self.layout.tiles_before[self.window.block_hi] - self.tile_lo, self.plan.H

    def _where(self) -> tuple[Tensor, int, int]:
        """For kernels over tiles."""
        return self.layout.tiles, self.tile_lo, self.token_lo

    def _sizes(self) -> tuple[int, int, int]:
        return self.layout.tokens, self.plan.H, self.plan.group

    def _local(self, save_passing: bool, kept: Kept | None) -> None:
        plan, x, tables = self.plan, self.x, self.tables
        assert x.beta is not None
        shape, low = (self.tokens, plan.H), plan.state_dtype
        self.at = self.new(*shape, plan.block, dtype=low)
        qt, kh = self.new(*shape, plan.DK, dtype=low), self.new(*shape, plan.DK, dtype=low)
        self.inv = (
            chunk_inverse(plan, x.k, x.beta, tables.cg_tile, self._where(), self.tokens, self.tile_grid[0])
            if kept is None
            else kept.inv
        )
        local_forward_kernel[self.tile_grid](
            x.q, x.k, x.beta, tables.cg_tile, self.inv, self.at, qt, kh, *self._where(), *self._sizes(),
            **local_launch(plan, x.k.device, "local"),
        )  # fmt: skip
        self.qt_tile, self.kh_tile, self.qt, self.kh = qt, kh, torch.empty_like(qt), torch.empty_like(kh)
        if save_passing:
            self.passing = self.new(*shape, max(0, plan.tiles - 2), plan.DK, dtype=low)
        for keys in (False, True):
            own, out = (kh, self.kh) if keys else (qt, self.qt)
            compose_kernel[self.tile_grid](
                x.k, tables.cg_tile, own, kh, self.at, out, self.passing, *self._where()[:2],
                self.layout.blocks, self.token_lo, *self._sizes(), KEYS=keys, SAVE=save_passing,
                **local_launch(plan, x.k.device, "compose"), **ALL_REGISTERS,
            )  # fmt: skip
        if kept is not None:
            self.r_matrix = kept.r_matrix
            return
        self.r_matrix = self.new(self.blocks, plan.H, plan.DK, plan.DK, dtype=low)
        meta = local_launch(plan, x.k.device, "transition")
        transition_kernel[(self.blocks, plan.H, ceil_div(plan.DK, meta["BK"]) ** 2)](
            x.k, self.kh, tables.cg, self.r_matrix, self.layout.blocks, self.window.block_lo, self.token_lo,
            *self._sizes(), **meta,
        )  # fmt: skip

    def scan(self, incoming: Tensor | None, want_final: bool = False) -> tuple[Tensor, Tensor | None]:
        """Snapshots [rows, H, K, DK, DV], and if wanted final states [segments, H, K, DK, DV] fp32.

        `incoming`: `carry`, filled where a segment begins with slots; its scratch is overwritten.
        """
        plan, tables, window = self.plan, self.tables, self.window
        snap, final = self.states(), None
        if want_final or plan.staged:
            final = self.states(torch.float32, len(window.segments))
        if plan.staged:
            assert incoming is not None and final is not None
            self._staged_scan(incoming, snap, final)
            return snap, final
        self._block_states(snap, final is not None)
        ends = (snap if incoming is None else incoming, snap, snap if final is None else final)
        slots = (tables.columns, tables.moves, *ends, self.layout.tokens, plan.H, plan.K)
        flags = dict(HAS_INCOMING=incoming is not None, WANTS_FINAL=final is not None)
        if plan.gdn:
            dims, grid = self.scan_launch()
            slot_scan_kernel[grid](
                tables.cg, self.r_matrix, self.layout.blocks, window.segments, *slots, window.block_lo, window.row_lo,
                KP=plan.slots_padded, DOT=plan.dot, PREC=PRECISION, **flags, **dims,
            )  # fmt: skip
        else:
            dims, programs = self.carry_launch()
            carry_states_kernel[programs](
                tables.cg, self.layout.blocks, window.segments, *slots, window.row_lo, **flags, **dims
            )
        return snap, final

    def _staged_scan(self, incoming: Tensor, snap: Tensor, final: Tensor) -> None:
        plan, tables, window = self.plan, self.tables, self.window
        dims, grid = self.scan_launch()
        state_scan_kernel[grid](
            self.kh, self.x.v, tables.cg, self.r_matrix, self.layout.blocks, window.segments, tables.pos, tables.death,
            tables.live, incoming, snap, final, self.layout.tokens, plan.H, plan.K, window.block_lo, window.row_lo,
            self.token_lo, BT=plan.tile, KP=plan.slots_padded, DOT=plan.dot, PREC=PRECISION, **dims,
        )  # fmt: skip

    def _block_states(self, snap: Tensor, want_final: bool) -> None:
        """What each block adds to its newest slots, at the row after it; unless wanted not of a segment's last."""
        plan, tables, window = self.plan, self.tables, self.window
        dims = plan.launch("block_states", snap.device)
        tiles = ceil_div(plan.DK, dims["BK"]) * ceil_div(plan.DV, dims["BV"])
        block_states_kernel[(self.blocks, plan.H, tiles)](
            self.kh if plan.gdn else self.x.k, self.x.v, tables.cg, self.layout.blocks, tables.pos, tables.live,
            tables.moves, snap, *self._sizes(), plan.K, window.block_lo, window.row_lo, self.token_lo, BT=plan.tile,
            WANTS_FINAL=want_final, **plan.math(), **dims,
        )  # fmt: skip

    def reverse_scan(
        self, snap: Tensor, dstates: Tensor, carry: Tensor | None, want_initial: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """`dstates` from each block's own part to D, in place; if wanted the gradients of the states that the segments
        began with [segments, H, K, DK, DV] fp32; and of cg_C of each block [blocks, H, programs] fp32 (Mamba-2).

        `carry`: see `_incoming_gradient`.
        """
        plan, tables, window = self.plan, self.tables, self.window
        initial = self.states(torch.float32, len(window.segments)) if want_initial or plan.staged else None
        ends = (dstates if carry is None else carry, dstates if initial is None else initial)
        sizes = (self.layout.tokens, plan.H, plan.K)
        flags = dict(HAS_INCOMING=carry is not None, WANTS_INITIAL=initial is not None)
        if not plan.gdn:
            dims, programs = self.carry_launch()
            dkeep = self.new(self.blocks, plan.H, programs[1])
            carry_gradients_kernel[programs](
                tables.cg, self.layout.blocks, window.segments, tables.columns, tables.moves, snap, dstates, *ends,
                dkeep, *sizes, window.block_lo, window.row_lo, **flags, **dims,
            )  # fmt: skip
            return initial, dkeep
        dims, grid = self.scan_launch(reverse=True)
        inputs = (tables.cg, self.r_matrix, self.layout.blocks, window.segments)
        meta = dict(KP=plan.slots_padded, DOT=plan.dot, PREC=PRECISION, **dims)
        if plan.staged:
            reverse_scan_kernel[grid](
                *inputs, tables.pos, tables.death, tables.live, dstates, *ends, *sizes, window.block_lo, window.row_lo,
                **meta,
            )  # fmt: skip
        else:
            slot_reverse_kernel[grid](
                *inputs, tables.columns, tables.moves, dstates, *ends, *sizes, window.block_lo, window.row_lo, **flags,
                **meta,
            )  # fmt: skip
        return initial, None

    def carry(self) -> Tensor:
        """Uninitialised states [segments, n, H, K, DK, DV] fp32, [:, 0] for a scan to begin with, the rest scratch."""
        plan = self.plan
        return self.new(len(self.window.segments), 2 if plan.staged else 1, plan.H, plan.K, plan.DK, plan.DV)

    def scan_launch(self, reverse: bool = False) -> tuple[dict[str, int], tuple[int, int, int]]:
        """Launch and grid of a scan of Gated DeltaNet."""
        plan = self.plan
        dims = plan.scan(self.x.v.device, reverse)
        return dims, (len(self.window.segments) * plan.H, 1, ceil_div(plan.DV, dims["BV"]))

    def carry_launch(self) -> tuple[dict[str, int], tuple[int, int]]:
        """Launch and grid of the kernels that go over the blocks with Mamba-2's states."""
        plan = self.plan
        dims = plan.carry(self.x.v.device)
        return dims, (len(self.window.segments) * plan.H, ceil_div(dims["D"], dims["BV"]))

    def output(self, snap: Tensor, o: Tensor) -> None:
        plan, x, tables = self.plan, self.x, self.tables
        sizes = (*self._sizes(), plan.K, self.window.block_lo, self.window.row_lo, self.token_lo)
        blocks, math, read = self.layout.blocks, plan.math(), self.new(self.tokens, plan.H, plan.DV)
        dims = plan.read_slots(o.device)
        read_slots_kernel[(self.blocks * plan.block // dims["BQ"], plan.H, ceil_div(plan.DV, dims["BV"]))](
            self.qt, tables.cg, x.lam, tables.counts, blocks, tables.death, tables.live, snap, read, *sizes, **dims,
            **plan.tiled(), **math,
        )  # fmt: skip
        dims = plan.launch("output", o.device) | (ALL_REGISTERS if plan.wide else {})
        output_kernel[(self.tiles, plan.H, ceil_div(plan.DV, dims["BV"]))](
            x.q, x.k, x.v, tables.cg, self.at, x.lam, tables.life, blocks, read, o, *sizes, **dims,
            **plan.tiled(), **math,
        )  # fmt: skip


def local_launch(plan: LaunchPlan, device: torch.device, kernel: str) -> dict:
    """Launch of the chunk-local kernels, which know no value dims."""
    found = plan.launch(kernel, device)
    del found["DV"], found["BV"]
    if kernel == "compose":  # BK of the key dims, and the BH others
        found["BK"] = min(128, power_of_two(plan.DK, 16))
        found["BH"] = power_of_two(plan.DK - 128, 16) if plan.DK > 128 else 0
    if kernel == "compose_backward_keys" and power_of_two(plan.DK) > plan.DK:
        found["num_stages"] = 1  # masks take the registers of the second one
    tiled = {"TILES": plan.tiles} if kernel in TILED else {}
    dot = {} if kernel == "inverse" else {"DOT": plan.dot}
    return {**found, **tiled, **dot, "BT": plan.tile, "PREC": PRECISION}


def chunk_inverse(
    plan: LaunchPlan, k: Tensor, beta: Tensor, cg: Tensor, where: tuple[Tensor, int, int], tokens: int, tiles: int
) -> Tensor:
    """(I + diag(beta) stril(K K^T .* D))^-1 of `tiles` tiles: fp32 [tokens, H, C].

    `where`: the table of tiles, the first of them, and its first token; `tokens`: of the tiles.
    """
    inv = torch.empty(tokens, plan.H, plan.tile, dtype=torch.float32, device=k.device)
    inverse_kernel[(tiles, plan.H)](
        k, beta, cg, inv, *where, cg.shape[1], plan.H, plan.group, **elimination(plan.tile),
        **local_launch(plan, k.device, "inverse"),
    )  # fmt: skip
    return inv


def elimination(tile: int) -> dict[str, int]:
    """Of the inverse of a tile: rows by substitution, then doublings."""
    sub = min(16, tile)
    return {"SUB": sub, "LEVELS": (tile // sub).bit_length() - 1}


def _incoming(work: WindowPass, states: Tensor | None, resumed: Tensor | None) -> Tensor | None:
    """Scan scratch with the states that the window's segments begin with; None where none begins with slots."""
    if states is None and resumed is None and not work.plan.staged:
        return None
    window, carry = work.window, work.carry()
    n = len(window.segments)
    if states is not None:
        carry[:, 0] = states[window.segment_lo : window.segment_lo + n]
    if resumed is not None:
        carry[0, 0] = resumed
    return carry


def _incoming_gradient(work: WindowPass, final: Tensor | None, resumed: Tensor | None) -> Tensor | None:
    """Scan scratch with the gradients of the states that the window's segments end with; None where all are zero."""
    if final is None and resumed is None and not work.plan.staged:
        return None
    carry = work.carry()
    if final is None:
        carry[:, 0].zero_()
    else:
        carry[:, 0] = final
    if resumed is not None:
        carry[-1, 0] = resumed
    return carry


class TritonDLA(torch.autograd.Function):
    """See `dla_attention`. Inputs as in `Inputs`; states [B, H, K, DK, DV] fp32 by recency, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        lam: Tensor,
        beta: Tensor | None,
        states: Tensor | None,
        tau: Tensor | None,
        plan: LaunchPlan,
        layout: BlockLayout,
        life: Tensor,
        cache: tuple[Tensor, Tensor] | None,
        threshold: Any,
        want_final: bool,
        keep_states: bool,
    ) -> tuple[Tensor, Tensor]:
        x = Inputs(q, k, v, g, lam, beta)
        tables = make_tables(plan, layout, g, life, cache)
        o = torch.empty_like(v)
        carries: list[Tensor] = []
        kept: list[Tensor] = []
        finals = []
        resumed = None
        for window in layout.windows:
            work = WindowPass(plan, layout, window, x, tables)
            snap, final = work.scan(_incoming(work, states, resumed), want_final or window.continues)
            work.output(snap, o)
            if keep_states:
                kept += Kept(snap, work.inv, work.r_matrix).tensors()
            if want_final:
                assert final is not None
                finals.append(final[: -1 if window.continues else None])
            if window.continues:
                assert final is not None
                resumed = final[-1].clone()
                carries.append(resumed)
            else:
                resumed = None
        ctx.save_for_backward(q, k, v, g, lam, beta, states, tau, *tables.tensors(), *carries, *kept)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.layout, ctx.cache, ctx.threshold = plan, layout, cache, threshold
        final = torch.cat(finals) if finals else v.new_empty(0, dtype=torch.float32)
        return o, final

    @staticmethod
    @without_autocast
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None):
        q, k, v, g, lam, beta, states, tau, *rest = ctx.saved_tensors
        plan, layout = ctx.plan, ctx.layout
        x = Inputs(q, k, v, g, lam, beta)
        count = len(fields(Tables))
        windows = sum(window.continues for window in layout.windows)
        tables, carries, kept = Tables(*rest[:count]), rest[count : count + windows], rest[count + windows :]
        learned = ctx.needs_input_grad[7]
        grads = Gradients.empty(plan, x, learned)
        do = torch.zeros_like(v) if do is None else do.contiguous()
        carried, size = list(carries), len(fields(Kept))
        kept_of = [Kept(*kept[i : i + size]) for i in range(0, len(kept), size)]
        resumed_grad: Tensor | None = None
        dstates = None if states is None else torch.zeros_like(states)
        for window in reversed(layout.windows):
            mine = kept_of.pop() if kept_of else None
            work = WindowPass(plan, layout, window, x, tables, True, mine)
            before = carried.pop() if window.resumes else None
            snap = mine.states if mine else work.scan(_incoming(work, states, before))[0]
            n = len(window.segments)
            ends = dfinal if dfinal is None else dfinal[window.segment_lo : window.segment_lo + n]
            carry = _incoming_gradient(work, ends, resumed_grad if window.continues else None)
            initial = backward_window(work, snap, carry, do, grads, window.resumes or dstates is not None)
            resumed_grad = initial[0] if window.resumes and initial is not None else None
            if dstates is not None:
                assert initial is not None
                own = slice(1 if window.resumes else 0, None)
                dstates[window.segment_lo : window.segment_lo + n][own] = initial[own]
        if dstates is not None:  # slots that were never live were never written
            there = torch.arange(plan.K, device=v.device) < ctx.cache[0][..., None]
            dstates = torch.where(there[..., None, None], dstates, 0)
        dtau = None
        if learned:
            dtau = ctx.threshold(grads.dlam, lam, tau)
        given = (grads.dq, grads.dk, grads.dv, grads.dg, grads.dlam.to(lam.dtype), grads.dbeta)
        return *given, dstates, dtau, *(None,) * 7


@dataclass
class Gradients:
    """Outputs of the backward kernels over the whole line."""

    dq: Tensor  # [T, G, DK]
    dk: Tensor
    dq_parts: Tensor  # each head's, fp32 [T, H, DK] (Gated DeltaNet with fewer groups), or dq
    dk_parts: Tensor
    dv: Tensor
    dg: Tensor
    dlam: Tensor  # [T, H, K]; fp32 where tau is learned: its gradient is made of differences of these
    dbeta: Tensor | None

    @classmethod
    def empty(cls, plan: LaunchPlan, x: Inputs, learned: bool) -> Gradients:
        dq, dk = torch.empty_like(x.q), torch.empty_like(x.k)
        shape = (len(x.v), plan.H, plan.DK)
        apart = plan.gdn and plan.G < plan.H
        return cls(
            dq=dq,
            dk=dk,
            dq_parts=dq.new_empty(shape, dtype=torch.float32) if apart else dq,
            dk_parts=dk.new_empty(shape, dtype=torch.float32) if apart else dk,
            dv=torch.empty_like(x.v),
            dg=torch.empty_like(x.g),
            dlam=torch.empty_like(x.lam, dtype=torch.float32 if learned else x.lam.dtype),
            dbeta=None if x.beta is None else torch.empty_like(x.beta),
        )

    def add_heads(self, at: slice) -> None:
        """The sums over heads at the tokens `at` (Gated DeltaNet with fewer groups than heads)."""
        both = ((self.dq_parts, self.dq), (self.dk_parts, self.dk))
        if parts := [(x[at], whole[at]) for x, whole in both if x is not whole]:
            add_heads(parts)


def heads_per_program(plan: LaunchPlan, programs: int) -> int:
    """Heads whose dq or dk one program adds up: all of a group if that leaves enough programs for a GPU; `programs`: of
    one head. Gated DeltaNet: 1."""
    heads = 1 if plan.gdn else plan.group
    while heads % 2 == 0 and programs * (plan.H // heads) < ENOUGH_PROGRAMS:
        heads //= 2
    return heads


def backward_window(
    work: WindowPass, snap: Tensor, carry: Tensor | None, do: Tensor, grads: Gradients, want_initial: bool
) -> Tensor | None:
    """Gradients of one window's tokens; returns, if wanted, that of the states its segments began with."""
    plan, tables, window = work.plan, work.tables, work.window
    T, H, K = work.layout.tokens, plan.H, plan.K
    sizes = (*work._sizes(), K, window.block_lo, window.row_lo, work.token_lo)
    blocks, math = work.layout.blocks, plan.math()
    dstates = work.states()
    dq, dlam, oldest, weights = _slot_query_gradient(work, snap, do)
    dims = plan.state_gradient(do.device)
    tiles = ceil_div(plan.DK, dims["BK"]) * ceil_div(plan.DV, dims["BV"])
    state_gradient_kernel[(work.blocks, H * ceil_div(K, dims["SLOTS"]), tiles)](
        work.qt, do, weights, blocks, tables.live, dstates, *sizes, work.tokens, **dims, BT=plan.tile, **math
    )
    initial, dkeep = work.reverse_scan(snap, dstates, carry, want_initial)
    dat, dat_tile, weighted, rows, cols = _pairs_backward(work, do, dlam, oldest, grads)
    grid, table, lo, tile = (work.blocks, H), blocks, window.block_lo, plan.tile
    if plan.gdn:
        written = _written_gradients(work, snap, do, weighted, dstates, carry is not None, grads)
        rows, cols, ends, dkeep = _local_backward(work, written, dat, dat_tile, dq, grads)
        grid, table, lo, tile = work.tile_grid, work.layout.tiles, work.tile_lo, 0
        grads.add_heads(slice(work.token_lo, work.token_lo + work.tokens))
    else:
        dk, ends = _token_gradients(work, do, weighted, dstates, carry is not None, grads)
        _group_gradient(work, dat, dq, dk, grads)
    assert dkeep is not None
    decay_gradient_kernel[grid](
        rows, cols, ends, dkeep, grads.dg, table, lo, T, H, KEEPS=dkeep.shape[-1], KP=power_of_two(dkeep.shape[-1], 1),
        ROWS=len(rows), COLS=len(cols), PARTS=len(ends), TILE=tile, BLOCK=plan.tile if plan.gdn else plan.block,
        num_warps=4,
    )  # fmt: skip
    return initial


def _slot_query_gradient(work: WindowPass, snap: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What reading slots adds to dq (or dQt) and to dlam, in parts; and the weights that they were read with."""
    plan, x, tables, window = work.plan, work.x, work.tables, work.window
    H, K = plan.H, plan.K
    dims = plan.slot_query_gradient(do.device)
    programs, parts = work.blocks * plan.block // dims["BQ"], ceil_div(plan.DK, dims["BK"])
    heads = heads_per_program(plan, programs * parts)
    registers = THREE_PROGRAMS if dims["num_warps"] == 4 and plan.DV <= 64 else ALL_REGISTERS
    dq = work.new(work.tokens, H // heads, plan.DK, dtype=plan.gradient_dtype)
    dlam = work.new(parts, K, H, work.tokens)
    weights, oldest = work.new(K, H, work.tokens), work.new(H, work.tokens, dtype=torch.int32)
    slot_query_gradient_kernel[(programs, H // heads, parts)](
        work.qt, do, tables.cg, x.lam, tables.counts, work.layout.blocks, tables.death, tables.live, snap, dq, dlam,
        oldest, weights, *work._sizes(), K, window.block_lo, window.row_lo, work.token_lo, work.tokens, heads,
        **dims, **plan.tiled(), **plan.math(), **registers,
    )  # fmt: skip
    return dq, dlam, oldest, weights


def _pairs_backward(
    work: WindowPass, do: Tensor, dlam: Tensor, oldest: Tensor, grads: Gradients
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dlam of the window; returns dAt (Gated DeltaNet: inside tiles apart), At .* M, parts of the decay gradient."""
    plan, x, tables, window = work.plan, work.x, work.tables, work.window
    T, H, K = work.layout.tokens, plan.H, plan.K
    own, shape = work.new(K, H, work.tokens), (work.tokens, H, plan.block)
    weighted = work.new(*shape, dtype=plan.state_dtype)
    dat = work.new(*shape, dtype=plan.state_dtype)
    dat_tile = work.new(work.tokens, H, plan.tile) if plan.gdn else dat
    rows, cols = work.new(1, H, T), work.new(1 if plan.gdn else plan.tiles, H, T)
    mine = grads.dlam[work.token_lo : work.token_lo + work.tokens]
    pairs_backward_kernel[(work.tiles, H)](
        x.q, x.k, x.v, do, tables.cg, work.at, x.lam, tables.life, work.layout.blocks, dlam, oldest, own, weighted, dat,
        dat_tile, mine, rows, cols, *work._sizes(), K, window.block_lo, window.row_lo, work.token_lo, work.tokens,
        PARTS=len(dlam), BP=min(32, plan.tile), KP=plan.slots_padded, **plan.launch("pairs_backward", do.device),
        **plan.tiled(), **plan.math(), **ALL_REGISTERS,
    )  # fmt: skip
    return dat, dat_tile, weighted, rows, cols


def _token_gradients(
    work: WindowPass, do: Tensor, weighted: Tensor, dstates: Tensor, has_incoming: bool, grads: Gradients
) -> tuple[Tensor, Tensor]:
    """dV; returns dKh, or of Mamba-2 what writing slots adds to dk and to the decay gradient, both in parts."""
    plan, x, tables, window = work.plan, work.x, work.tables, work.window
    T, H, K = work.layout.tokens, plan.H, plan.K
    blocks, flags = work.layout.blocks, dict(HAS_INCOMING=has_incoming, **plan.tiled())
    sizes = (*work._sizes(), K, window.block_lo, window.row_lo, work.token_lo)
    dims = plan.launch("key_gradient", do.device)
    parts = ceil_div(plan.DK, dims["BK"])
    heads = heads_per_program(plan, work.tiles * parts)
    dk, ends = work.new(work.tokens, H // heads, plan.DK), work.new(parts, H, T)
    key_gradient_kernel[(work.tiles, H // heads, parts)](
        x.k, x.v, tables.cg, tables.life, blocks, dstates, dk, ends, *sizes, heads, **flags, **dims, **plan.math()
    )
    dims = plan.launch("value_gradient", do.device)
    value_gradient_kernel[(work.tiles, H, ceil_div(plan.DV, dims["BV"]))](
        work.kh, do, tables.cg, tables.life, blocks, weighted, dstates, grads.dv, *sizes, **flags, **dims,
        **plan.math(), **ALL_REGISTERS,
    )  # fmt: skip
    return dk, ends


@dataclass
class WrittenGradients:
    """Of what Gated DeltaNet's blocks wrote and of their transitions.

    Attributes:
        dkh: fp32, dke: gradient of k from ek, [tokens of the window, H, DK].
        sums: <dek, ek> of each tile, fp32 [parts, blocks, TILES, H]. trace: tr dPhi, fp32 [parts, blocks, H].
    """

    dkh: Tensor
    dke: Tensor
    sums: Tensor
    trace: Tensor


def _written_gradients(
    work: WindowPass, snap: Tensor, do: Tensor, weighted: Tensor, dstates: Tensor, has_incoming: bool, grads: Gradients
) -> WrittenGradients:
    """dV and the gradients of a block's Kh and ek (Gated DeltaNet)."""
    plan, x, tables, window = work.plan, work.x, work.tables, work.window
    dphi, trace = _transition_gradient(work, snap, dstates, has_incoming)
    dke = work.new(work.tokens, plan.H, plan.DK, dtype=plan.gradient_dtype)
    if not plan.wide and max(plan.DK, plan.DV) <= 128:
        dkh, sums = work.new(*dke.shape), work.new(1, work.blocks, plan.tiles, plan.H)
        token_gradient_kernel[(work.tiles, plan.H)](
            x.k, work.kh, x.v, do, tables.cg, tables.life, work.layout.blocks, weighted, dstates, dphi, dkh, dke,
            grads.dv, sums, *work._sizes(), plan.K, window.block_lo, window.row_lo, work.token_lo,
            HAS_INCOMING=has_incoming, **plan.tiled(), **plan.launch("token_gradient", do.device), DOT=plan.dot,
            PREC=PRECISION,
        )  # fmt: skip
        return WrittenGradients(dkh, dke, sums, trace)
    dkh, _ = _token_gradients(work, do, weighted, dstates, has_incoming, grads)
    meta = local_launch(plan, do.device, "transition_backward")
    sums = work.new(ceil_div(plan.DK, meta["BK"]), work.blocks, plan.tiles, plan.H)
    transition_backward_kernel[(*work.tile_grid, len(sums))](
        x.k, tables.cg, work.kh, dphi, dkh, dke, sums, work.layout.tiles, work.tile_lo, window.block_lo, work.token_lo,
        *work._sizes(), work.blocks, **meta,
    )  # fmt: skip
    return WrittenGradients(dkh, dke, sums, trace)


def _group_gradient(work: WindowPass, dat: Tensor, dq: Tensor, dk: Tensor, grads: Gradients) -> None:
    """dq and dk of Mamba-2 from those of the slots in parts, and the pairs' dAt of each head."""
    plan, x, window = work.plan, work.x, work.window
    dims = plan.launch("group_gradient", dq.device)
    parts = ceil_div(plan.DK, dims["BK"])
    del dims["DV"], dims["BV"]
    group_gradient_kernel[(work.tiles, plan.G, 2 * parts)](
        x.q, x.k, dat, work.layout.blocks, dq, dk, grads.dq, grads.dk, plan.H, plan.group,
        dq.shape[1] // plan.G, dk.shape[1] // plan.G, window.block_lo, work.token_lo, **dims, **plan.tiled(),
        DOT=plan.dot, PREC=PRECISION, **ALL_REGISTERS,
    )  # fmt: skip


def _transition_gradient(work: WindowPass, snap: Tensor, dstates: Tensor, has_incoming: bool) -> tuple[Tensor, Tensor]:
    """dPhi of Gated DeltaNet's blocks [blocks, H, DK, DK], and parts of its trace fp32 [parts, blocks, H]."""
    plan, tables, window = work.plan, work.tables, work.window
    dims = plan.launch("dphi", snap.device)
    parts = ceil_div(plan.DK, dims["BK"])
    dphi = work.new(work.blocks, plan.H, plan.DK, plan.DK, dtype=plan.gradient_dtype)
    trace = work.new(parts, work.blocks, plan.H)
    dphi_kernel[(work.blocks, plan.H, parts**2)](
        snap, dstates, tables.pos, tables.death, tables.live, work.layout.blocks, dphi, trace, plan.H, plan.K,
        window.block_lo, window.row_lo, work.blocks, HAS_INCOMING=has_incoming, **dims, KP=plan.slots_padded,
        PREC=PRECISION,
    )  # fmt: skip
    return dphi, trace


def _local_backward(
    work: WindowPass, written: WrittenGradients, dat: Tensor, dat_tile: Tensor, dqt: Tensor, grads: Gradients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From dAt, dQt, dKh and dek of Gated DeltaNet's blocks to dq, dk, dbeta; returns what the decay gradient is made
    of."""
    plan, x, tables, device = work.plan, work.x, work.tables, dqt.device
    H, dkh, dke = plan.H, written.dkh, written.dke
    dkeep = _compose_backward(work, written, dat, dqt)
    where, dqk = (*work._where(), *work._sizes()), torch.empty_like(dat_tile)
    db, rows = torch.empty_like(dqk), work.new(2, H, work.layout.tokens)
    inputs = (x.q, x.k, x.beta, tables.cg_tile, work.inv)
    local_pairs_kernel[work.tile_grid](
        *inputs, dat_tile, dqt, dkh, dqk, db, rows[0], *where, **local_launch(plan, device, "local_pairs")
    )
    local_inverse_backward_kernel[work.tile_grid](
        *inputs[1:], db, rows[1], grads.dbeta, *where, **local_launch(plan, device, "local_inverse_backward")
    )
    meta = local_launch(plan, device, "local_gradient")
    parts = ceil_div(plan.DK, meta["BK"])
    cols, ends = (work.new(parts, H, work.layout.tokens) for _ in range(2))
    local_gradient_kernel[(*work.tile_grid, parts)](
        *inputs, work.at, dqk, db, dqt, dkh, dke, grads.dq_parts, grads.dk_parts, cols, ends, *where, **meta
    )
    return rows, cols, ends, dkeep


def _compose_backward(work: WindowPass, written: WrittenGradients, dat: Tensor, dqt: Tensor) -> Tensor:
    """From a block's dQt, dKh and dek to those of its tiles, in place; returns each tile's last cg's [tiles, H, 1]."""
    plan, x, tables = work.plan, work.x, work.tables
    device, tiles, lo = x.k.device, plan.tiles, work.window.block_lo
    sums, pairs = work.new(2, work.blocks, tiles, plan.H), work.new(*dqt.shape[:2], plan.tile, dtype=plan.state_dtype)
    for keys in (True, False):
        own, dx = (work.kh_tile, written.dkh) if keys else (work.qt_tile, dqt)
        compose_backward_kernel[(work.blocks, plan.H)](
            x.k, tables.cg_tile, work.kh_tile, work.at, dat, pairs, own, work.passing, dx, written.dkh, written.dke,
            sums[int(keys)], work.layout.blocks, lo, work.token_lo, *work._sizes(), KEYS=keys,
            **local_launch(plan, device, "compose_backward_keys" if keys else "compose_backward"), **ALL_REGISTERS,
        )  # fmt: skip
    dkeep = work.new(*work.tile_grid, 1)
    tile_decay_kernel[work.tile_grid](
        tables.cg, written.trace, written.sums, sums, dkeep, work.layout.tiles, work.tile_lo, work.layout.blocks, lo,
        work.layout.tokens, plan.H, work.blocks, PARTS=len(written.sums), TRACES=len(written.trace), TILES=tiles,
        BT=plan.tile, num_warps=1,
    )  # fmt: skip
    return dkeep
