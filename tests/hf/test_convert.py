"""Conversion: exact both ways, the same at every tensor-parallel size, free of Megatron, and clear when it fails."""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dla.checkpoint.find import resolve_checkpoint
from megatron_dla.checkpoint.weights import CheckpointLayout, load_merged, parameter_tags
from megatron_dla.errors import CheckpointError, ConfigError, UserError
from megatron_dla.hf import mapping
from megatron_dla.hf.cli import add_convert_parser
from megatron_dla.hf.code_files import code_files
from megatron_dla.hf.convert import from_hf, to_hf
from megatron_dla.hf.load import load_export
from megatron_dla.hf.section import read_section
from megatron_dla.hf.verify import verify, verify_logits
from megatron_dla.mixers.layout import FP32_PARAMETERS
from megatron_dla.model.parameters import model_parameters
from megatron_dla.serving.cli import add_generate_parser
from tests.support.exports import RECURRENT

ROOT = Path(__file__).parents[2]


def file_hashes(directory: Path) -> dict[str, str]:
    """File name -> sha256 of everything in a directory."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir()) if p.is_file()}


BLOCK = "import sys\nfor name in {names}: sys.modules[name] = None\n"


@pytest.mark.parametrize("name", RECURRENT)
def test_tags_without_megatron(exported, name):
    case = exported(name)
    assert mapping.parameter_tags(case.section) == parameter_tags(case.megatron)


@pytest.mark.parametrize("name", RECURRENT)
def test_export_does_not_depend_on_the_shards(exported, merged_of, tokenizer, tmp_path, name, write_checkpoint):
    case = exported(name)
    step = write_checkpoint(merged_of(name), case.section, tmp_path / "step_3", tokenizer.sha256, tensor_parallel=2)
    out = to_hf(step, tmp_path / case.directory.name, tokenizer=tokenizer.path)
    assert file_hashes(out) == file_hashes(case.directory)


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("size", [1, 2])
def test_round_trip_is_exact(exported, merged_of, tmp_path, name, size):
    case = exported(name)
    merged, layout = load_merged(from_hf(case.directory, tmp_path / "step_0", size))
    assert merged.keys() == merged_of(name).keys()
    assert all(torch.equal(merged[key], x) for key, x in merged_of(name).items())
    want = CheckpointLayout.load(case.checkpoint)
    assert replace(layout.model, pattern=want.model.pattern) == want.model
    assert (layout.vocab_size, layout.seq_len, layout.tokenizer_sha256) == (384, 128, want.tokenizer_sha256)
    assert layout.tensor_parallel == size
    for field in ("tensor_parallel", "vocab_size", "seq_len"):
        with pytest.raises(ValueError, match=f"{field} is 0"):
            replace(layout, **{field: 0}).check_types()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("model.norm.weight"), r"model\.norm\.weight is missing from the weights"),
        (lambda x: x.update(more=torch.ones(2)), "more is in the weights and has no place"),
        (lambda x: x.update({"model.norm.weight": torch.ones(7)}), r"model\.norm\.weight has shape \[7\]"),
    ],
    ids=["missing", "left over", "another shape"],
)
def test_an_export_is_loaded_whole_or_not_at_all(exported, tmp_path, change, message):
    shutil.copytree(exported("gdn").directory, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_export(tmp_path / "hf")


def test_an_export_has_the_mode_that_the_umask_gives(exported, tmp_path):
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in exported("gdn").directory.iterdir() if path.is_file()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_every_key_has_one_place(exported, merged_of):
    section, merged = exported("gdn_hybrid").section, merged_of("gdn_hybrid")
    state = mapping.to_hf_names(merged, section)
    with pytest.raises(CheckpointError, match=r"final_layernorm\.weight is missing"):
        mapping.to_hf_names({k: x for k, x in merged.items() if "final" not in k}, section)
    with pytest.raises(CheckpointError, match=r"self_attention\.extra has no place"):
        mapping.to_hf_names(merged | {"decoder.layers.0.self_attention.extra": torch.ones(1)}, section)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        mapping.from_hf_names({k: x for k, x in state.items() if k != "model.norm.weight"}, section)
    with pytest.raises(CheckpointError, match="more has no place"):
        mapping.from_hf_names({**state, "more": torch.ones(1)}, section)


def test_dtype(exported, tmp_path):
    out = to_hf(exported("gdn_hybrid").checkpoint, tmp_path / "bf16", dtype="bf16")
    for name, x in load_file(out / "model.safetensors").items():
        fp32 = name.rsplit(".", 1)[-1] in FP32_PARAMETERS
        assert x.dtype == (torch.float32 if fp32 else torch.bfloat16), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="dtype = 'fp8'"):
        to_hf(exported("gdn").checkpoint, tmp_path / "x", dtype="fp8")


def run_python(code: str, names: tuple[str, ...], cwd: Path, cache: Path) -> str:
    """Output of `code` in a fresh interpreter in which the packages `names` cannot be imported."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    env |= {"HF_MODULES_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    code = BLOCK.format(names=names) + code
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_export_needs_no_megatron(exported, tmp_path):
    case = exported("mamba2")
    code = f"""
sys.path.insert(0, {str(ROOT)!r})
from megatron_dla.hf.convert import to_hf, from_hf
out = to_hf({str(case.checkpoint)!r}, {str(tmp_path / case.directory.name)!r})
from_hf(out, {str(tmp_path / "step_0")!r})
"""
    run_python(code, ("megatron", "deepspeed", "triton"), tmp_path, tmp_path / "modules")
    assert file_hashes(tmp_path / case.directory.name) == file_hashes(case.directory)


