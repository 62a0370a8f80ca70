"""Training an adapter with the real trainer: against plain autograd, at several layouts, resumed, exported."""

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
import yaml

from megatron_dla.adapters.memory import MemoryInputs
from megatron_dla.cli import main
from megatron_dla.config import AdapterRunConfig
from megatron_dla.data_prep.shards import build_shards
from megatron_dla.evaluation.recall import ProfileTask, write_stories
from megatron_dla.hf.load import load_backbone, load_tokenizer
from megatron_dla.serving.hf_model import attach
from megatron_dla.serving.load import load_adapted
from megatron_dla.tasks.adapter.episodes import collate, read_episodes
from megatron_dla.tasks.adapter.two_pass import answer_loss
from tests.support import adapter_workers, tiny
from tests.support.adapter_workers import backbone, config_dict
from tests.support.byte_level import byte_level
from tests.support.distributed import Ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A random small Llama, and episodes of words."""
    directory = tmp_path_factory.mktemp("adapter")
    backbone(directory / "llama")
    for split, count in (("train", 24), ("validation", 6)):
        write_stories(directory / f"{split}.jsonl", ProfileTask(words=12), count, seed=1, split=split)
    return directory


LAYOUTS = {
    "TP2": (2, {"parallel": {"tensor_model_parallel_size": 2}}),
    "TP2+SP": (2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    "CP2": (2, {"parallel": {"context_parallel_size": 2}}),
    "DP2, ZeRO-2, recomputed": (2, {"training": {"zero_stage": 2, "recompute": "full"}}),
}


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """The run of one process."""
    pool = Ranks(1)
    (result,) = pool.run(adapter_workers.train, config_dict(data, tmp_path_factory.mktemp("one")))
    yield result
    pool.stop()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n == "CP2")) for n in LAYOUTS])
def test_losses_gates_and_adapter_are_those_of_one_process(data, reference, ranks, tmp_path, name: str) -> None:
    world, sections = LAYOUTS[name]
    got, *_ = ranks(world).run(adapter_workers.train, config_dict(data, tmp_path, **sections))
    for mine, theirs in zip(got["metrics"], reference["metrics"], strict=True):
        assert mine.keys() == theirs.keys()
        for key in {"loss", "grad_norm", "gate", "val_loss"} & mine.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=2e-5), key
        assert {"loss", "grad_norm", "gate", "val_loss"} <= mine.keys() or not mine["step"]
        if mine["step"]:
            assert mine["steering_by_layer"] == pytest.approx(theirs["steering_by_layer"], rel=1e-3)
    for key, value in reference["adapter"].items():
        torch.testing.assert_close(got["adapter"][key], value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def mixed(data, tmp_path_factory) -> dict:
    """Sections of a run on episodes with and without their text and on ordinary text, held near the frozen model."""
    root, files = tmp_path_factory.mktemp("mixed"), {}
    for key, name in (("train", "train.jsonl"), ("valid", "validation.jsonl")):
        lines = (data / name).read_text().splitlines()
        half = len(lines) - 4
        text = json.dumps({"text": " ".join(tiny.WORDS * 3)})
        (root / name).write_text("\n".join([*lines[:half], text, *lines[half:]]))
        files[key] = str(root / name)
    return {"episodes": {**files, "in_prompt": 0.5}, "distillation": {"weight": 0.7}}


@pytest.fixture(scope="module")
def kept(data, mixed, tmp_path_factory):
    """Their run by one process."""
    pool = Ranks(1)
    (result,) = pool.run(adapter_workers.train, config_dict(data, tmp_path_factory.mktemp("kept"), **mixed))
    yield result
    pool.stop()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n == "TP2")) for n in LAYOUTS])
def test_distillation_is_that_of_one_process(data, mixed, kept, ranks, tmp_path, name: str) -> None:
    world, sections = LAYOUTS[name]
    got, *_ = ranks(world).run(adapter_workers.train, config_dict(data, tmp_path, **mixed, **sections))
    for mine, theirs in zip(got["metrics"], kept["metrics"], strict=True):
        assert mine.keys() == theirs.keys()
        for key in {"loss", "grad_norm", "val_loss", "val_answers", "val_divergence", "divergence"} & mine.keys():
            rel = 1e-3 if key.endswith("divergence") else 5e-5  # of fp32 logits that are nearly equal
            assert mine[key] == pytest.approx(theirs[key], rel=rel), key
    assert {"loss", "grad_norm", "val_loss", "val_answers", "val_divergence", "divergence"} <= mine.keys()  # the last
    for key, value in kept["adapter"].items():
        torch.testing.assert_close(got["adapter"][key], value, rtol=1e-4, atol=1e-5)


def test_the_divergence_is_from_the_frozen_model(data, mixed, kept) -> None:
    """Of step 1, against the Hugging Face model, episode by episode; training lowers what it costs."""
    from megatron_dla.adapters.config import DeltaMemConfig
    from megatron_dla.adapters.memory import MemoryControl

    values, tokenizer = config_dict(data, data), load_tokenizer(data / "llama")
    episodes = read_episodes(
        mixed["episodes"]["train"], tokenizer, write_length=16, read_length=16, in_prompt=0.5
    )  # fmt: skip
    model = attach(load_backbone(data / "llama"), DeltaMemConfig(**values["delta_mem"]), seed=5)

    def mean(chosen) -> float:
        total, count = 0.0, 0
        for episode in chosen:
            ids = torch.from_numpy(numpy.concatenate([episode.write_ids, episode.read_ids]))[None]
            with torch.no_grad():
                new, old = (
                    model(ids, control=MemoryControl(scale=x)).logits[0, :-1].double().log_softmax(-1) for x in (1, 0)
                )
            total += float((old.exp() * (old - new)).sum())
            count += len(old)
        return total / count

    first = mean(episodes[i] for i in kept["first_rows"] if episodes[i].in_prompt)
    assert kept["metrics"][1]["divergence"] == pytest.approx(first, rel=1e-3)
    held_out = read_episodes(
        mixed["episodes"]["valid"], tokenizer, write_length=16, read_length=16, in_prompt=1.0
    )  # fmt: skip
    assert any(not episode.answer.any() for episode in held_out)
    before = kept["metrics"][0]
    assert before["val_divergence"] == pytest.approx(mean(held_out), rel=1e-3)
    assert before["val_loss"] == pytest.approx(before["val_answers"] + 0.7 * before["val_divergence"], rel=1e-9)


def test_the_weight_holds_the_adapter_back(data, mixed, ranks, tmp_path) -> None:
    ends = []
    for weight in (1e-6, 1e3):
        sections = mixed | {"distillation": {"weight": weight}, "training": {"steps": 8, "eval_every": 0}}
        (got,) = ranks(1).run(adapter_workers.train, config_dict(data, tmp_path / str(weight), **sections))
        ends.append(got["metrics"][-1]["divergence"])
    assert ends[1] < 0.3 * ends[0]


def test_no_weight_is_copied_for_each_token(data, mixed, ranks, tmp_path) -> None:
    """torch multiplies a tensor of odd strides by a weight that it repeats: of SmolLM2's head 15 s a batch."""
    sections = mixed | {"training": {"steps": 2, "eval_every": 0}}
    (shapes,) = ranks(1).run(adapter_workers.matrix_products, config_dict(data, tmp_path, **sections))
    hidden = json.loads((data / "llama" / "config.json").read_text())["hidden_size"]
    head = json.loads((data / "llama" / "config.json").read_text())["vocab_size"], hidden
    assert head in shapes  # of the gradient
    assert not [shape for shape in shapes if len(shape) == 3 and hidden in shape[1:]]


