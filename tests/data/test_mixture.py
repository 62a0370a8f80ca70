"""Mixtures: the realised mix, stages, limits, exact resume at any number of ranks, changed weights, older states."""

import itertools
import json
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dla.data import TokenLoader
from megatron_dla.data.mixture import Limit, MixedStream, described, least_tokens, planned_tokens
from megatron_dla.errors import DataError
from tests.support.rows import ROWS, STREAMS, T, build_words, global_steps, hashes, loader, ranks

OLD = Path(__file__).parents[1] / "fixtures" / "62bb8a7" / "data"
WEIGHTS = {"books": 0.5, "code": 0.2, "web": 0.3}
STAGES = [(0, WEIGHTS), (30 * ROWS * T, {"web": 1, "code": 3}), (70 * ROWS * T, WEIGHTS)]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    root = tmp_path_factory.mktemp("three")
    return {name: build_words(root, name, seed, 40 + 20 * seed) for seed, name in enumerate(WEIGHTS)}


class Endless:
    """A source whose rows have some padding; it ends after `rows` rows."""

    def __init__(self, seq_len, padding=0.0, rows=10**9):
        self.seq_len, self.padding, self.left, self.tokens = seq_len, padding, rows, 0
        self.rng = random.Random(0)

    @property
    def ended(self):
        return self.left <= 0

    def next_row(self):
        self.left -= 1
        if self.left < 0:
            return None
        self.tokens += self.seq_len - int(self.rng.random() * 2 * self.padding * self.seq_len)
        return "row"


@pytest.mark.parametrize("count", [1, 8, 64])
@pytest.mark.parametrize("weights", [{"a": 1, "b": 1}, {"a": 0.9, "b": 0.07, "c": 0.03}, {"a": 5, "b": 3, "c": 0}])
def test_realised_mix_after_ten_million_tokens(count, weights):
    seq_len = 2048
    streams = [
        MixedStream({name: Endless(seq_len, padding=0.1 if name == "a" else 0) for name in weights}, j, seq_len)
        for j in range(count)
    ]
    while sum(sum(stream.tokens.values()) for stream in streams) < 10**7:
        for stream in streams:
            stream.next_row(weights)
    tokens = {name: sum(stream.tokens[name] for stream in streams) for name in weights}
    for name, weight in weights.items():
        assert abs(tokens[name] / sum(tokens.values()) - weight / sum(weights.values())) < 0.005


def test_every_step_is_close_to_the_weights_and_no_stream_lacks_a_source():
    count, weights = 8, {"a": 1, "b": 1, "c": 2}
    streams = [MixedStream({name: Endless(16) for name in weights}, j, 16) for j in range(count)]
    for _ in range(20):
        before = [dict(stream.tokens) for stream in streams]
        for stream in streams:
            stream.next_row(weights)
        for name, share in (("a", 2), ("b", 2), ("c", 4)):
            drawn = sum(s.tokens[name] - old[name] for s, old in zip(streams, before, strict=True)) // 16
            assert abs(drawn - share) <= 1
    assert all(min(stream.tokens.values()) > 0 for stream in streams)


