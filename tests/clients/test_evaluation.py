"""lm-eval on exported models: the same numbers whatever the batch, and no cap at the training length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WORDS = ["hello", "world", "the", "quick", "brown", "fox", "12345"]


@pytest.fixture(params=["mamba2", "gdn_hybrid"])
def lm(exported, request):
    """`lm(batch_size)`: lm-eval's model of an export."""
    from lm_eval.models.huggingface import HFLM

    directory = str(exported(request.param).directory)
    return lambda batch: HFLM(pretrained=directory, trust_remote_code=True, batch_size=batch, device="cpu")


def tasks(path):
    """lm-eval's own PIQA and LAMBADA on rows of the test tokenizer's words, and a task that generates."""
    import lm_eval.tasks

    rows = [
        {"goal": " ".join(WORDS[: 1 + i % 6]), "sol1": WORDS[i % 7], "sol2": " ".join(WORDS[-2:]), "label": i % 2}
        for i in range(12)
    ]
    for row in rows:
        row["text"] = f"{row['goal']} {row['sol1']}"
    data = path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    local = {
        "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": dict.fromkeys(("train", "validation", "test"), str(data))},
    }  # fmt: skip
    theirs = Path(lm_eval.tasks.__file__).parent
    found = []
    for name in ("piqa/piqa", "lambada/lambada_openai"):
        task = path / f"{Path(name).name}.yaml"
        task.write_text(json.dumps({"include": str(theirs / f"{name}.yaml"), "task": f"local_{task.stem}", **local}))
        found.append(str(task))
    until = local | {
        "task": "until", "output_type": "generate_until", "doc_to_text": "{{goal}}", "doc_to_target": "{{sol1}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6}, "metric_list": [{"metric": "exact_match"}],
        "test_split": "test",
    }  # fmt: skip
    return [*found, until]


def test_batch_1_and_8_agree(lm, tmp_path):
    from lm_eval import simple_evaluate

    found = []
    for batch in (1, 8):
        out = simple_evaluate(lm(batch), tasks=tasks(tmp_path), log_samples=True, bootstrap_iters=0)
        found.append({name: [x["filtered_resps"] for x in rows] for name, rows in out["samples"].items()})
    one, eight = found
    assert set(one) == {"local_piqa", "local_lambada_openai", "until"}
    assert one["until"] == eight["until"] and all(text for (text,) in one["until"])
    for name in ("local_piqa", "local_lambada_openai"):
        values = [[p for response in row for p in response] for row in one[name]]
        again = [[p for response in row for p in response] for row in eight[name]]
        for a, b in zip(values, again, strict=True):
            assert a == pytest.approx(b, abs=1e-3)


def test_our_scores_are_those_of_lm_eval(exported, tmp_path):
    """`dla eval lm --questions` and lm-eval's own PIQA, ARC-easy and LAMBADA on the same rows: equal for every row."""
    import lm_eval.tasks
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from megatron_dla.evaluation.lm.models import load_subject
    from megatron_dla.evaluation.lm.questions import read_questions

    def text(i):
        return " ".join(WORDS[(i * k + k) % 7] for k in range(1, 3 + i % 9))

    rows = range(40)
    asked = [{"q": text(i), "choices": [text(i + k) for k in range(1, 3)], "gold": i % 2} for i in rows]
    last = [{"context": text(i), "target": f" {WORDS[i % 7]}"} for i in rows]
    data = {
        "piqa/piqa": (asked, lambda x: dict(goal=x["q"], sol1=x["choices"][0], sol2=x["choices"][1], label=x["gold"])),
        "arc/arc_easy": (asked, lambda x: dict(
            question=x["q"], choices=dict(text=x["choices"], label=["A", "B"]), answerKey="AB"[x["gold"]])),
        "lambada/lambada_openai": (last, lambda x: dict(text=x["context"] + x["target"])),
    }  # fmt: skip
    subject = load_subject("x", str(exported("gdn_hybrid").directory))
    lm = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=8, device="cpu")
    index = lm_eval.tasks.TaskManager()
    for path, (ours, convert) in data.items():
        name = Path(path).name
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, ours)))
        (tmp_path / "theirs.jsonl").write_text("\n".join(json.dumps(convert(row)) for row in ours))
        files = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "theirs.jsonl"))
        task = tmp_path / f"{name}.yaml"
        own = {"include": str(Path(lm_eval.tasks.__file__).parent / f"{path}.yaml"), "task": f"local_{name}"}
        local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        task.write_text(json.dumps(own | local))
        out = simple_evaluate(lm, tasks=[str(task)], log_samples=True, bootstrap_iters=0, task_manager=index)
        mine = read_questions(str(tmp_path / f"{name}.jsonl"))
        values = mine.measure(subject, mine.items(subject))
        samples = sorted(out["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
        for metric in {"acc", "acc_norm"} & values[0].keys():
            assert [float(sample[metric]) for sample in samples] == [value[metric] for value in values]
            assert out["results"][f"local_{name}"][f"{metric},none"] == pytest.approx(
                sum(value[metric] for value in values) / len(values)
            )


def test_their_tasks_by_dla_eval(exported, tmp_path, capsys):
    """`dla eval lm --lm-eval` of a YAML file: lm-eval's accuracies, two models paired; an unknown name."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from megatron_dla import cli

    directory = str(exported("gdn_hybrid").directory)
    task = tasks(tmp_path)[0]
    arguments = ["eval", "lm", f"a={directory}", f"b={directory}", "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--lm-eval", task]) == 0
    assert cli.main([*arguments, "--lm-eval", task]) == 0  # from the journal
    (found,) = json.loads((tmp_path / "out" / "eval.json").read_text())["tasks"]
    lm = HFLM(pretrained=directory, trust_remote_code=True, batch_size=4, device="cpu")
    (wanted,) = simple_evaluate(lm, tasks=[task], bootstrap_iters=0)["results"].values()
    for metric in ("acc", "acc_norm"):
        assert found["conditions"]["a"][metric]["mean"] == pytest.approx(wanted[f"{metric},none"])
        assert found["conditions"]["a"][metric]["count"] == 12
    assert all(row["mean"] == 0 for row in found["differences"]) and found["settings"]["paired"] == ["b"]
    capsys.readouterr()
    assert cli.main([*arguments, "--lm-eval", "no_such_task"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("dla eval lm: --lm-eval no_such_task: ")


def test_contexts_are_not_cut_at_the_training_length(lm):
    from lm_eval.api.instance import Instance

    model = lm(1)
    assert model.max_length == 1 << 20 and model.prefix_token_id == model.tokenizer.eos_token_id
    long = "hello " * 200  # more tokens than a training row has
    assert len(model.tok_encode(long)) > 128
    (with_long, _), (with_short, _) = model.loglikelihood(
        [Instance("loglikelihood", {}, (text, " world"), 0) for text in ("fox " + long, "the " + long)],
        disable_tqdm=True,
    )
    assert with_long != with_short  # the first word is read
    (total,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (long,), 0)], disable_tqdm=True)
    assert total < 0
