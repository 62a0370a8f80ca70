"""A seed gives the weights that it always gave; names, order and cuts of the parameters stay, too."""

import dataclasses
import hashlib

import pytest
import torch

from megatron_dla import compat
from megatron_dla.config import ModelSection, ParallelSection
from megatron_dla.model.gpt import build_model
from megatron_dla.parallel.groups import initialize_distributed, initialize_model_parallel
from megatron_dla.parallel.tags import get_tag

compat.install()
BASE = ModelSection(
    hidden_size=32, num_layers=3, num_heads=4, num_groups=2, key_dim=8, value_dim=12, capacity=3, ffn_hidden_size=48,
    attention_heads=4, attention_groups=2, vocab_multiple=8,
)  # fmt: skip
LEARNED = {"tau_mode": "learned", "slot_weight_init": "log_linear", "tie_embeddings": True}
# Made by commit 62bb8a7: PYTHONPATH=. python tests/model/test_initial_values.py in a worktree of it.
CASES: dict[str, tuple[dict, str]] = {
    "mamba2": ({}, "b926618b05d70856a8fc76c89d5c2ef51e65d7946f3bf90f45a7e34dd77661f6"),
    "gdn": ({"backbone": "gdn"} | LEARNED, "4420ac232c4f650c178acd4a7949d2b81ea4134ce6bbde98e73208b4d2ac5b19"),
    "hybrid": (
        {"backbone": "gdn", "pattern": "DAN", "qk_norm": True},
        "4b16644803ab92ec81a2e34fda90f4a6c8ac4f7b793b36163163678fe2f07922",
    ),
}


def digest(change: dict) -> str:
    """sha256 over name, shape, dtype, tag and bytes of every parameter, in the module's order."""
    initialize_distributed("cpu")
    initialize_model_parallel(1, 1)
    section = dataclasses.replace(BASE, **change)
    model = build_model(section, ParallelSection(), vocab_size=60, seq_len=16, seed=5)
    done = hashlib.sha256()
    for name, p in model.named_parameters():
        tag = get_tag(p)
        done.update(f"{name} {tuple(p.shape)} {p.dtype} {tag.kind} {tag.dim} {tag.sections} ".encode())
        done.update(p.detach().contiguous().numpy().tobytes())
    return done.hexdigest()


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch's normal and log round differently without AVX2, and the hashes are of its arithmetic",
)
@pytest.mark.parametrize("name", CASES)
def test_a_seed_gives_the_same_model(name: str) -> None:
    change, want = CASES[name]
    assert digest(change) == want


if __name__ == "__main__":
    for name, (change, _) in CASES.items():
        print(name, digest(change))
