"""`dla bench serve`: its trace, its accounts, and the command on a short trace."""

import json

import pytest
import torch

from megatron_dla.cli import main
from megatron_dla.kernels.bench.serve import check_targets
from megatron_dla.kernels.bench.serve_contexts import NoStore, schedule, state_sizes
from megatron_dla.kernels.bench.serve_systems import SYSTEMS, Memory, engine_config, generate_trace, make_models
from megatron_dla.kernels.bench.serve_trace import ANSWER_MEAN, PROMPT_MEAN, Outcome, Times, make_trace, replay
from megatron_dla.serving.engine import Engine, EngineConfig, Request
from megatron_dla.serving.engine.models import ExportedModel
from megatron_dla.serving.engine.scheduler import Scheduler, Sequence
from megatron_dla.serving.engine.stats import memory_use

MEMORY = Memory(total=64_000_000, state=1_000_000, token=1_000)


@pytest.fixture(scope="module")
def models():
    return make_models(
        "gdn", {"hidden_size": 32, "num_layers": 2, "ffn_hidden_size": 64, "key_dim": 8, "value_dim": 8}, 0
    )


def test_a_trace_has_the_published_means_and_repeats() -> None:
    trace = make_trace(20_000, 4.0, 1 << 20, 100, seed=3)
    assert sum(len(x.prompt) for x in trace) / len(trace) == pytest.approx(PROMPT_MEAN, rel=0.05)
    assert sum(x.answer for x in trace) / len(trace) == pytest.approx(ANSWER_MEAN, rel=0.05)
    assert trace[-1].at / len(trace) == pytest.approx(1 / 4, rel=0.05)
    short = make_trace(200, 4.0, 64, 100, seed=3)
    assert short == make_trace(200, 4.0, 64, 100, seed=3) != make_trace(200, 4.0, 64, 100, seed=4)
    assert max(len(x.prompt) for x in short) == max(x.answer for x in short) == 32


def test_facts_of_times() -> None:
    times = [Times(0.0, [1.0, 1.5, 2.0]), Times(1.0, [4.0]), Times(2.0, [4.0, 4.25])]
    facts = Outcome(5.0, times, waste=0.1, running=2.0).facts()
    assert facts["tokens_per_s"] == 6 / 5 and facts["first_token_s_p50"] == 2.0
    assert facts["first_token_s_p99"] == pytest.approx(2.98)
    assert facts["token_ms_p50"] == pytest.approx(375.0)


def test_what_fits() -> None:
    assert MEMORY.sequences("dla", 100, 1_000_000) == 64
    assert MEMORY.sequences("reserved", 100, 2_000) == MEMORY.sequences("static", 100, 2_000) == 32
    assert MEMORY.sequences("paged", 100, 2_000) == 64_000 // 112  # whole pages
    assert MEMORY.each("paged", 17, 2_000) == 32_000 and MEMORY.each("reserved", 17, 2_000) == 2_000_000
    assert MEMORY.each("dla", 1, 8) == MEMORY.each("dla", 1 << 20, 1 << 20)


@pytest.mark.parametrize("context", [512, 8192])
def test_waste_without_a_model(context) -> None:
    found = {name: schedule(name, MEMORY, context, seed=1) for name in SYSTEMS}
    assert found["dla"].waste == 0.0
    assert 0.0 < found["paged"].waste < 16 / (context / 8)
    assert found["static"].waste > found["reserved"].waste > 0.3
    assert found["static"].active < found["static"].held and found["reserved"].active == found["reserved"].held


def test_what_has_ended_in_a_static_batch_is_waste() -> None:
    config = EngineConfig(slots=2, kv_pages=8, prefill_chunk=16, whole_batches=True, prefix_states=0)
    scheduler = Scheduler(config, NoStore(), [None])
    two = [Sequence(Request((1,) * 15), n) for n in range(2)]
    for one in two:
        scheduler.add(one)
    for _ in range(2):
        scheduler.begin_step()
        while (work := scheduler.next_read()) is not None:
            scheduler.was_read(*work)
    assert memory_use(scheduler, 100, [10]) == (520, 500)
    scheduler.end(two[0])
    assert memory_use(scheduler, 100, [10]) == (520, 250)
    scheduler.end(two[1])
    assert memory_use(scheduler, 100, [10]) == (0, 0)


