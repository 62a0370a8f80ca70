"""Launch configurations: built-in defaults, a file that overrides them, and nothing that changes by itself."""

import json
from pathlib import Path

import pytest
import torch

from megatron_dla.kernels.common import tuned

DEFAULT = {"num_warps": 8, "num_stages": 3, "BLOCK": 64}
SHAPE = {"dtype": torch.bfloat16, "dk": 64, "dv": 64, "capacity": 30}


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """One registered kernel, an empty directory of files, and a GPU by name only."""
    monkeypatch.setattr(tuned, "KERNELS", {})
    monkeypatch.setattr(tuned, "DIRECTORY", tmp_path)
    monkeypatch.setattr(tuned, "_slug", lambda device: None if str(device) == "cpu" else "nvidia-h200")
    tuned.register("output", DEFAULT, [{"num_warps": 4}, {"BLOCK": 128}], operation="forward")
    tuned.reload()
    yield
    tuned.reload()


def write(path: Path, **changes: object) -> None:
    entry = {"kernel": "output", "dtype": "bfloat16", "dk": 64, "dv": 64, "capacity": 30, "config": {"num_warps": 2}}
    path.write_text(json.dumps({"gpu": "NVIDIA H200", "entries": [{**entry, **changes}]}))
    tuned.reload()


def test_defaults_apply_without_a_file() -> None:
    assert tuned.launch_config("output", device="cuda", **SHAPE) == DEFAULT
    assert tuned.launch_config("output", device="cpu", **SHAPE) == DEFAULT
    assert tuned.launch_config("unregistered", device="cuda", **SHAPE) == tuned.FALLBACK


def test_a_file_overrides_what_it_names(tmp_path: Path) -> None:
    write(tmp_path / "nvidia-h200.json")
    assert tuned.launch_config("output", device="cuda", **SHAPE) == {**DEFAULT, "num_warps": 2}
    assert tuned.launch_config("output", device="cpu", **SHAPE) == DEFAULT


@pytest.mark.parametrize(
    "shape,applies",
    [
        ({"dk": 48}, True),  # padded to 64 too
        ({"dk": 128}, False),
        ({"capacity": 15}, True),
        ({"capacity": 31}, False),  # would need more than what was measured
        ({"dtype": torch.float32}, False),
    ],
)
def test_an_entry_serves_the_shapes_it_fits(tmp_path: Path, shape: dict, applies: bool) -> None:
    write(tmp_path / "nvidia-h200.json")
    found = tuned.launch_config("output", device="cuda", **(SHAPE | shape))
    assert (found["num_warps"] == 2) is applies


def test_the_answer_is_read_once_and_is_a_copy(tmp_path: Path) -> None:
    first = tuned.launch_config("output", device="cuda", **SHAPE)
    first["num_warps"] = 99
    (tmp_path / "nvidia-h200.json").write_text("{")  # not read again
    assert tuned.launch_config("output", device="cuda", **SHAPE) == DEFAULT


def test_names_that_the_kernel_no_longer_has_are_ignored(tmp_path: Path) -> None:
    write(tmp_path / "nvidia-h200.json", config={"num_warps": 2, "GONE": 1})
    assert tuned.launch_config("output", device="cuda", **SHAPE) == {**DEFAULT, "num_warps": 2}


@pytest.mark.parametrize("content", ["{", "{}", '{"entries": [{"kernel": "output"}]}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "nvidia-h200.json").write_text(content)
    with pytest.raises(ValueError, match=r"nvidia-h200.json.*--tune"):
        tuned.launch_config("output", device="cuda", **SHAPE)


def test_forced_holds_inside_its_block_only() -> None:
    with tuned.forced("output", {"num_warps": 1}):
        assert tuned.launch_config("output", device="cuda", **SHAPE) == {"num_warps": 1}
    assert tuned.launch_config("output", device="cuda", **SHAPE) == DEFAULT


def test_register_refuses_what_it_cannot_tune() -> None:
    with pytest.raises(ValueError, match="operation"):
        tuned.register("x", DEFAULT, operation="sideways")
    with pytest.raises(ValueError, match="TILE"):
        tuned.register("x", DEFAULT, [{"TILE": 3}], operation="forward")


SHIPPED = sorted((Path(tuned.__file__).parents[1] / "tuned").glob("*.json"))


@pytest.mark.skipif(not SHIPPED, reason="kernels/tuned has no file yet: none was tuned on a GPU")
def test_shipped_files_are_whole_and_say_where_they_come_from() -> None:
    for path in SHIPPED:
        facts = json.loads(path.read_text())
        assert tuned.load_entries(path) and {"gpu", "date", "torch", "triton", "command"} <= set(facts)


def test_gpu_slug() -> None:
    assert tuned.gpu_slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
