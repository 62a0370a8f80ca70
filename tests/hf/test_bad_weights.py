"""Weights that are not finite, no floats, or transposed: the tensor is named in one line, and nothing is written."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dla.checkpoint.integrity import seal
from megatron_dla.checkpoint.weights import weight_file
from megatron_dla.cli import main


def with_value(value: float):
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.view(-1)[3] = value
        return x

    return change


CHANGES = {
    "nan": with_value(torch.nan),
    "infinite": with_value(-torch.inf),
    "integers": lambda x: x.to(torch.int64),
    "complex": lambda x: x.to(torch.complex64),
    "transposed": lambda x: x.T.contiguous(),
}
NAME = "model.layers.1.mixer.in_proj.weight"
TRAINED_NAME = "decoder.layers.1.self_attention.in_proj.weight"


def damage(file: Path, name: str, change) -> None:
    state = load_file(file)
    state[name] = change(state[name])
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("command", ["generate", "from-hf", "to-hf"])
def test_the_tensor_is_named(
    exported, tmp_path: Path, capsys: pytest.CaptureFixture, command: str, change: str
) -> None:
    one, out = exported("mamba2"), tmp_path / "out"
    if command == "to-hf":
        source = tmp_path / "run/checkpoints/step_3"
        shutil.copytree(one.checkpoint, source)
        shutil.copy(one.checkpoint.parents[1] / "tokenizer.model", tmp_path / "run")
        damage(source / weight_file(0), TRAINED_NAME, CHANGES[change])
        (source / "complete.json").unlink()
        seal(source, {"step": 3})
    else:
        source = tmp_path / "hf"
        shutil.copytree(one.directory, source)
        damage(source / "model.safetensors", NAME, CHANGES[change])
    capsys.readouterr()
    arguments = (
        ["generate", str(source), "--prompt", "x"] if command == "generate" else ["convert", command, str(source)]
    )
    assert main([*arguments, *([] if command == "generate" else [str(out)])]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and str(source) in printed.err, printed
    assert NAME in printed.err or TRAINED_NAME in printed.err, printed
    assert printed.out == "" and not out.exists()