def test_the_loss_is_the_mean_over_the_answers_and_training_lowers_it(data, reference) -> None:
    """Step 1 against the two-pass form on the Hugging Face model, episode by episode."""
    model, tokenizer = load_backbone(data / "llama"), load_tokenizer(data / "llama")
    from megatron_dla.adapters.config import DeltaMemConfig

    values = config_dict(data, data)
    episodes = read_episodes(data / "train.jsonl", tokenizer, write_length=16, read_length=16)
    memory = attach(model, DeltaMemConfig(**values["delta_mem"]), seed=5)
    first = [episodes[i] for i in reference["first_rows"]]
    assert reference["metrics"][1]["loss"] == pytest.approx(answer_loss(memory, first), rel=1e-5)
    assert reference["metrics"][-1]["val_loss"] < reference["metrics"][0]["val_loss"]
    assert collate([first[:1]]).loss_mask.sum() == first[0].answer.sum()


def test_the_first_validation_is_before_step_1(data, reference, ranks, tmp_path) -> None:
    """Of the adapter as it was initialised, held against the two-pass form; a resumed run does not repeat it."""
    first, *rest = reference["metrics"]
    assert first.keys() == {"step", "time", "tokens", "val_loss"} and (first["step"], first["tokens"]) == (0, 0)
    assert [m["step"] for m in rest] == [1, 2, 3, 4]
    model, tokenizer = load_backbone(data / "llama"), load_tokenizer(data / "llama")
    from megatron_dla.adapters.config import DeltaMemConfig

    memory = attach(model, DeltaMemConfig(**config_dict(data, data)["delta_mem"]), seed=5)
    held_out = read_episodes(data / "validation.jsonl", tokenizer, write_length=16, read_length=16)
    assert first["val_loss"] == pytest.approx(answer_loss(memory, held_out), rel=1e-5)
    ranks(1).run(adapter_workers.train, config_dict(data, tmp_path, training={"save_every": 2, "stop_after": 2}))
    (got,) = ranks(1).run(adapter_workers.train, config_dict(data, tmp_path))
    assert [m["step"] for m in got["metrics"]] == [0, 1, 2, 3, 4]