def test_the_size_of_a_state_is_measured(models, monkeypatch) -> None:
    state = Memory.of(1_000_000, models).state
    assert state_sizes(models["dla"], [300, 7, 1500], 0) == {7: state, 300: state, 1500: state}
    run = ExportedModel.run

    def grows(self, ids, lengths, state, attend, **options):
        logits, after = run(self, ids, lengths, state, attend, **options)
        return logits, [*after, {"keys": torch.zeros(int(lengths) + ids.shape[1])}]

    monkeypatch.setattr(ExportedModel, "run", grows)
    assert state_sizes(models["dla"], [7, 300], 0) == {7: state + 4 * 7, 300: state + 4 * 300}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_generates_what_was_asked(models, name) -> None:
    memory = Memory.of(1_000_000, models)
    trace = make_trace(9, 1e4, 200, 100, seed=5)
    engine = Engine(models["dla" if name == "dla" else "softmax"], None, engine_config(name, memory, 200))
    outcome, seen = replay(engine, trace, (counts := []).append), engine.stats()
    assert [len(x.tokens) for x in outcome.times] == [x.answer for x in trace] and sum(counts) == seen.generated
    assert seen.reserved_bytes == 0 and 0.0 <= outcome.waste < 1.0
    assert 0 < outcome.running <= memory.sequences(name, 1, 200)


def test_generate_ends_each_row_at_its_own_length(models) -> None:
    trace, counts = make_trace(7, 1e4, 200, 100, seed=6), []
    outcome = generate_trace(models["softmax"], trace, 3, counts.append)
    assert [len(x.tokens) for x in outcome.times] == [x.answer for x in trace]
    assert sum(counts) == sum(x.answer for x in trace) and 0.0 < outcome.waste < 1.0 and outcome.running <= 3
    firsts = [x.tokens[0] for x in outcome.times]
    assert firsts[0] < outcome.seconds + outcome.times[0].asked and len(set(firsts)) == 3  # batches of 3, 3 and 1


def test_targets_can_be_missed() -> None:
    rates = {"generate": 9.0, "static": 10.0, "reserved": 12.0, "paged": 11.0, "dla": 19.0}
    trace = {name: {"tokens_per_s": rate, "waste": 0.02, "running": 3.0} for name, rate in rates.items()}
    contexts = [{"system": "dla", "waste": 0.0, "bytes_each": n} for n in (5, 6)]
    missed = check_targets(trace, contexts)
    assert [x["met"] for x in missed] == [False] * 4 and "--memory-mb" in missed[-1]["what"]
    trace["paged"]["running"] = 9.0
    assert "paged ran 9.0 at once, reserved 3.0" in check_targets(trace, contexts)[-1]["what"]
    trace = {name: x | {"waste": 0.0} for name, x in trace.items()}
    trace["dla"]["tokens_per_s"], trace["paged"]["tokens_per_s"] = 20.0, 13.0
    assert [x["met"] for x in check_targets(trace, contexts[:1])] == [True] * 4


def test_the_command_writes_tables_json_and_picture(tmp_path, capsys) -> None:
    command = ["bench", "serve", "--device", "cpu", "--requests", "4", "--rate", "100", "--longest", "32"]
    threads = torch.get_num_threads()
    code = main([*command, "--memory-mb", "8", "--contexts", "32", "64", "--out", str(tmp_path)])
    made, out = json.loads((tmp_path / "serve_cpu.json").read_text()), capsys.readouterr().out
    assert code == int(any(not x["met"] for x in made["targets"] if x["must"])) and torch.get_num_threads() == threads
    assert set(made["trace"]) == {"generate", *SYSTEMS} and (tmp_path / "serve_cpu.png").stat().st_size > 10_000
    assert {(r["system"], r["context"]) for r in made["contexts"]} == {(n, c) for n in SYSTEMS for c in (32, 64)}
    assert len({facts["tokens"] for facts in made["trace"].values()}) == 1
    softmax, dla = made["parameters"]["softmax"], made["parameters"]["dla"]
    assert softmax == pytest.approx(dla, rel=0.01)
    assert all(name in out for name in made["trace"]) and made["command"].startswith("dla")


@pytest.mark.parametrize("option, value", [
    ("--requests", "0"), ("--rate", "nan"), ("--rate", "-1"), ("--longest", "3"), ("--contexts", "1"),
    ("--threads", "0"), ("--memory-mb", "0.1"), ("--out", "{file}"),
    ("--seed", str(2**70)), ("--seed", "-1"), ("--threads", str(2**40)), ("--rate", "1e-300"),
    ("--requests", str(2**40)), ("--longest", str(2**40)), ("--contexts", str(2**40)),
    ("--contexts", str(2**24)),
    ("--memory-mb", "1e+300"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, capsys, option, value) -> None:
    (tmp_path / "file").write_text("")
    value = value.replace("{file}", str(tmp_path / "file"))
    assert main(["bench", "serve", "--device", "cpu", "--out", str(tmp_path), option, value]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and (value in error or "MB" in error)
