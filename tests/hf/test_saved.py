"""Directories that a client saved after it changed the model: they load, and convert back to a checkpoint."""

import json

import pytest
import torch

from megatron_dla.checkpoint.weights import load_merged
from megatron_dla.errors import CheckpointError
from megatron_dla.hf.convert import from_hf
from megatron_dla.hf.load import load_export, load_export_tokenizer

EMBEDDINGS = ("embedding.word_embeddings.weight", "output_layer.weight")


def save(exported, name, out, rows):
    """As Trainer leaves it: the tokenizer without its tokenizer.model, the embedding with `rows` rows."""
    model, tok = exported(name).load(), load_export_tokenizer(exported(name).directory)
    model.resize_token_embeddings(rows)
    model.save_pretrained(out)
    tok.save_pretrained(out)
    return model


@pytest.mark.parametrize("name", ["mamba2", "gdn"])
@pytest.mark.parametrize("rows", [301, 384])
def test_a_resized_embedding_is_padded_back(exported, merged_of, tmp_path, name, rows):
    model = save(exported, name, tmp_path / "hf", rows)
    merged, layout = load_merged(from_hf(tmp_path / "hf", tmp_path / "step_0"))
    assert (layout.vocab_size, layout.seq_len) == (384, 128) and not (tmp_path / "hf/tokenizer.model").exists()
    for key, x in merged_of(name).items():
        kept = rows if key in EMBEDDINGS else len(x)
        assert merged[key].shape == x.shape and torch.equal(merged[key][:kept], x[:kept])
        assert not merged[key][kept:].any()
    again, tok = load_export(tmp_path / "hf"), load_export_tokenizer(tmp_path / "hf")
    ids = tok("hello </s>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits) and again(ids).logits.shape[-1] == rows


@pytest.mark.parametrize("rows", [299, 385])
def test_rows_that_the_shards_cannot_hold_are_named(exported, tmp_path, rows):
    save(exported, "mamba2", tmp_path / "hf", rows)
    with pytest.raises(CheckpointError, match=rf"{rows} rows.* 300 tokens .*resize_token_embeddings\(384\)"):
        from_hf(tmp_path / "hf", tmp_path / "step_0")


def test_no_limit_of_length_and_no_bos(exported, tmp_path):
    """lm-eval reads `max_position_embeddings`, and starts an empty context from bos."""
    config = exported("mamba2").load().config
    assert config.max_position_embeddings == 1 << 20 and config.training_length == 128
    model = exported("mamba2").load()
    assert model.config.bos_token_id is None and model.generation_config.bos_token_id is None
    with pytest.raises(ValueError, match="bos_token_id"):
        model.generate(max_new_tokens=4)


def test_an_old_export_still_converts(exported, merged_of, tmp_path):
    """Without the fields that came later, the length is `max_position_embeddings` and the rows are as they are."""
    case = exported("gdn")
    saved = tmp_path / "old"
    case.load().save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    for name in ("training_length", "tokenizer_size"):
        del config[name]
    (saved / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    (saved / "tokenizer.model").write_bytes((case.directory / "tokenizer.model").read_bytes())
    merged, layout = load_merged(from_hf(saved, tmp_path / "step_0"))
    assert (layout.seq_len, layout.vocab_size) == (64, 384)
    assert all(torch.equal(merged[key], x) for key, x in merged_of("gdn").items())