def test_the_others_share_the_part_of_a_source_that_has_ended():
    sources = {"a": Endless(16), "b": Endless(16), "c": Endless(16, rows=5)}
    stream = MixedStream(sources, 0, 16)
    for _ in range(205):
        stream.next_row({"a": 3, "b": 1, "c": 1})
    rows = {name: tokens // 16 for name, tokens in stream.tokens.items()}
    assert rows["c"] == 5 and abs(rows["a"] - 150) <= 1 and rows["a"] + rows["b"] == 200


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_resume_of_a_mixture_at_random_steps_sizes_and_prefetch(three, packing):
    """100 random steps, and every pair of sizes before and after, with and without prefetch."""
    total, rng, options = 110, random.Random(1), {"stages": STAGES, "packing": packing}
    runs = [ranks(three, size, prefetch_rows=rows, **options) for size, rows in ((1, 0), (2, 20), (4, 64))]
    want, states = [], []
    for _ in range(total + 3):
        states.append([json.dumps([one.state_dict() for one in run]) for run in runs])
        steps = [hashes(global_steps(run, 1)) for run in runs]
        assert steps[0] == steps[1] == steps[2]
        want += steps[0]
    cases = itertools.cycle(itertools.product(range(3), (1, 2, 4), (0, 7, 64)))
    for step, (saved, size, rows) in zip(rng.sample(range(total), 100), cases, strict=False):
        resumed = ranks(dict(reversed(three.items())), size, prefetch_rows=rows, **options)
        for one in resumed:
            one.load_state_dict(TokenLoader.merge_states(json.loads(states[step][saved])))
        assert hashes(global_steps(resumed, 3)) == want[step : step + 3]
    assert len(resumed[0].mixtures) == 1


def summed(loaders):
    return loaders[0].report(np.sum([one.counts() for one in loaders], axis=0).tolist())


def test_report_of_mix_and_epochs_at_any_number_of_ranks(three):
    running, last = ranks(three, 2, stages=STAGES), {}
    for until, weights in ((30, STAGES[0][1]), (70, STAGES[1][1]), (100, STAGES[2][1])):
        global_steps(running, until - running[0].steps)
        report = summed(running)
        for name in three:
            assert abs(report["mix"][name] - weights.get(name, 0) / sum(weights.values())) < 0.02
            assert report["source_epochs"][name] >= last.get(name, 0)
        last = report["source_epochs"]
    tokens = sum(epochs * running[0].source_tokens[name] for name, epochs in last.items())
    assert tokens == pytest.approx(100 * ROWS * T)
    resumed = ranks(three, 4, stages=STAGES)
    for one in resumed:
        one.load_state_dict(TokenLoader.merge_states([one.state_dict() for one in running]))
    assert summed(resumed)["source_epochs"] == last and summed(resumed)["mix"] == report["mix"]


def test_a_stage_begins_with_its_step(three):
    one = loader(three, stages=STAGES, prefetch_rows=64)
    global_steps([one], 30)
    assert summed([one])["mix"]["books"] == pytest.approx(0.5, abs=0.02)
    global_steps([one], 1)
    assert summed([one])["mix"]["books"] == 0


def test_a_source_ends_after_its_epochs_and_the_run_when_all_have(three):
    one = loader(three, stages=[(0, WEIGHTS)], limits=dict.fromkeys(three, Limit(2)), prefetch_rows=64)
    steps = 0
    with pytest.raises(DataError, match="max_epochs"):
        while True:
            one.next_step()
            steps += 1
    # the stream with the least data, but for what is left of each source and of the step
    held = []
    for j in range(STREAMS):
        orders = [(reader, reader.order(3, epoch)[j::STREAMS]) for reader in one.readers.values() for epoch in range(2)]
        held.append(sum(reader.shards[i].tokens for reader, order in orders for i in order))
    assert least_tokens(one.readers, dict.fromkeys(three, Limit(2)), STREAMS, seed=3) == min(held)
    rows = min(held) / T - steps * ROWS / STREAMS
    assert 0 <= rows < 3 + ROWS / STREAMS
    assert max(one.report(one.counts())["source_epochs"].values()) <= 2


def test_a_source_ends_after_its_tokens_at_any_number_of_ranks(three):
    most, options = 50 * STREAMS * T + 8, {"stages": [(0, WEIGHTS)], "prefetch_rows": 16}
    options["limits"] = limits = {"books": Limit(0, most), "code": Limit(1, most)}
    want = global_steps(ranks(three, 1, **options), 90)
    running = ranks(three, 2, **options)
    begun = global_steps(running, 30)
    resumed = ranks(three, 4, **options)
    for one in resumed:
        one.load_state_dict(TokenLoader.merge_states([rank.state_dict() for rank in running]))
    assert torch.cat([begun, global_steps(resumed, 60)]).equal(want) and len(resumed[0].mixtures) == 1
    before, after = (summed(x)["source_epochs"]["books"] * x[0].source_tokens["books"] for x in (running, resumed))
    assert before < most - STREAMS * T and after == pytest.approx(51 * STREAMS * T)  # to each stream's next whole row
    code = least_tokens({"code": running[0].readers["code"]}, {"code": Limit(1)}, STREAMS, 3)
    held = least_tokens(running[0].readers, {**limits, "web": Limit(0, 40)}, STREAMS, 3)
    assert held == pytest.approx(most / STREAMS + 10 + min(code, most / STREAMS))
    assert least_tokens(running[0].readers, limits | {"web": Limit()}, STREAMS, 3) == np.inf


def test_changed_weights_and_new_sources_at_a_resume_are_recorded(three):
    two = {name: three[name] for name in ("books", "code")}
    running = ranks(two, 2, stages=[(0, {"books": 1, "code": 1})])
    global_steps(running, 20)
    state = TokenLoader.merge_states([one.state_dict() for one in running])
    positions = state["streams"]["1"]["sources"]
    resumed = loader(three, stages=[(0, {"code": 1, "web": 3})])
    resumed.load_state_dict(state)
    assert {name: resumed.state_dict()["streams"]["1"]["sources"][name] for name in two} == positions
    global_steps([resumed], 20)
    assert resumed.report(resumed.counts())["mix"] == pytest.approx({"books": 0, "code": 0.25, "web": 0.75}, abs=0.02)
    assert resumed.state_dict()["mixtures"] == [
        {"from_tokens": 0, "stages": [[0, {"books": 1, "code": 1}]], "limits": {}},
        {"from_tokens": 20 * ROWS * T, "stages": [[0, {"code": 1, "web": 3}]], "limits": {}},
    ]
    with pytest.raises(DataError, match=r"'web'.*weight of 0"):
        loader(two).load_state_dict(resumed.state_dict())
    with pytest.raises(DataError, match="packing was 'concat'"):
        loader(three, packing="best_fit").load_state_dict(resumed.state_dict())
    swapped = {"books": three["code"], "code": three["books"], "web": three["web"]}
    with pytest.raises(DataError, match=r"source '(books|code)' was"):
        loader(swapped).load_state_dict(resumed.state_dict())


@pytest.mark.parametrize(
    ("key", "value"),
    [("weights", -1), ("weights", float("nan")), ("weights", "1"), ("drawn", -5), ("drawn", 1.5), ("tokens", -1)],
)
def test_a_state_with_values_that_no_loader_has_is_refused(three, key, value):
    running = loader(three, stages=[(0, {"books": 1, "code": 1})])
    global_steps([running], 3)
    state = running.state_dict()
    stream = state["streams"]["1"]
    (stream["sources"]["books"] if key == "tokens" else stream[key]).update(
        {"books" if key != "tokens" else key: value}
    )
    with pytest.raises(DataError, match=f"{key}|books") as caught:
        loader(three, stages=[(0, {"books": 1, "code": 1})]).load_state_dict(state)
    assert repr(value) in str(caught.value)


def test_a_run_of_one_directory_goes_on_as_a_mixture(three):
    plain = loader(three["books"])
    global_steps([plain], 9)
    state = plain.state_dict()
    assert state["version"] == 1 and state["streams"]["0"].keys() == {"epoch", "shard", "document", "offset", "last"}
    alone = loader(three, stages=[(0, {"books": 1})])
    alone.load_state_dict(state)
    mixed = loader(three, stages=[(0, {"books": 1, "web": 1})])
    mixed.load_state_dict(state)
    assert global_steps([alone], 9).equal(global_steps([plain], 9))
    global_steps([mixed], 10)
    epochs = {name: n * mixed.source_tokens[name] for name, n in mixed.report(mixed.counts())["source_epochs"].items()}
    assert epochs == pytest.approx({"books": 14 * ROWS * T, "code": 0, "web": 5 * ROWS * T})


def test_rows_and_states_of_a_directory_are_those_of_earlier_versions():
    """Recorded at f9650f9."""
    options = {"seq_len": 16, "global_batch_size": 8, "micro_batch_size": 8, "num_streams": 2, "seed": 3}
    one, crc = TokenLoader(OLD, "train", prefetch_rows=30, **options), 0
    state = {
        "version": 1, "split": "train", "seed": 3, "seq_len": 16, "num_streams": 2,
        "index": "71ccf6db414ccc573993f908bdddaaf7b65c7c5bc6b7e5ad9e8b67264a955641", "steps": 17, "tokens_seen": 2176,
        "streams": {
            "0": {"epoch": 0, "shard": 0, "document": 5, "offset": 53, "last": 273},
            "1": {"epoch": 0, "shard": 0, "document": 4, "offset": 29, "last": 259},
        },
    }  # fmt: skip
    for step in range(40):
        if step == 17:
            assert one.state_dict() == state
            one = TokenLoader(OLD, "train", **options)
            one.load_state_dict(state)
        (batch,) = one.next_step()
        crc = zlib.crc32(b"".join(x.numpy().tobytes() for x in batch), crc)
    assert crc == 2398824630


def test_sources_of_two_tokenizers(three):
    with pytest.raises(DataError, match="tokenizer"):
        loader({"a": three["books"], "b": OLD}, num_streams=2)


def test_planned_tokens():
    stages = [(0, {"a": 1, "b": 3}), (100, {"a": 1}), (150, {"b": 2})]
    assert planned_tokens(stages, 200) == {"a": 75, "b": 125}
    assert planned_tokens(stages, 120) == {"a": 45, "b": 75}


def test_a_mixture_in_words():
    stages = [[0, {"web": 1.0, "books": 0.25}], [1_000_000, {"web": 2}]]
    text = described({"from_tokens": 5, "stages": stages, "limits": {"web": [0, 0], "books": [2, 3000]}})
    assert text == "web 1, books 0.25; from token 1,000,000 on web 2; books ends after 2 epochs or 3,000 tokens"
