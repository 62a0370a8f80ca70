"""Which slot is in which columns of the scans: nothing moves but slots that merge, and every token finds its slot."""

from dataclasses import replace

import pytest
import torch

from megatron_dla.kernels.dla import partition
from tests.support.dla_cases import Case

pytest.importorskip("triton")
from megatron_dla.kernels.dla import triton_attention, triton_chunk, triton_launch, triton_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = Case("topics", T=130, B=1, H=1, capacity=4, topic=5)
CASES = [
    BASE,
    replace(BASE, name="every token a boundary", tau=0.0, T=50),
    replace(BASE, name="no boundary", tau=2.5, T=50),
    replace(BASE, name="documents", documents=(1, 20, 37, 52)),
    replace(BASE, name="three slots", capacity=3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_columns(case: Case) -> None:
    x = {name: y.detach().to(DEVICE) for name, y in case.make().items()}
    part = partition(**{name: x[name] for name in ("k", "v", "g")}, **case.rule, backend="torch")
    plan = triton_launch.LaunchPlan(torch.float32, 8, 8, 1, 1, case.capacity, False, tile=16, tiles=1)
    layout = triton_layout.make_layout(1, case.T, case.cu_seqlens, plan.block, 3, DEVICE)
    life = triton_attention.to_line(part.death, part.start)
    tables = triton_chunk.make_tables(plan, layout, x["g"][0].float(), life, None)
    starts = [(p, int(life[0, p])) for p in range(case.T) if life[0, p] > 0]
    merged = 0
    for window in layout.windows:
        for first_block, n, segment, _ in window.segments.tolist():
            begin = layout.segments[segment, 0]
            previous = None
            for i_t in range(first_block, first_block + n):
                first, end = layout.blocks[i_t, :2].tolist()
                before, after, sums, *merge = tables.columns[i_t, 0].tolist()
                live, fresh, kept, merges = tables.moves[i_t, 0].tolist()
                old = [(p, d) for p, d in reversed(starts) if begin <= p < first <= d]
                new = [(p, d) for p, d in reversed(starts) if begin <= p < end <= d]
                assert sorted(before) == sorted(after) == list(range(plan.slots_padded))
                assert previous in (None, before)
                assert (live, kept) == (len(old), len(new)) and fresh == sum(p >= first for p, _ in new)
                for column in (c for c in range(plan.slots_padded) if before[c] < live):
                    slot = old[before[column]]
                    if slot in new:
                        assert new[after[column]] == slot and sums[column] == column  # still there
                    holder = next(s for s in new if s[0] <= slot[0])  # of its sums
                    assert new[after[sums[column]]] == holder
                died = {slot: 0 for slot in old if slot not in new}
                assert merges == len(died)
                for column, into in zip(merge[0][:merges], merge[1][:merges], strict=True):
                    slot = old[before[column]]
                    older = [s for s in new if s[0] < slot[0]]
                    assert slot in died and new[into] == older[0]
                merged += merges
                previous = after
    assert (merged > 0) == (case.tau < 2)


def test_what_fits_in_one_program() -> None:
    def staged(dtype: torch.dtype, key_dim: int, delta: bool) -> bool:
        return triton_launch.LaunchPlan(dtype, key_dim, 64, 4, 4, 30, delta).staged

    assert not any(staged(dtype, dim, False) for dtype in (torch.bfloat16, torch.float32) for dim in (64, 256))
    assert [staged(torch.float16, dim, True) for dim in (32, 33)] == [False, True]
    assert not staged(torch.bfloat16, 256, True)


@pytest.mark.parametrize("capacity", [2, 30, 64])
@pytest.mark.parametrize("key_dim", [64, 256])
def test_every_slot_has_a_column_and_products_are_wide_enough(key_dim: int, capacity: int) -> None:
    plan = triton_launch.LaunchPlan(torch.bfloat16, key_dim, 64, 4, 4, capacity, True)
    assert plan.scan(torch.device(DEVICE))["BV"] * plan.slots_padded >= 16
