"""The ledger's counts against counts by hand, and the shipped configs against the committed files."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_dla.cli import build_parser
from megatron_dla.errors import UserError
from megatron_dla.gpus import GPUS
from megatron_dla.kernels.bench.inputs import TAU, Problem, make_inputs
from megatron_dla.kernels.bench.ledger import components
from megatron_dla.kernels.bench.ledger.constants import (
    LAUNCH,
    MERGED_FROM_BEFORE,
    Assumptions,
    Latencies,
    fingerprint,
)
from megatron_dla.kernels.bench.ledger.peers import PUBLISHED, Published
from megatron_dla.kernels.bench.ledger.predict import assumptions_of, memory_bytes, predict_launch, resident
from megatron_dla.kernels.bench.ledger.record import Launch, Recording, record
from megatron_dla.kernels.bench.ledger.run import bench_ledger, ledger_config
from megatron_dla.kernels.bench.ledger.summary import rows
from megatron_dla.kernels.bench.ledger.ttir import Function, mark_pipelined, parse
from megatron_dla.kernels.bench.ledger.walk import Cost, Pointer, Walk
from megatron_dla.kernels.dla import partition
from megatron_dla.kernels.dla.triton_layout import make_layout
from megatron_dla.mixers import functional

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ("dla_mamba2_780m", "dla_gdn_1b3")
GROWTH = 1.05  # of launches, bytes and syncs over the committed ledger


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def booked(recording: Recording) -> list[tuple[str, bool, int]]:
    return [(e.name, e.backward, e.bytes) for e in recording.events if e.kind == "op"]


def test_a_matrix_product_is_counted_with_its_backward() -> None:
    x, w = meta(48, 32), meta(16, 32)
    with record() as recording:
        y = F.linear(x, w)
        y.backward(torch.empty_like(y))
    products = [e for e in recording.events if e.name == "mm"]
    flops = 2 * 48 * 32 * 16
    moved = 2 * (48 * 32 + 32 * 16 + 48 * 16)
    assert [e.flops for e in products] == [flops] * 3 and [e.bytes for e in products] == [moved] * 3
    assert [e.backward for e in products] == [False, True, True]
    assert booked(recording)[0][0] == "mm"  # the transpose of w is free


def test_what_is_expanded_is_read_once_and_a_view_is_free() -> None:
    x, scale = meta(10, 20, grad=False), meta(20, grad=False)
    with record() as recording:
        x.transpose(0, 1).unsqueeze(0) * scale[:, None].expand(20, 10)
    assert booked(recording) == [("mul", False, 2 * (200 + 20 + 200))]


def test_slot_weights_move_what_a_count_by_hand_says() -> None:
    T, H, K = 64, 3, 5
    raw, scale, bias = meta(1, T, H, K), meta(H, K, dtype=torch.float32), meta(H, K, dtype=torch.float32)
    with record() as recording:
        functional.slot_weights(raw, scale, bias)
    n, small = T * H * K, 4 * H * K
    wide = 4 * n
    assert booked(recording) == [
        ("_to_copy", False, 2 * n + wide),
        ("mul", False, small + 2 * wide),
        ("add", False, 2 * wide + small),
        ("softplus", False, 2 * wide),
    ]
    assert {e.component for e in recording.events} == {components.GATES}


def test_the_backward_pass_belongs_to_the_component_of_the_forward() -> None:
    x, w = meta(1, 64, 24), meta(24, 4)
    norm = meta(24)
    with record() as recording:
        y = functional.short_convolution(x, w)
        y = F.silu(functional.gated_head_norm(y[..., None, :], y[..., None, :], norm, 1e-5, gate_first=True))
        torch.autograd.backward([y], [torch.empty_like(y)])
    found = rows(recording.events)
    assert set(found) == {components.CONVOLUTION, components.GATED_NORM, components.OTHER}
    for part in (components.CONVOLUTION, components.GATED_NORM):
        assert {e.backward for e in recording.events if e.component == part} == {False, True}


def test_cuda_has_one_kernel_for_a_norm_and_for_attention() -> None:
    x, w = meta(4, 16), meta(16)
    q, k = meta(1, 2, 64, 8), meta(1, 2, 64, 8)
    mask = meta(1, 1, 64, 64, dtype=torch.bool, grad=False)
    with record() as recording:
        y = F.rms_norm(x, (16,), w, 1e-5)
        o = F.scaled_dot_product_attention(q, k, k, is_causal=True)
        p = F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
        torch.autograd.backward([y, o, p], [torch.empty_like(z) for z in (y, o, p)])
    found = {e.name: e for e in recording.events}
    assert found["rms_norm"].bytes == 2 * (64 + 64 + 16)
    assert found["rms_norm_backward"].bytes == 2 * (64 + 64 + 16 + 64 + 16)
    full = 4 * 2 * 64 * 64 * 8
    assert found["flash_attention"].flops == full // 2 and found["masked_attention"].flops == full
    assert found["flash_attention_backward"].flops == 5 * full // 4
    assert found["masked_attention"].bytes == 2 * 4 * 1024 + 64 * 64


def test_reads_on_the_host_are_counted_and_answered() -> None:
    with record() as recording:
        ends = torch.tensor([0, 3, 7], dtype=torch.int32).to("meta")
        assert ends.tolist() == [0, 3, 7]
        table = torch.tensor([[1, 2], [3, 4]], device="meta")
        assert table.tolist() == [[1, 2], [3, 4]]
        assert meta(1, grad=False).item() == 1
        with pytest.raises(RuntimeError, match="numbers on the host"):
            meta(3, grad=False).tolist()
    assert [e.kind for e in recording.events] == ["copy", "sync", "copy", "sync", "sync", "sync"]


def test_a_config_that_is_not_one_gpus_pretraining_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pretraining"):
        ledger_config(ROOT / "configs" / "delta_mem_recall.yaml")
    split = tmp_path / "split.yaml"
    text = (ROOT / "configs" / "dla_mamba2_780m.yaml").read_text()
    split.write_text(text + "parallel:\n  tensor_model_parallel_size: 2\n")
    with pytest.raises(UserError, match="parallel"):
        ledger_config(split)
    with pytest.raises(UserError, match="--tokens"):
        ledger_config(ROOT / "configs" / "dla_mamba2_780m.yaml", 1)
    assert ledger_config(ROOT / "configs" / "dla_mamba2_780m.yaml", 512).data.seq_len == 512


def test_a_gpu_of_another_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["bench", "ledger", str(ROOT / "configs" / "dla_mamba2_780m.yaml"), "--arch", "80", "--gpu", "h200"]
    args = build_parser().parse_args(command)
    with pytest.raises(UserError, match="TRITON_INTERPRET"):
        bench_ledger(args)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="--gpu h200"):
        bench_ledger(args)


TOY = (ROOT / "tests" / "fixtures" / "ledger" / "toy.mlir").read_text()  # of `toy_kernel`, in Triton:
#   if program_id < 3:
#       for i in range(n): acc = dot(x[32, 64] bf16, y[64, 32] bf16, acc)
#       while table[program_id] > 0: acc += exp(acc); it falls by 2
#       store acc [32, 32] fp32


def copied_ahead(text: str) -> str:
    """What a compiler makes of a module, in the one respect that `mark_pipelined` looks at."""
    return text.replace("%xs_17 = tt.load", "%xs_17 = ttg.async_copy_global_to_local")


def pipelined(text: str) -> Function:
    function = parse(text)
    mark_pipelined(function, copied_ahead(text))
    return function


def walk(program: int, n: int = 6, table: tuple[int, ...] = (4, 5, 6), latency: Latencies | None = None) -> Cost:
    values = {"n": n, **{name: Pointer(name, 0) for name in ("x", "y", "table", "o")}}
    tables = {"table": table} if table else {}
    gpu, assumed = GPUS["h100"], Assumptions(rounds=2.5)
    return Walk(
        pipelined(TOY), values, tables, (program, 0, 0), (4, 1, 1), 4, assumed, gpu.flops_a_clock,
        latency or Latencies(),
    ).cost  # fmt: skip


@pytest.mark.parametrize(("program", "n", "rounds"), ((0, 6, 2), (1, 6, 3), (2, 3, 3), (0, 200, 2)))
def test_a_walk_counts_what_a_count_by_hand_says(program: int, n: int, rounds: int) -> None:
    cost = walk(program, n)
    assert cost.flops == {"bf16": n * 2 * 32 * 64 * 32}
    assert cost.loads == {"x": n * 32 * 64 * 2, "y": n * 32 * 64 * 2, "table": 4}
    assert cost.stores == {"o": 32 * 32 * 4}
    assert cost.special == rounds * 32 * 32 and cost.steps == n + rounds and cost.assumed == 0
    assert cost.tensor == pytest.approx(n * 2 * 32 * 64 * 32 / (GPUS["h100"].flops_a_clock * Latencies().rate("bf16")))


def test_a_walk_takes_the_branch_it_knows_and_assumes_what_it_does_not() -> None:
    nothing = walk(3)
    assert not nothing.flops and not nothing.stores and nothing.clock < 100
    assumed = walk(0, table=())
    assert assumed.assumed == 1 and assumed.special == 2.5 * 32 * 32


def test_a_document_begins_without_slots() -> None:
    with record():
        cuts = torch.tensor([0, 100, 300, 512], dtype=torch.int32)
        layout = make_layout(
            2, 256, cuts, 64, 64, "meta"
        )  # documents of 100, 156 (to the row's end), 44 and 212 tokens
    heads, slots = 3, 7
    launch = Launch(SimpleNamespace(__name__="some_kernel"), (1, 1, 1), {"blocks": layout.blocks, "BT": 64})
    found = assumptions_of(launch)
    blocks = [0, *(b + 1 for b in range(9) if layout.blocks.known_values[b, 3])]
    rows = [0, 3, 7, 9]  # a row before each block and one after the last: documents have 2, 3, 1 and 4 blocks
    assert (found.first_blocks, found.first_rows) == (set(blocks), set(rows)) and blocks == [0, 2, 5, 6]
    sizes = {"%H": heads, "%K": slots}
    for row in range(14):
        live = found.loaded("live_count", row * heads + 1, sizes)
        assert live == (0 if row in rows else slots), row
    for block in range(10):
        before, opened, kept, merged = (found.loaded("moves", 4 * (block * heads + 2) + i, sizes) for i in range(4))
        assert (before, kept, merged) == ((0, opened, 0) if block in blocks else (slots, slots, found.merged)), block


def test_the_clock_of_a_walk_grows_with_the_chain() -> None:
    short, long = walk(0, 10), walk(0, 110)
    slower = walk(0, 110, latency=Latencies(dot=1000.0))
    assert long.clock - short.clock == pytest.approx(10 * (walk(0, 20).clock - short.clock), rel=1e-6)
    assert slower.clock > 110 * 1000 > long.clock  # each product waits for the one before


EXCHANGE = """module {
  tt.func public @exchange_kernel(%x: !tt.ptr<i32>) {
    %a = tt.make_range {end = 32 : i32, start = 0 : i32} : tensor<32xi32>
    %b = tt.gather %a[%a] {axis = 0 : i32} : (tensor<32xi32>, tensor<32xi32>) -> tensor<32xi32>
    %c = "tt.reduce"(%b) <{axis = 0 : i32}> ({
    ^bb0(%y: i32, %z: i32):
      %d = arith.minsi %y, %z : i32
      tt.reduce.return %d : i32
    }) : (tensor<32xi32>) -> i32
    tt.store %x, %c : !tt.ptr<i32>
    tt.return
  }
}"""
SQUARE = "tensor<32x32xf32> * tensor<32x32xf32> -> tensor<32x32xf32>"
BRANCH = f"""module {{
  tt.func public @branch_kernel(%x: !tt.ptr<i32>, %n: i32) {{
    %zero = arith.constant 0 : i32
    %cst = arith.constant dense<0.000000e+00> : tensor<32x32xf32>
    %at = tt.load %x : !tt.ptr<i32>
    %0 = arith.cmpi sgt, %at, %zero : i32
    scf.if %0 {{
      %acc = tt.dot %cst, %cst, %cst, inputPrecision = tf32 : {SQUARE}
      %more = tt.dot %cst, %cst, %acc, inputPrecision = tf32 : {SQUARE}
    }} else {{
      %l:1 = scf.while (%i = %at) : (i32) -> (i32) {{
        %1 = arith.cmpi sgt, %i, %zero : i32
        scf.condition(%1) %i : i32
      }} do {{
      ^bb0(%i: i32):
        %acc = tt.dot %cst, %cst, %cst, inputPrecision = tf32 : {SQUARE}
        %next = tt.load %x : !tt.ptr<i32>
        scf.yield %next : i32
      }}
    }}
    tt.return
  }}
}}"""


def walk_of(text: str | Function, assumed: Assumptions, warps: int = 4, **values: int) -> Cost:
    names = {"x": Pointer("x", 0), "y": Pointer("y", 0), "o": Pointer("o", 0)} | values
    function, peak = parse(text) if isinstance(text, str) else text, GPUS["h100"].flops_a_clock
    return Walk(function, names, {}, (0, 0, 0), (4, 1, 1), warps, assumed, peak, Latencies()).cost


def test_one_warp_exchanges_without_shared_memory() -> None:
    nothing = Assumptions(rounds=1.0)
    alone, four = (walk_of(EXCHANGE, nothing, warps) for warps in (1, 4))
    mine = Latencies()
    assert four.clock - alone.clock == pytest.approx(2 * mine.reduce - mine.shuffle - mine.redux, abs=10)
    assert four.issued == alone.issued + 2 * 32 * 4  # a gather of four warps is written and read
    wider = EXCHANGE.replace("32xi32", "64xi32").replace("end = 32", "end = 64")
    assert walk_of(wider, nothing, 1).clock - alone.clock >= mine.reduce - mine.redux  # no instruction for it


def test_branches_with_products_are_taken_as_often_as_assumed() -> None:
    one = 2 * 32 * 32 * 32
    cost = walk_of(BRANCH, Assumptions(rounds=9.0, held=0.25, past=1.5), n=1)
    assert cost.flops == {"tf32": 0.25 * 2 * one + 0.75 * 1.5 * one} and cost.assumed > 0
    dearer = walk_of(BRANCH, Assumptions(rounds=9.0), n=1)  # the loop takes longer
    assert dearer.flops == {"tf32": 9 * one} and dearer.clock > 2 * cost.clock


def test_an_assumed_comparison_does_not_hide_products() -> None:
    unknown = BRANCH.replace("arith.cmpi sgt, %at, %zero", "arith.cmpi eq, %at, %zero", 1)
    assert unknown != BRANCH
    assert walk_of(unknown, Assumptions(rounds=9.0), n=1).flops == walk_of(BRANCH, Assumptions(rounds=9.0), n=1).flops
    found = walk_of(unknown, Assumptions(rounds=9.0, held=0.25, past=1.5), n=1).flops
    assert found == walk_of(BRANCH, Assumptions(rounds=9.0, held=0.25, past=1.5), n=1).flops != {}
    only = unknown.split("    } else {")[0] + "    }\n    tt.return\n  }\n}"
    assert walk_of(only, Assumptions(rounds=9.0), n=1).flops == {"tf32": 2 * 2 * 32**3}


def test_a_loop_is_pipelined_where_the_compiler_copies_ahead() -> None:
    nothing = Assumptions(rounds=1.0)
    plain, ahead = (walk_of(x, nothing, n=40).clock for x in (TOY, pipelined(TOY)))
    assert plain - ahead > 30 * Latencies().l2
    assert copied_ahead(TOY) != TOY
    same = parse(TOY)
    mark_pipelined(same, TOY)
    assert walk_of(same, nothing, n=40).clock == plain
    inner = "      scf.for %j = %c0_i32 to %c1_i32 step %c1_i32  : i32 {\n      }\n        %xs = arith.muli %pid"
    outer = TOY.replace("        %xs = arith.muli %pid", inner, 1)  # only innermost loops are
    assert outer != TOY
    assert walk_of(pipelined(outer), nothing, n=40).clock == walk_of(outer, nothing, n=40).clock


def test_loops_are_matched_in_order_and_all_where_some_are_dissolved() -> None:
    begin, end = TOY.index("      %acc = scf.for"), TOY.index("      %at = tt.addptr")
    loop, rest = TOY[begin:end], (TOY[:begin], TOY[end:])

    def marks(compiled: str) -> list[bool]:
        function = parse(rest[0] + loop + loop + rest[1])
        mark_pipelined(function, compiled)
        return [op.pipelined for op in function.body[-2].regions[0] if op.name == "scf.for"]

    assert marks(rest[0] + copied_ahead(loop) + loop + rest[1]) == [True, False]
    assert marks(rest[0] + loop + copied_ahead(loop) + rest[1]) == [False, True]
    assert marks(rest[0] + copied_ahead(loop) + rest[1]) == [True, True]
    assert marks(rest[0] + loop + rest[1]) == [False, False]


def test_open_slots_of_the_bench_began_as_near_as_assumed() -> None:
    tokens, heads, chunk, near = 8192, 8, 32, 7
    _, k, v, g, _, beta = make_inputs(Problem("mamba2", tokens, 64, 30, heads), 0, dtype=torch.float32).arguments()
    start = partition(k, v, g, beta, tau=TAU, capacity=30, backend="torch").start[0]
    opened = torch.where(start, torch.arange(tokens)[:, None], 0).cummax(0).values
    first = torch.arange(chunk, tokens, chunk)
    back = first[:, None] // chunk - opened[first - 1] // chunk  # chunks before, with the slot's first token
    kernel = SimpleNamespace(__name__="detect_kernel")
    assumed = assumptions_of(Launch(kernel, (1, 1, 1), {"BT": chunk, "NEAR": near}))
    assert assumed.past is not None and assumed.held is not None
    met = back.clamp(max=near).double().mean().item()
    assert met <= 1.05 * assumed.past and assumed.past < 1.3 * met
    assert (back > near).double().mean() <= assumed.held


def toy_launch(n: int = 6, programs: int = 4) -> Launch:
    arguments = {
        "x": torch.empty(100_000, dtype=torch.bfloat16, device="meta"), "n": n,
        "y": torch.empty(n * 2048, dtype=torch.bfloat16, device="meta"),
        "table": torch.empty(4, dtype=torch.int32, device="meta"), "o": torch.empty(4096, device="meta"),
    }  # fmt: skip
    arguments["table"].known_values = torch.tensor([4, 5, 6, 0])
    asm, metadata = {"ttir": TOY, "ttgir": copied_ahead(TOY)}, SimpleNamespace(num_warps=4)
    compiled = SimpleNamespace(hash="toy", asm=asm, metadata=metadata)
    report = SimpleNamespace(warps=4, registers=64, shared=20 << 10)
    return Launch(SimpleNamespace(__name__="toy_kernel"), (programs, 1, 1), arguments, compiled, report)


def test_a_prediction_is_made_of_the_walk_and_the_constants() -> None:
    gpu, launch = GPUS["h100"], toy_launch()
    assert resident(launch, gpu) == 65536 // (128 * 64) == 8
    one = predict_launch(launch, gpu)
    assert one.flops == 3 * 6 * 2 * 32 * 64 * 32
    # x once a program, y once in all, as all programs read the same; the fourth program does nothing
    assert one.memory == 3 * 24576 + 24576 + 3 * 4 + 3 * 4096
    assert one.waves == pytest.approx(4 / 132 / 8)
    assert one.seconds > LAUNCH and one.limit == "latency"
    mean = sum(walk(p, 6, (4, 5, 6, 0)).clock for p in range(4)) / 4
    assert one.seconds == pytest.approx(LAUNCH + mean / gpu.clock)


def test_no_tensor_is_read_from_memory_twice_in_a_launch() -> None:
    launch, cost = toy_launch(), Cost()
    cost.loads["x"], cost.stores["x"] = 10.0, 1e9
    assert memory_bytes(launch, cost) == 4 * 10 + 200_000
    launch.arguments["again"] = launch.arguments["x"]
    cost.loads["again"], cost.stores["again"] = 20.0, 1e9
    assert memory_bytes(launch, cost) == 4 * 30 + 200_000


@pytest.mark.parametrize("block", sorted(MERGED_FROM_BEFORE))
def test_merges_of_a_block_are_those_of_the_inputs_of_the_bench(block: int) -> None:
    """Slots from before a block that die in it, over slots that it opens, once the cache is full."""
    tokens, heads = 8192, 8
    q, k, v, g, _, beta = make_inputs(Problem("mamba2", tokens, 64, 30, heads), 0, dtype=torch.float32).arguments()
    part = partition(k, v, g, beta, tau=TAU, capacity=30, backend="torch")
    start, death = part.start[0], part.death[0].long()
    place = torch.arange(tokens)[:, None].expand_as(start)
    late = tokens // 2
    merged = start & (death >= late) & (death < tokens) & (death // block > place // block)
    opened = start & (place >= late)
    assert MERGED_FROM_BEFORE[block] == pytest.approx((merged.sum() / opened.sum()).item(), rel=0.1)


def test_kernels_that_others_measured_are_predicted() -> None:
    """After a change of the constants or of the walk: `python -m megatron_dla.kernels.bench.ledger.peers`."""
    files = [json.loads(p.read_text()) for p in sorted((ROOT / "docs" / "results").glob("ledger_peers_sm*.json"))]
    assert files and all(found["constants"] == fingerprint() for found in files)
    predicted = [one for found in files for one in found["operators"]]
    fields = [field.name for field in dataclasses.fields(Published)]
    found = {Published(**{name: one[name] for name in fields}): one["predicted_ms"] for one in predicted}
    assert set(found) == set(PUBLISHED)
    for published, ms in found.items():
        assert published.source, published
        assert 1 / 1.5 <= ms / published.ms <= 1.5, published


@pytest.fixture(scope="module")
def counted() -> dict:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.ledger_counts", *SHIPPED], capture_output=True, text=True, cwd=ROOT,
        env=variables | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_launch_is_recorded_with_its_grid_and_bytes(counted: dict) -> None:
    moved = 1000 * (4 + 2)  # x is given twice and counted once
    assert counted["launch"] == {"name": "two_tensors_kernel", "bytes": moved, "programs": 16, "kind": "triton"}


@pytest.mark.parametrize("backbone", ("mamba2", "gdn"))
def test_launches_of_a_call_are_those_of_its_passes(counted: dict, backbone: str) -> None:
    found = counted[backbone]
    assert found["launches"] == sum(found["components"].values())
    assert set(found["components"]) >= {components.PARTITION, components.SCANS, components.OUTPUT, components.BACKWARD}
    assert 0 < found["backward"] < found["launches"]


def test_every_token_is_the_same_launches_and_nothing_is_read_back(counted: dict) -> None:
    """What a CUDA graph of a token asks for."""
    for _, *tokens in counted["decoded"]:  # the first one makes the thresholds
        assert tokens[0] == tokens[1] and {kind for kind, *_ in tokens[0]} <= {"op", "triton"}
        assert [name for _, name, *_ in tokens[0]] == ["decode_decide_kernel", "decode_states_kernel", "add_"]


@pytest.mark.parametrize("name", SHIPPED)
def test_states_that_are_kept_are_scanned_once(counted: dict, name: str) -> None:
    """What each block adds, and the scan over the blocks: two launches less a layer."""
    layers = ledger_config(ROOT / "configs" / f"{name}.yaml").model.num_layers
    kept, again = (counted[f"{name}, keep_states={x}"]["components"][components.SCANS] for x in ("true", "false"))
    assert again["launches"] - kept["launches"] == 2 * layers


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_does_not_cost_more_than_committed(counted: dict, name: str) -> None:
    """Where it costs less or the growth is wanted: `dla bench ledger configs/NAME.yaml --out docs/results`."""
    committed = json.loads((ROOT / "docs" / "results" / f"ledger_{name}.json").read_text())
    found = counted[name]
    for key in ("launches", "triton", "syncs", "copies", "bytes", "flops"):
        assert committed["total"][key] / 3 <= found["total"][key] <= GROWTH * committed["total"][key], key
    for component, row in found["components"].items():
        before = committed["components"].get(component, {"launches": 0, "syncs": 0, "bytes": 0})
        for key in ("launches", "syncs", "bytes"):
            assert row[key] <= GROWTH * before[key], (component, key)
    for key in ("host_syncs_a_micro_batch", "fusible_bytes_a_layer", "mixer_launches_a_layer"):
        assert found["quantities"][key] <= GROWTH * committed["quantities"][key], key
