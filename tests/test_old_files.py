"""Files that commit 62bb8a7 wrote (tests/fixtures/make_62bb8a7.py) are read as that commit read them.

Tensors that are only stored, cut or renamed must be equal bit for bit. What is computed may differ in the last bits:
another CPU takes other vector instructions, and with them another order of summation. The differences between
instruction sets measured on these models are below 2e-6 of the largest logit; TOLERANCE is 5 times that, which is still
far below the effect of any wrong weight.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dla import compat
from megatron_dla.checkpoint.weights import CheckpointLayout, load_merged
from megatron_dla.cli import main
from megatron_dla.config import load_config
from megatron_dla.errors import CheckpointError
from megatron_dla.hf.adapter import read_any_adapter
from megatron_dla.hf.convert import to_hf
from megatron_dla.hf.load import load_export, load_tokenizer
from megatron_dla.hf.section import read_section
from megatron_dla.serving.load import load_adapted
from megatron_dla.serving.session_file import load_session
from tests.support import train_workers

ROOT = Path(__file__).resolve().parents[1]
OLD = ROOT / "tests/fixtures/62bb8a7"
EXPECTED = load_file(OLD / "expected.safetensors")
LOSSES = json.loads((OLD / "expected.json").read_text())["losses"]
PROCESSES = {"gdn": 1, "mamba2": 2, "adapter": 1}
TOLERANCE = 1e-5
pytestmark = pytest.mark.usefixtures("modules_cache")
compat.install()


def step(name: str) -> Path:
    return OLD / "trained" / name / "checkpoints" / "step_3"


def assert_close(found: torch.Tensor, name: str) -> None:
    wanted = EXPECTED[name]
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE * wanted.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("name", ["gdn", "mamba2"])
def test_checkpoint_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    from megatron_dla.hf.verify import megatron_logits, megatron_model

    ids = EXPECTED[f"{name}.ids"]
    assert_close(megatron_logits(megatron_model(step(name))[0], ids)[:, ::8], f"{name}.megatron")
    assert_close(load_export(to_hf(step(name), tmp_path / name))(ids).logits[:, ::8], f"{name}.export")


def test_checkpoint_exports_to_the_same_tensors(tmp_path: Path) -> None:
    new, old = (load_file(path / "model.safetensors") for path in (to_hf(step("gdn"), tmp_path / "hf"), OLD / "export"))
    assert new.keys() == old.keys() and all(torch.equal(new[key], old[key]) for key in old)


@torch.no_grad()
def test_export_loads_in_this_process() -> None:
    assert_close(load_export(OLD / "export")(EXPECTED["gdn.ids"]).logits[:, ::8], "gdn.export")


def test_export_loads_with_its_own_code_alone(tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("megatron", "megatron_dla", "deepspeed", "triton"):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained({str(OLD / "export")!r}, trust_remote_code=True)
with torch.no_grad():
    logits = model(load_file({str(OLD / "expected.safetensors")!r})["gdn.ids"]).logits
save_file({{"logits": logits[:, ::8].contiguous()}}, "logits.safetensors")
"""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=200)
    assert_close(load_file(tmp_path / "logits.safetensors")["logits"], "gdn.export")


def test_export_converts_back_to_the_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "step_0"
    assert main(["convert", "from-hf", str(OLD / "export"), str(out), "--tensor-parallel", "2"]) == 0
    (new, layout), (old, wanted) = load_merged(out), load_merged(step("gdn"))
    assert new.keys() == old.keys() and all(torch.equal(new[key], old[key]) for key in old)
    assert layout.model == wanted.model == read_section(OLD / "export")[0]
    assert (layout.vocab_size, layout.tokenizer_sha256) == (wanted.vocab_size, wanted.tokenizer_sha256)


@pytest.mark.parametrize("name", PROCESSES)
def test_config_is_read(name: str) -> None:
    """The file that the user wrote and the resolved one of the run directory, with the keys of that time."""
    written, resolved = (load_config(OLD / path) for path in (f"{name}.yaml", f"trained/{name}/config.yaml"))
    assert written == resolved
    assert (written.training.steps, written.training.save_every) == (5, 3)