def test_exported_directory_stands_alone(exported, tmp_path):
    case = exported("gdn_hybrid")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        save_file({"logits": case.load()(ids).logits}, tmp_path / "want.safetensors")
    code = f"""
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(case.directory)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(case.directory)!r}, trust_remote_code=True)
with torch.no_grad():
    logits = model(torch.arange(3, 40)[None]).logits
torch.testing.assert_close(logits, load_file("want.safetensors")["logits"], rtol=0, atol=1e-5)
ids = tokenizer(["hello", "hello world"], padding=True, return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**ids, max_new_tokens=4)))
"""
    blocked = ("megatron", "megatron_dla", "deepspeed", "triton")
    assert "hello" in run_python(code, blocked, tmp_path, tmp_path / "modules")


def test_exported_code_is_complete():
    assert {"modeling_dla.py", "layers_dla.py", "attention.py", "functional.py", "cache.py"} <= set(code_files())
    assert "naive.py" not in code_files()  # the float64 oracle is for tests


def test_wrong_or_absent_tokenizer(exported, merged_of, tokenizer, tmp_path, write_checkpoint):
    case = exported("gdn")
    other = tmp_path / "tokenizer.model"
    other.write_bytes(tokenizer.path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="vocabulary mismatch") as error:
        to_hf(case.checkpoint, tmp_path / "out", tokenizer=other)
    assert str(other) in str(error.value) and tokenizer.sha256 in str(error.value) and "--tokenizer" in str(error.value)
    step = write_checkpoint(merged_of("gdn"), case.section, tmp_path / "a" / "b" / "step_1", tokenizer.sha256)
    with pytest.raises(CheckpointError, match="no tokenizer here"):
        to_hf(step, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_incomplete_checkpoints_and_run_directories(exported, merged_of, tokenizer, tmp_path, write_checkpoint):
    case = exported("gdn")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    steps = tmp_path / "checkpoints"
    steps.mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        resolve_checkpoint(tmp_path / "nowhere")
    for step in (2, 10, 30):
        write_checkpoint(merged_of("gdn"), case.section, steps / f"step_{step}", tokenizer.sha256, step=step)
    (steps / "step_30" / "complete.json").unlink()
    assert resolve_checkpoint(tmp_path) == steps / "step_10"
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        to_hf(steps / "step_30", tmp_path / "out")
    assert "for 10 steps" in (to_hf(tmp_path, tmp_path / "out") / "README.md").read_text()


def test_existing_output(exported, tmp_path):
    case = exported("gdn")
    out = to_hf(case.checkpoint, tmp_path / "out")
    (out / "stale").write_text("")
    with pytest.raises(UserError, match="exists: choose another directory"):
        to_hf(case.checkpoint, out)
    to_hf(case.checkpoint, out, overwrite=True)
    assert not (out / "stale").exists() and not list(tmp_path.glob(".out*"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not an earlier export"):
        to_hf(case.checkpoint, mine, overwrite=True)
    with pytest.raises(UserError, match="exists") as error:
        from_hf(out, mine)
    assert "--overwrite" not in str(error.value)  # which `from-hf` does not have


def test_from_hf_refuses_what_it_cannot_read(exported, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        from_hf(tmp_path, tmp_path / "out")
    for damage, words in (
        ({"model_type": ["dla"]}, r"config\.json.*model_type = \['dla'\]"),
        ({"model_type": "llama", "architectures": 3}, r"config\.json.*architectures = 3"),
        ({"model_type": "llama", "architectures": [None]}, r"config\.json.*architectures = \[None\]"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(damage))
        with pytest.raises(CheckpointError, match=words):
            from_hf(tmp_path, tmp_path / "step_0")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match=r"model_type = gpt2 .* is not supported: use a model of one of Llama"):
        from_hf(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"parallel\.tensor"):
        from_hf(exported("gdn").directory, tmp_path / "out", 3)


def test_verify(exported, tmp_path, capsys):
    case = exported("gdn_hybrid")
    report = verify(case.checkpoint.parent.parent, case.directory, tokens=110)
    assert report.same_argmax == 1 and report.max_difference <= 1e-4 and "110 tokens" in capsys.readouterr().out
    # an fp32 difference alone is not held against the export: float64 decides
    report = verify(case.checkpoint, case.directory, tokens=110, tolerance=1e-9)
    assert report.dtype == "float64" and report.worst <= 1e-9
    broken = to_hf(case.checkpoint, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["model.layers.0.mixer.in_proj.weight"] *= 1.01
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.0\.mixer\.in_proj"):
        verify(case.checkpoint, broken, weights_only=True)
    with pytest.raises(UserError, match=r"by \d"):
        verify_logits(case.checkpoint, broken, 1e-4, 110)
    state["model.norm.weight"][0] = torch.nan
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight has values that are not finite"):
        verify_logits(case.checkpoint, broken, 1e-4, 110)
    with pytest.raises(CheckpointError, match="not a Hugging Face model directory"):
        verify(case.checkpoint, tmp_path / "nothing")


def test_verify_says_that_weights_were_rounded(exported, tmp_path, capsys):
    case = exported("gdn")
    for dtype, rounded in (("fp32", False), ("bf16", True)):
        verify(case.checkpoint, to_hf(case.checkpoint, tmp_path / dtype, dtype=dtype), weights_only=True)
        assert ("bfloat16" in capsys.readouterr().out) == rounded


def test_a_model_saved_without_its_tokenizer(exported, tmp_path):
    case = exported("gdn")
    saved = shutil.copytree(case.directory, tmp_path / "saved")
    for name in ("tokenizer.model", "tokenizer.json"):
        (saved / name).unlink()
    for command in (lambda: from_hf(saved, tmp_path / "out"), lambda: verify(case.checkpoint, saved)):
        with pytest.raises(CheckpointError, match=r"saved' has no tokenizer\.json and no tokenizer\.model: save the"):
            command()
    assert not (tmp_path / "out").exists()


def test_verify_attention_of_other_shapes(exported):
    case = exported("shaped_attention")
    assert verify(case.checkpoint, case.directory, tokens=110).worst <= 1e-4
    assert mapping.parameter_tags(case.section) == parameter_tags(case.megatron)


def test_first_exports_are_still_read(exported, tmp_path):
    case = exported("gdn_hybrid")
    config = json.loads((case.directory / "config.json").read_text())
    added = {"attention_head_dim", "qk_norm"} | {key for key in config if key.startswith("rope_")} - {"rope_theta"}
    assert len(added) == 7 and added <= config.keys()
    (tmp_path / "config.json").write_text(json.dumps({key: x for key, x in config.items() if key not in added}))
    assert read_section(tmp_path)[0] == read_section(case.directory)[0]


def run_cli(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    add_convert_parser(subparsers)
    add_generate_parser(subparsers)
    args = parser.parse_args(argv)
    return args.func(args)


def test_command_line(exported, tmp_path, capsys):
    case = exported("mamba2")
    out, back = str(tmp_path / "out"), str(tmp_path / "step_0")
    assert run_cli("convert", "to-hf", str(case.checkpoint), out, "--dtype", "fp32") == 0
    assert run_cli("convert", "from-hf", out, back, "--tensor-parallel", "2") == 0
    assert run_cli("convert", "verify", str(case.checkpoint), out, "--tokens", "70") == 0
    assert run_cli("generate", out, "--prompt", "hello", "--max-new-tokens", "5", "--device", "cpu") == 0
    text, stats = capsys.readouterr()
    assert "hello" in text and "5 tokens" in stats and "MB" in stats


def test_an_export_in_several_files_is_the_same_model(exported, tmp_path):
    """Also read back, as a checkpoint, and compared weight by weight; a bf16 export equals the rounded checkpoint."""
    case = exported("gdn_hybrid")
    several = to_hf(case.checkpoint, tmp_path / "several", max_file_bytes=40_000)
    index = json.loads((several / "model.safetensors.index.json").read_text())
    files = sorted(several.glob("*.safetensors"))
    assert len(files) > 2 and {path.name for path in files} == set(index["weight_map"].values())
    one, held = load_file(case.directory / "model.safetensors"), {}
    for path in files:
        part = load_file(path)
        assert len(part) == 1 or sum(x.nbytes for x in part.values()) <= 40_000
        held |= part
    assert held.keys() == one.keys() and all(torch.equal(held[name], one[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in one.values())
    assert verify(case.checkpoint, several, weights_only=True) is None
    assert verify(case.checkpoint, to_hf(case.checkpoint, tmp_path / "b", dtype="bf16"), weights_only=True) is None
    back = load_merged(from_hf(several, tmp_path / "step_0"))[0]
    assert all(torch.equal(x, back[key]) for key, x in load_merged(case.checkpoint)[0].items())


PEAK = """
import resource, sys
from pathlib import Path
from megatron_dla.hf.convert import from_hf, to_hf
from megatron_dla.hf.verify import verify

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large, out = map(Path, sys.argv[1:])
to_hf(small, out / "small")
from_hf(out / "small", out / "back" / "small")
verify(small, out / "small")
start = peak()
to_hf(large, out / "large", max_file_bytes=40_000_000)
print(peak() - start)
verify(large, out / "large", weights_only=True)
print(peak() - start)
from_hf(out / "large", out / "back" / "large", 4)
print(peak() - start)
verify(large, out / "large", tokens=64)
print(peak() - start)
"""


@pytest.mark.long
def test_conversion_holds_a_few_tensors_in_memory(exported, write_checkpoint, tokenizer, tmp_path):
    """150 MB of weights from two ranks' files into files of 40 MB, and back; the largest tensor has 17 MB."""
    small = exported("mamba2")
    section = replace(small.section, hidden_size=1024, ffn_hidden_size=2048, num_layers=4, num_heads=8, value_dim=128)
    table, tags, merged = model_parameters(section, 384), mapping.parameter_tags(section), {}
    for name, spec in table.items():
        merged |= zip(tags[name].keys(name), tags[name].split(torch.randn(spec.shape)), strict=True)
    run = tmp_path / "run" / "checkpoints" / "step_3"
    large = write_checkpoint(merged, section, run, tokenizer.sha256, 2)
    (tmp_path / "run" / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    total = sum(x.nbytes for x in merged.values())
    largest = max(math.prod(spec.shape) for spec in table.values()) * 4
    command = [sys.executable, "-c", PEAK, str(small.checkpoint), str(large), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    slack = 20_000_000  # of the allocator
    assert total > 120_000_000, total
    *converting, verifying = peaks
    assert len(converting) == 3 and max(converting) < 4 * largest + slack, (peaks, largest)
    assert verifying < 1.2 * total + largest + slack, (verifying, total)  # the logits, by one model after the other
