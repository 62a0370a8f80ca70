"""`dla eval lm --adapter`: the same scores as the adapter's own interface gives, with and without a cache."""

import json

import pytest
import torch

from megatron_dla import cli
from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.files import Adapter, write_adapter
from megatron_dla.evaluation.lm.models import load_subject, with_adapter
from megatron_dla.evaluation.lm.scoring import Row, continue_prompts, score_rows
from megatron_dla.hf.directory import fingerprint
from megatron_dla.serving.decode import pad_left
from megatron_dla.serving.load import load_adapted
from tests.support.tiny_eval import build_model, save_words

TEXTS = ("red tea of the and in", "tea of", "the and in red red tea of the", "in and")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapted")
    save_words(root / "base")
    for name, config in {"token": DeltaMemConfig(), "message": DeltaMemConfig(write="message")}.items():
        tensors = build_model(config, torch.float32).tensors()
        write_adapter(root / name, Adapter(config, tensors, fingerprint(root / "base")))
    (root / "text.txt").write_text("red tea of the and in " * 40)
    return root


@pytest.fixture(scope="module")
def subject(place):
    return with_adapter(load_subject("base", str(place / "base")), "on", str(place / "token"))


@pytest.fixture(scope="module")
def memory(place):
    """The same by itself, its states passed from call to call."""
    return load_adapted(place / "base", place / "token")


@torch.no_grad()
def test_scores_are_those_of_one_call_each(place, subject, memory) -> None:
    rows = [Row(subject.encode(text), 1) for text in TEXTS]
    plain = score_rows(load_subject("base", str(place / "base")), rows, 1000)
    for row, mine, base in zip(rows, score_rows(subject, rows, 1000), plain, strict=True):
        wanted = memory(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
        wanted = wanted.gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(mine.logprob).float(), wanted, rtol=1e-5, atol=1e-5)
        assert len(wanted) == 1 or abs(mine.logprob - base.logprob).max() > 1e-3  # the first token reads nothing


@torch.no_grad()
def test_the_state_goes_from_call_to_call_of_a_continuation(subject, memory) -> None:
    prompts = [subject.encode(text) for text in TEXTS]
    ids, mask = pad_left(prompts)
    found = subject.model.generate(
        ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for i, prompt in enumerate(prompts):
        row = [*prompt, *found.sequences[i, ids.shape[1] :].tolist()]
        wanted = memory(torch.tensor([row])).logits[0, len(prompt) - 1 : -1]
        got = torch.stack([step[i] for step in found.logits])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert len(continue_prompts(subject, prompts, [3] * len(prompts))) == len(prompts)


def test_the_command_pairs_it_with_its_base(place, tmp_path, capsys) -> None:
    def run(*arguments: str) -> dict:
        assert cli.main(["eval", "lm", *arguments, "--window", "16", "--out", str(tmp_path)]) == 0
        return json.loads((tmp_path / "eval.json").read_text())

    text = ("--text", f"{place}/text.txt")
    found = run(f"base={place}/base", "--adapter", f"on={place}/token", *text)
    (task,) = found["tasks"]
    assert task["settings"]["paired"] == ["on"] and list(task["conditions"]) == ["base", "on"]
    assert {(row["first"], row["second"]) for row in task["differences"]} == {("on", "base")}
    digests = {name: model["digest"] for name, model in found["models"].items()}
    assert digests["on"] != digests["base"]
    lines = (tmp_path / "items.jsonl").read_text()
    assert run(f"base={place}/base", "--adapter", f"on={place}/token", *text)["tasks"] == found["tasks"]
    assert (tmp_path / "items.jsonl").read_text() == lines  # nothing was measured twice


WRONG = {
    "{place}/none": "{place}/none",
    "base={place}/token": "'base' is given twice",
    "{place}/message": "--adapter {place}/message",
}


@pytest.mark.parametrize(("adapter", "named"), WRONG.items())
def test_wrong_adapters_are_named(place, capsys, adapter, named) -> None:
    arguments = ["eval", "lm", f"base={place}/base", "--adapter", adapter.format(place=place)]
    assert cli.main([*arguments, "--text", f"{place}/text.txt", "--window", "16"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert named.format(place=place) in error