@pytest.mark.parametrize("name", PROCESSES)
def test_run_resumes_with_the_same_losses(ranks, name: str, tmp_path: Path) -> None:
    """Steps 4 and 5 after the checkpoint of step 3: weights, optimizer state, schedule and data position."""
    run = tmp_path / "run"
    shutil.copytree(OLD, run)
    metrics = ranks(PROCESSES[name]).run(train_workers.train_file, run, f"trained/{name}/config.yaml")[0]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    assert [m["loss"] for m in metrics[3:]] == pytest.approx(LOSSES[name], rel=TOLERANCE)
    kept = (OLD / "trained" / name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == metrics[:3]  # appended to, not trained again


@torch.no_grad()
def test_adapter_gives_the_same_logits() -> None:
    model, ids = load_adapted(OLD / "backbone", OLD / "adapter"), EXPECTED["adapter.ids"]
    assert_close(model(ids).logits[:, ::8], "adapter.logits")
    assert_close(model.base(ids).logits[:, ::8], "backbone.logits")
    assert (EXPECTED["adapter.logits"] - EXPECTED["backbone.logits"]).abs().max() > 0.1


def test_adapter_checkpoint_is_the_adapter() -> None:
    trained, written = read_any_adapter(OLD / "trained/adapter"), read_any_adapter(OLD / "adapter")
    assert (trained.config, trained.base) == (written.config, written.base)
    assert trained.tensors.keys() == written.tensors.keys()
    for layer, tensors in written.tensors.items():
        assert tensors.keys() == trained.tensors[layer].keys()
        assert all(torch.equal(trained.tensors[layer][name], x) for name, x in tensors.items())


def test_session_continues_with_the_same_logits() -> None:
    model = load_adapted(OLD / "backbone", OLD / "adapter")
    session = load_session(OLD / "session.safetensors", model, load_tokenizer(OLD / "backbone"))
    ids = EXPECTED["adapter.ids"][0].tolist()
    assert session.ids == ids[12:30] and session.tokens_seen == 30
    assert_close(session.append(ids[30:]), "session.logits")
    assert_close(torch.stack([session.states[layer].S for layer in sorted(session.states)]), "session.states")


def test_shards_are_read() -> None:
    assert main(["data", "verify", str(OLD / "data")]) == 0


def test_fixtures_stay_small() -> None:
    assert sum(path.stat().st_size for path in OLD.rglob("*") if path.is_file()) < 1_000_000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", "500000.0"), ("vocab_size", None), ("vocab_size", True), ("hidden_size", "x"),
        ("training_length", "64"), ("training_length", -1), ("tokenizer_size", 2.5),
    ],
)  # fmt: skip
def test_an_export_whose_config_has_another_type_is_refused(tmp_path: Path, key: str, value: object) -> None:
    config = json.loads((OLD / "export/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=f"config.json.*{key}"):
        read_section(tmp_path)


def test_an_export_without_any_length_is_refused(tmp_path: Path) -> None:
    config = json.loads((OLD / "export/config.json").read_text())
    lengths = {"training_length", "max_position_embeddings"} & config.keys()
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in config.keys() - lengths}))
    with pytest.raises(CheckpointError, match=r"config\.json.*max_position_embeddings"):
        read_section(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("adapter", ["base"]), ("adapter", {"base": {}}), ("shapes", 3), ("step", "3")]
)
def test_a_layout_with_another_type_is_refused(tmp_path: Path, key: str, value: object) -> None:
    step = OLD / "trained/gdn/checkpoints/step_3"
    layout = json.loads((step / "layout.json").read_text())
    (tmp_path / "complete.json").write_bytes((step / "complete.json").read_bytes())
    (tmp_path / "layout.json").write_text(json.dumps(layout | {key: value}))
    with pytest.raises(CheckpointError, match=f"layout.json.*{key}"):
        CheckpointLayout.load(tmp_path)
