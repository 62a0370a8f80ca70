"""What a state alone holds: the task, its training, and `dla eval capacity`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.cli import main
from megatron_dla.evaluation.capacity import KEYS, VALUES, Recall, Training, draw, exact, measure, train
from megatron_dla.evaluation.capacity_cli import JSON_NAME, PICTURE_NAME

CONFIG = DeltaMemConfig(rank=8, target_modules=("o_proj",), output_init="random", output_gain=1.0)


def test_the_reference_holds_a_value_for_each_key_and_guesses_the_others() -> None:
    assert [exact(8, n) for n in (1, 8)] == [1, 1]
    assert exact(8, 32) == pytest.approx(0.25 + 0.75 / VALUES)


def test_facts_have_keys_of_their_own_and_are_all_asked() -> None:
    keys, values, order = draw(50, 20, np.random.default_rng(0))
    for row, asked in zip(keys, order, strict=True):
        assert row.unique().numel() == 20 and torch.equal(asked.sort().values, torch.arange(20))
    assert len({tuple(row.tolist()) for row in keys}) == 50 and len({tuple(row.tolist()) for row in order}) == 50
    assert keys.max() < KEYS and set(values.unique().tolist()) == set(range(VALUES))


def test_an_answer_comes_from_the_state_and_no_question_writes() -> None:
    model = Recall(CONFIG, 0)
    keys, values, order = draw(2, 6, np.random.default_rng(1))
    logits = model(keys, values, order)
    turned = model(keys, values, order.flip(1))
    torch.testing.assert_close(turned.flip(1), logits)  # with writes, a question would change what the next one reads
    other = model(keys, (values + 1) % VALUES, order)
    assert not torch.allclose(other, logits, atol=1e-4)
    model.memory.beta_bias.data.fill_(-1e9)  # nothing is written: nothing can be told apart
    torch.testing.assert_close(model(keys, values, order), torch.zeros_like(logits))


def test_a_trained_memory_recalls_and_many_facts_are_harder_than_few() -> None:
    losses = []
    model = train(CONFIG, 32, Training(steps=400), 0, lambda _, loss: losses.append(loss))
    assert len(losses) == 400
    few, many = (measure(model, n, 100, 3) for n in (2, 32))
    assert few.low > 0.9 and 1.5 / VALUES < many.mean < 0.6 and few.count == 100


def test_the_same_seed_gives_the_same_memory() -> None:
    first, again, other = (train(CONFIG, 8, Training(steps=3), seed) for seed in (1, 1, 2))
    assert torch.equal(first.keys, again.keys) and not torch.equal(first.keys, other.keys)


def test_the_command_writes_table_json_and_picture(tmp_path: Path, capsys) -> None:
    words = ["--states", "08", "2x8", "--facts", "4", "1", "4", "--steps", "5", "--episodes", "4"]
    out = tmp_path / "new" / "out"
    assert main(["eval", "capacity", *words, "--set", "delta_mem.beta_bias=-3", "--out", str(out)]) == 0
    results = json.loads((out / JSON_NAME).read_text())
    assert results["facts"] == [1, 4] and results["versions"]["torch"] == torch.__version__
    assert all(results[key] for key in ("machine", "date"))
    found = [(name, s["numbers"], s["exact"], s["config"]["beta_bias"]) for name, s in results["states"].items()]
    assert found == [("8", 64, [1, 1], -3), ("2x8", 128, None, -3)]
    for state in results["states"].values():
        assert [r["count"] for r in state["right"]] == [4, 4]
        assert all(0 <= r["low"] <= r["mean"] <= r["high"] <= 1 for r in state["right"])
    assert (out / PICTURE_NAME).read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr()
    assert "state 2x8" in printed.out and "state 2x8: step 5/5" in printed.err


def test_a_state_that_has_ended_stays_where_the_next_one_is_stopped(tmp_path: Path, monkeypatch) -> None:
    trained = []

    def stopped(*arguments):
        if trained:
            raise KeyboardInterrupt
        trained.append(arguments)
        return train(*arguments)

    monkeypatch.setattr("megatron_dla.evaluation.capacity.train", stopped)
    words = ["--states", "8", "16", "--facts", "1", "--steps", "1", "--episodes", "2", "--out", str(tmp_path)]
    assert main(["eval", "capacity", *words]) == 130
    assert list(json.loads((tmp_path / JSON_NAME).read_text())["states"]) == ["8"]


def test_many_episodes_are_asked_in_parts() -> None:
    found = measure(Recall(CONFIG, 0), 2, 450, 0)
    assert found.count == 450 and found.low < 1 / VALUES + 0.05


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--states", "8y"], ("--states", "8y")), (["--states", "999"], ("--states", "999", "8 to 64")),
        (["--states", "9x8"], ("--states", "9x8")), (["--states", "\u0668"], ("--states",)),
        (["--states", "8", "1x08"], ("--states", "1x08", "twice")), (["--facts", "0"], ("--facts", "0")),
        (["--facts", str(KEYS + 1)], ("--facts", str(KEYS + 1))), (["--set", "rank=9"], ("--set", "rank")),
        (["--set", "bta=1"], ("delta_mem.bta",)), (["--set", "write=message"], ("--set", "write")),
        (["--set", "memory=static"], ("--set", "memory")), (["--set", "x"], ("--set", "x")),
        (["--set", "alpha=1", "alpha=2"], ("--set", "alpha=2", "twice")), (["--steps", "0"], ("--steps", "0")),
        (["--episodes", "1"], ("--episodes", "1")), (["--episodes", "100001"], ("--episodes", "100001")),
        (["--out", __file__], ("--out", __file__)), (["--out", f"{__file__}/below"], ("--out", __file__)),
    ],
)  # fmt: skip
def test_wrong_options(words, named, capsys) -> None:
    assert main(["eval", "capacity", *words]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(word in error for word in named), error