def test_documents_train_an_adapter_that_is_validated_on_episodes(data, ranks, tmp_path) -> None:
    """At two data-parallel sizes, resumed, and drawn."""
    shards = tiny.build_data(tmp_path / "corpus")
    backbone(tmp_path / "llama", rows=304)
    shutil.copy(shards / "tokenizer.model", tmp_path / "llama")
    runs = {}
    for name, world, stops in (("one", 1, [None]), ("two", 2, [2, None])):
        for stop in stops:
            sections = {
                "run": {"name": name}, "backbone": {"dir": str(tmp_path / "llama")},
                "episodes": {"train": "", "documents": str(shards), "num_streams": 4},
                "training": {"stop_after": stop},
            }  # fmt: skip
            got, *_ = ranks(world).run(adapter_workers.train, config_dict(data, tmp_path, **sections))
        runs[name] = got["metrics"]
    assert [m["step"] for m in runs["two"]] == [0, 1, 2, 3, 4]
    for mine, theirs in zip(runs["two"], runs["one"], strict=True):
        assert mine.keys() == theirs.keys() and mine["tokens"] == theirs["tokens"] == mine["step"] * 4 * 56
        for key in {"loss", "gate", "val_loss"} & mine.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=2e-5), key
    assert {"loss", "gate"} <= mine.keys()  # of the last step
    assert main(["plot", str(tmp_path / "one")]) == 0 and (tmp_path / "one" / "plots" / "training.png").is_file()


def test_documents_of_a_tokenizer_json(data, tmp_path, capsys) -> None:
    corpus, shards = tiny.write_corpus(tmp_path / "corpus"), tmp_path / "shards"
    backbone(tmp_path / "llama", rows=304)
    byte_level(tmp_path / "llama", [json.loads(line)["text"] for line in corpus.open()])
    (tmp_path / "llama" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    build_shards([corpus], tmp_path / "llama", shards, workers=1, min_train_shards=8)
    documents = {"train": "", "valid": "", "documents": str(shards), "num_streams": 4}
    sections = {"backbone": {"dir": str(tmp_path / "llama")}, "episodes": documents, "training": {"eval_every": 0}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config_dict(data, tmp_path, **sections)))
    assert main(["train", str(path), "--dry-run"]) == 0
    byte_level(tmp_path / "llama", ["another text"])
    assert main(["train", str(path), "--dry-run"]) == 2
    assert "vocabulary mismatch: episodes.documents" in capsys.readouterr().err


