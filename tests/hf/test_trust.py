"""Code that lies beside an export runs only where it is asked for."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_dla.cli import main
from megatron_dla.hf.load import load_export_tokenizer

OLD = Path(__file__).parents[1] / "fixtures/62bb8a7"
GENERATE = ["--prompt", "hello", "--max-new-tokens", "2"]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """An old export in which every file of code leaves a mark when it is imported."""
    made = tmp_path / "hostile_export"
    shutil.copytree(OLD / "export", made)
    mark = f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)\n"
    for path in made.glob("*.py"):
        path.write_text(path.read_text().replace("from __future__ import annotations\n", "", 1) + "\n" + mark)
    (made / "evil.py").write_text(mark)
    (made / "custom_generate").mkdir()
    (made / "custom_generate/generate.py").write_text(mark + "def generate(*args, **kwargs): ...\n")
    return made


def test_generate_and_verify_run_the_code_of_the_package(hostile: Path, tmp_path: Path, capsys) -> None:
    mark = tmp_path / "ran"
    assert main(["generate", str(hostile), *GENERATE]) == 0 and not mark.exists()
    config = json.loads((hostile / "config.json").read_text())
    for target in ("evil.Evil", "someone/evil--evil.Evil"):
        changed = config | {"auto_map": {"AutoConfig": target, "AutoModelForCausalLM": target}}
        (hostile / "config.json").write_text(json.dumps(changed))
        assert main(["generate", str(hostile), *GENERATE]) == 0 and not mark.exists()
    (hostile / "config.json").write_text(json.dumps(config))
    assert main(["convert", "verify", str(OLD / "trained/gdn"), str(hostile), "--tokens", "8"]) == 0
    assert not mark.exists()
    main(["generate", str(hostile), *GENERATE, "--trust-remote-code"])
    assert mark.exists()


def test_an_old_export_gets_a_tokenizer_without_its_code() -> None:
    ours, theirs = load_export_tokenizer(OLD / "export"), load_export_tokenizer(OLD / "export", trust_remote_code=True)
    for text in ("hello world", "  two  spaces\n\ttab", "caf\xe9 \U0001f600", "The quick brown fox."):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == text
