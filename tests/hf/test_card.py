"""The model card: facts of the run, bytes of the cache, and what it leaves to the publisher."""

import json
import shutil

import pytest
import torch
import yaml

from megatron_dla.checkpoint.weights import CheckpointLayout
from megatron_dla.cli import main
from megatron_dla.config import layer_letters
from megatron_dla.data.remote import local_directory
from megatron_dla.hf.card import LORA_MODULES, _data, cache_bytes, model_card
from megatron_dla.hf.convert import to_hf


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("name", ["mamba2", "gdn", "gdn_hybrid", "plain_gdn", "shaped_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_cache(exported, name, dtype):
    case = exported(name)
    memory = case.load(dtype=dtype)(torch.arange(3, 53)[None], use_cache=True).past_key_values
    layers = [cache_bytes(case.section, letter, dtype.itemsize) for letter in layer_letters(case.section)]
    assert memory.nbytes == sum(constant + 50 * growing for constant, growing in layers)
    assert f"{sum(constant for constant, _ in layers):,} bytes" in (case.directory / "README.md").read_text() or (
        dtype is torch.float32  # the card has those of a bf16 model
    )


def test_facts_come_from_the_run(exported, tmp_path):
    case = exported("mamba2")
    card = (case.directory / "README.md").read_text()
    assert "license" not in front_matter(card) and card.count("not recorded") == 4
    run = tmp_path / "run"
    shutil.copytree(case.checkpoint.parent.parent, run, ignore=shutil.ignore_patterns("hf_*"))
    lines = [
        {"step": 2, "loss": 3.0, "tokens": 100, "val_loss": 2.5},
        {"step": 3, "loss": 2.0, "tokens": 1500},
        {"step": 4, "loss": 9.0, "tokens": 9},  # after the checkpoint
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shards = [{"split": "train", "tokens": 7000}, {"split": "val", "tokens": 5}]
    (tmp_path / "index.json").write_text(json.dumps({"shards": shards, "sources": [{"input": "wiki"}]}))
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"dir": str(tmp_path)}}))
    card = (to_hf(run, tmp_path / "hf", license="apache-2.0") / "README.md").read_text()
    assert front_matter(card)["license"] == "apache-2.0" and "custom_code" in front_matter(card)["tags"]
    rows = ["tokens | 1,500", "losses | training 2.0000, held-out 2.5000", "data | 7,000 tokens of wiki"]
    assert all(f"| {row} |" in card for row in [*rows, "licence | apache-2.0"])
    assert "not recorded" not in card
    at_a_url = local_directory("https://host/data", str(tmp_path))  # as training left it
    at_a_url.mkdir(parents=True)
    shutil.copy(tmp_path / "index.json", at_a_url)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"dir": "https://host/data", "cache_dir": str(tmp_path)}}))
    assert _data(run) == "7,000 tokens of wiki"
    mixture = {"data": {"dir": "", "sources": {name: {"dir": str(tmp_path)} for name in "ab"}}}
    (run / "config.yaml").write_text(yaml.safe_dump(mixture))
    card = (to_hf(run, tmp_path / "mixed") / "README.md").read_text()
    assert "data | 7,000 tokens of wiki; 7,000 tokens of wiki (a mixture" in card


@pytest.mark.parametrize("license", ["no", "a: b", "#x", "'", "[a", "x" * 200, "a | b", "1.0"])
def test_any_license_of_one_line_is_quoted(exported, tmp_path, license):
    case = exported("mamba2")
    card = model_card(CheckpointLayout.load(case.checkpoint), "m", 1, 1, tmp_path, license)
    assert front_matter(card)["license"] == license and len(front_matter(card)) == 4
    rows = [line for line in card.splitlines() if line.startswith("| licence")]
    assert rows == [f"| licence | {license.replace('|', chr(92) + '|')} |"]


@pytest.mark.parametrize("license", ["a\nb: c", "", " ", "a\x07", "\u2028", "a\rb"])
def test_a_license_is_one_printable_line(exported, tmp_path, capsys, license):
    checkpoint = str(exported("mamba2").checkpoint)
    assert main(["convert", "to-hf", checkpoint, str(tmp_path / "hf"), "--license", license]) == 2
    error = capsys.readouterr().err
    assert f"--license {license!r}" in error and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mamba2", "mamba2_published", "gdn_hybrid"])
def test_modules_for_lora_are_those_of_the_model(exported, name):
    case = exported(name)
    line = next(x for x in (case.directory / "README.md").read_text().splitlines() if x.startswith("LoraConfig"))
    given = json.loads(line[line.index("[") : line.index("]") + 1])
    linear = {key.rsplit(".", 1)[-1] for key, x in case.load().named_modules() if isinstance(x, torch.nn.Linear)}
    assert set(given) == linear - {"lm_head"} and set(given) <= set(LORA_MODULES)
