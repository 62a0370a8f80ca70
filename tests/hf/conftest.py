"""Small models of every kind, built with Megatron at TP = 1, saved and exported once a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dla import compat
from megatron_dla.checkpoint.find import LAYOUT
from megatron_dla.checkpoint.integrity import seal
from megatron_dla.checkpoint.weights import CheckpointLayout, load_merged, split_merged, weight_file
from megatron_dla.config import ModelSection, ParallelSection
from megatron_dla.data_prep.tokenizer import Tokenizer, train_tokenizer
from megatron_dla.files import save_tensors
from megatron_dla.hf import mapping
from megatron_dla.hf.convert import to_hf
from megatron_dla.hf.load import load_export
from tests.support.exports import SECTIONS

WORDS = ["hello", "world", "the quick", " brown ", "fox\n", "\t12345", "caf\xe9", "x\u2581y", "\U0001f600", "</s>"]


@dataclass
class Exported:
    """One model in three shapes: Megatron module, step_N directory, exported directory."""

    section: ModelSection
    megatron: Any
    checkpoint: Path
    directory: Path

    def load(self, **kwargs: Any) -> Any:
        return load_export(self.directory, **kwargs)


@pytest.fixture(scope="session", autouse=True)
def use_modules_cache(modules_cache: None) -> None:
    """Every test here may load remote code."""


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "a.txt").write_text(" ".join(WORDS * 200))
    return train_tokenizer([directory / "a.txt"], directory, 300)


def randomise(model: torch.nn.Module) -> None:
    """Make every parameter its own: equal ones (norms, biases) would hide a mapping that confuses them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def write_weights(state: dict[str, torch.Tensor], directory: Path, rank: int) -> None:
    (directory / weight_file(rank)).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(state, directory / weight_file(rank))


def _write_checkpoint(
    merged: dict, section: ModelSection, directory: Path, sha256: str, tensor_parallel: int = 1, step: int = 3
) -> Path:
    """A step_N directory in `tensor_parallel` shards, as that many ranks would write it."""
    tags = mapping.parameter_tags(section, tensor_parallel)
    for rank in range(tensor_parallel):
        write_weights(split_merged(merged, tags, rank, tensor_parallel), directory, rank)
    CheckpointLayout(section, 384, sha256, tensor_parallel, 128, step, tags).save(directory / LAYOUT)
    seal(directory, {"step": step})
    return directory


@pytest.fixture(scope="session")
def write_checkpoint():
    """`write_checkpoint(merged, section, directory, sha256, tensor_parallel=1, step=3)`."""
    return _write_checkpoint


@pytest.fixture(scope="session")
def saved(tokenizer: Tokenizer):
    """`saved(section, run)`: (Megatron model, its step_3 directory in the run)."""
    compat.install()
    from megatron_dla.checkpoint.weights import parameter_tags
    from megatron_dla.model.gpt import build_model
    from megatron_dla.parallel.groups import initialize_distributed, initialize_model_parallel

    def make(section: ModelSection, run: Path) -> tuple[Any, Path]:
        initialize_distributed("cpu")
        initialize_model_parallel(1, 0)
        model = build_model(section, ParallelSection(), vocab_size=tokenizer.vocab_size, seq_len=128, seed=7).eval()
        randomise(model)
        step = run / "checkpoints" / "step_3"
        write_weights(dict(model.named_parameters()), step, 0)
        CheckpointLayout(section, 384, tokenizer.sha256, 1, 128, 3, parameter_tags(model)).save(step / LAYOUT)
        seal(step, {"step": 3})
        (run / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
        return model, step

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, saved):
    """`exported(name)`: the case of that name, built once."""
    made: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name in made:
            return made[name]
        section, run = SECTIONS[name], tmp_path_factory.mktemp(name)
        model, step = saved(section, run)
        made[name] = Exported(section, model, step, to_hf(step, run / f"hf_{name}"))
        return made[name]

    return get


@pytest.fixture(scope="session")
def merged_of(exported):
    """`merged_of(name)`: the layout-free tensors of a case."""
    return lambda name: load_merged(exported(name).checkpoint)[0]
