"""`dla convert to-hf --plain`: a model without DLA layers as transformers' own, there and back."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dla.checkpoint.weights import load_merged
from megatron_dla.config import ModelSection
from megatron_dla.errors import CheckpointError, UserError
from megatron_dla.hf.convert import from_hf
from megatron_dla.hf.load import load_export_tokenizer
from megatron_dla.hf.plain import to_plain

LLAMA = ModelSection(
    hidden_size=32, num_layers=2, num_heads=4, num_groups=1, key_dim=8, value_dim=8, ffn_hidden_size=48, pattern="A",
    attention_heads=4, attention_groups=2, init_std=0.1, vocab_multiple=128, rope_theta=10_000.0,
)  # fmt: skip
FAMILIES = {
    "llama": LLAMA,
    "qwen3": replace(LLAMA, qk_norm=True, attention_head_dim=12, tie_embeddings=True),
    "smollm3": replace(LLAMA, pattern="AN"),
    "mistral": replace(LLAMA, pattern="W", sliding_window=9),
    "qwen3, windows": replace(LLAMA, pattern="WA", qk_norm=True, sliding_window=6),
}
TEXTS = ["hello", "the quick brown fox", "  two  spaces\nand\tlines 12345", "caf\xe9 \U0001f600"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_tokens_and_the_way_back(saved, tokenizer, tmp_path, family):
    ours, step = saved(FAMILIES[family], tmp_path / "run")
    out = to_plain(step, tmp_path / "plain")
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    assert theirs.config.model_type == family.split(",")[0]
    ids = torch.randint(0, tokenizer.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids, None, None), rtol=1e-5, atol=1e-5)
    fast = AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        assert fast(text, add_special_tokens=False).input_ids == tokenizer.encode(text), text
        assert fast.decode(tokenizer.encode(text)) == text
    merged, layout = load_merged(from_hf(out, tmp_path / "back" / "step_0", 2))
    want, _ = load_merged(step)
    assert merged.keys() == want.keys() and all(torch.equal(merged[key], x) for key, x in want.items())
    shards = hashlib.sha256((out / "tokenizer.model").read_bytes()).hexdigest()
    assert layout.tokenizer_sha256 == shards == tokenizer.sha256  # `dla train` resumes with the same shards


def test_what_is_refused(saved, tmp_path):
    _, step = saved(LLAMA, tmp_path / "run")
    out = to_plain(step, tmp_path / "plain")
    with pytest.raises(UserError, match="exists"):
        to_plain(step, out)
    assert to_plain(step, out, overwrite=True) == out
    with pytest.raises(CheckpointError, match="model of type llama, not an export of DLA layers"):
        load_export_tokenizer(out)
    before = sorted(Path(out).iterdir())
    _, dla = saved(replace(LLAMA, pattern="AD"), tmp_path / "run")
    with pytest.raises(CheckpointError, match="has DLA layers"):
        to_plain(dla, out, overwrite=True)
    _, mixed = saved(replace(LLAMA, pattern="AW"), tmp_path / "run")
    with pytest.raises(CheckpointError, match="sliding window beside others and no qk_norm"):
        to_plain(mixed, out, overwrite=True)
    _, bare = saved(replace(LLAMA, ffn_hidden_size=0), tmp_path / "run")
    with pytest.raises(CheckpointError, match="ffn_hidden_size = 0"):
        to_plain(bare, out, overwrite=True)
    assert sorted(Path(out).iterdir()) == before
