"""A run on several sources: metrics of the mix, a resume at another layout with other weights, both packings."""

from pathlib import Path

import pytest

from megatron_dla.cli import main
from megatron_dla.data_prep.shards import build_shards
from tests.support import tiny, train_workers


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    first, text = tiny.build_data(root), tiny.write_corpus(root / "other", documents=80, seed=9)
    options = {"workers": 1, "val_fraction": 0.1, "min_train_shards": 8}
    build_shards([str(text)], str(first / "tokenizer.model"), str(root / "second"), **options)
    return {"first": first, "second": root / "second"}


def run_config(sources: dict[str, Path], runs: Path, **data) -> dict:
    mixture = {name: {"dir": str(path), "weight": 1 + 2 * i} for i, (name, path) in enumerate(sources.items())}
    training = {"steps": 4, "eval_every": 8, "eval_rows": 2}
    values = tiny.config_dict(Path(), runs, training=training)
    values["data"] |= {"dir": "", "sources": mixture, **data}
    return values


def test_mix_is_reported_and_other_weights_and_layouts_resume_it(ranks, sources, tmp_path) -> None:
    values = run_config(sources, tmp_path, packing="best_fit")
    before = ranks(2).run(train_workers.train, values)[0][-1]
    assert before["mix"] == pytest.approx({"first": 0.25, "second": 0.75}, abs=0.05) and before["val_loss"] > 0
    parts = before["val_loss_by_source"]
    assert set(parts) == set(sources) and min(parts.values()) < before["val_loss"] < max(parts.values())
    assert 0 < before["source_epochs"]["first"] < before["source_epochs"]["second"]
    assert 0 < before["padding_share"] < 0.1 and before["cut_share"] == 1  # all documents are longer than a row
    values["training"]["steps"] = 8
    values["data"]["sources"]["first"]["weight"] = 3
    values["data"]["stages"] = [{"from_tokens": 6 * 8 * 64, "weights": {"first": 1}}]
    assert "data.sources" in ranks(1).run(train_workers.resume_note, values)[0]
    after = {m["step"]: m for m in ranks(1).run(train_workers.train, values)[0]}
    assert after[6]["mix"] == pytest.approx({"first": 0.5, "second": 0.5}, abs=0.05)
    assert after[8]["mix"] == {"first": 1, "second": 0} and after[8]["tokens"] == 8 * 8 * 64
    assert after[8]["source_epochs"]["second"] == after[6]["source_epochs"]["second"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_epochs": 1}, ["max_epochs", "fewer steps"]),
        ({"dir": "/nowhere"}, ["/nowhere"]),
    ],
)
def test_a_mixture_that_cannot_be_read_to_the_end(capsys, sources, tmp_path, changes, words) -> None:
    import yaml

    values = run_config(sources, tmp_path)
    values["training"]["steps"] = 10_000
    for source in values["data"]["sources"].values():
        source |= changes
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    assert main(["train", str(config), "--dry-run"]) == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1
    for word in words:
        assert word in line