@pytest.mark.parametrize("parallel", [{"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}, {}], ids=str)
def test_a_replica_that_differs_ends_the_run(data, ranks, tmp_path, parallel) -> None:
    values = config_dict(data, tmp_path, parallel=parallel, debug={"check_replicas": 1}, training={"eval_every": 0})
    for error in ranks(2).run(adapter_workers.drifting, values):
        assert "after 2 steps" in error and "delta_mem" in error


def test_a_loss_that_is_not_a_number_ends_the_run(data, ranks, tmp_path) -> None:
    (error, steps), _ = ranks(2).run(
        adapter_workers.poisoned, config_dict(data, tmp_path, anomalies={"non_finite": "stop"})
    )
    assert "step 2: the loss is not finite" in error and steps == 1
    assert not list(tmp_path.glob("*/checkpoints/step_*"))


def test_a_directory_with_checkpoints_is_not_trained_anew(data, stopped, tmp_path, capsys) -> None:
    shutil.copytree(stopped / "tiny", tmp_path / "tiny")
    assert run_cli(tmp_path, config_dict(data, tmp_path, training={"resume": False})) == 2
    assert "training.resume=true" in capsys.readouterr().err
    assert (tmp_path / "tiny" / "checkpoints" / "step_2" / "complete.json").is_file()


def test_resumed_run_equals_the_uninterrupted_one(data, reference, ranks, tmp_path) -> None:
    first = config_dict(data, tmp_path, training={"save_every": 2, "stop_after": 2})
    ranks(1).run(adapter_workers.train, first)
    (got,) = ranks(1).run(adapter_workers.train, config_dict(data, tmp_path))
    for mine, theirs in zip(got["metrics"], reference["metrics"], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[key] == theirs[key] for key in ("loss", "gate", "val_loss") if key in mine)
    assert {"loss", "gate", "val_loss"} <= mine.keys()  # of the last step
    assert all(torch.equal(got["adapter"][key], value) for key, value in reference["adapter"].items())


def test_a_checkpoint_is_the_adapter_alone_and_is_exported_to_the_plain_model(data, ranks, tmp_path, capsys) -> None:
    values = config_dict(data, tmp_path)
    (got,) = ranks(1).run(adapter_workers.train, values)
    step = tmp_path / "tiny" / "checkpoints" / "step_4"
    size = sum(f.stat().st_size for f in (step / "weights").iterdir())
    assert size < 1.2 * 4 * sum(x.numel() for x in got["adapter"].values()) + 4096
    assert main(["convert", "adapter", str(tmp_path / "tiny"), str(tmp_path / "out")]) == 0
    model = load_adapted(data / "llama", tmp_path / "out")
    ids = torch.arange(20)[None] % 40
    out = model(ids, inputs=MemoryInputs())
    torch.testing.assert_close(out.logits, got["logits"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(load_adapted(data / "llama", None)(ids).logits, out.logits, atol=1e-3)
    assert main(["convert", "to-hf", str(step), str(tmp_path / "hf")]) == 2
    assert "convert adapter" in capsys.readouterr().err


def test_another_adapter_in_the_same_directory_is_refused(data, ranks, tmp_path) -> None:
    ranks(1).run(adapter_workers.train, config_dict(data, tmp_path, training={"save_every": 2, "stop_after": 2}))
    with pytest.raises(AssertionError, match="holds an adapter of"):
        ranks(1).run(adapter_workers.train, config_dict(data, tmp_path, delta_mem={"rank": 16}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"episodes": {"write_length": 8}}, "the digest of the episodes .*write_length"),
        ({"episodes": {"row_length": 96}}, "episodes.row_length, or write_length"),
        ({"run": {"seed": 6}}, "run.seed was 5 in the checkpoint and is 6"),
    ],
)
def test_other_rows_than_the_checkpoints_are_refused(data, stopped, ranks, tmp_path, sections, message) -> None:
    shutil.copytree(stopped / "tiny", tmp_path / "tiny")
    with pytest.raises(AssertionError, match=message):
        ranks(1).run(adapter_workers.train, config_dict(data, tmp_path, **sections))


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory) -> Path:
    """A directory whose run stopped after step 2."""
    where, pool = tmp_path_factory.mktemp("stopped"), Ranks(1)
    pool.run(adapter_workers.train, config_dict(data, where, training={"save_every": 2, "stop_after": 2}))
    pool.stop()
    return where


def test_the_default_schedule_reaches_its_learning_rate() -> None:
    config = AdapterRunConfig()
    assert 0 < config.optimizer.warmup_steps < config.training.steps / 5


def run_cli(tmp_path: Path, values: dict, *more: str) -> int:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    return main(["train", str(path), *more])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"backbone": {"dir": ""}}, "backbone.dir is not set"),
        ({"episodes": {"train": "", "documents": ""}}, "set one of the two"),
        ({"episodes": {"train": "nowhere.jsonl"}}, "episodes.train = 'nowhere.jsonl': no such file"),
        ({"training": {"zero_stage": 3}}, "training.zero_stage = 3"),
        ({"training": {"global_batch_size": 3}}, "training.global_batch_size = 3"),
        ({"delta_mem": {"rank": 3}}, "delta_mem.rank = 3"),
        ({"delta_mem": {"layers_to_transform": [7]}}, "delta_mem.layers_to_transform"),
        ({"delta_mem": {"target_modules": ["k_proj"]}}, "delta_mem.target_modules"),
        ({"parallel": {"tensor_model_parallel_size": 3}}, "parallel.tensor_model_parallel_size = 3"),
        ({"episodes": {"write_length": 4000, "row_length": 0}}, "longer than the backbone's"),
        ({"episodes": {"row_length": 20}}, "does not fit a row of 20"),
        ({"episodes": {"write_length": 0}}, "episodes.write_length = 0"),
        ({"delta_mem": {"layers_to_transform": []}}, "delta_mem.layers_to_transform = []"),
        ({"distillation": {"weight": 0.5}}, "distillation.weight = 0.5"),
        ({"episodes": {"train": "", "documents": "d"}, "distillation": {"weight": 0.5}}, "distillation.weight = 0.5"),
        ({"optimizer": {"warmup_steps": 4}}, "optimizer.warmup_steps = 4"),
        ({"training": {"log_every": 0}}, "training.log_every = 0"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(data, tmp_path, capsys, sections, message) -> None:
    assert run_cli(tmp_path, config_dict(data, tmp_path, **sections), "--dry-run") == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "tiny").exists()


def test_dry_run_says_what_a_start_would_do(data, tmp_path, capsys) -> None:
    assert run_cli(tmp_path, config_dict(data, tmp_path), "--dry-run", "--world-size", "2") == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM, frozen" in out and "2 processes" in out and not (tmp_path / "tiny").exists()
