"""Conversions on a file system that is really full: one line, exit code 1 or 2, nothing half written."""

import errno
import shutil
from pathlib import Path

import pytest

from megatron_dla.cli import main
from megatron_dla.hf.directory import TOKENIZER_JSON
from megatron_dla.hf.fast_tokenizer import write_tokenizer

OLD = Path(__file__).parents[1] / "fixtures/62bb8a7"
COMMANDS = {
    "to-hf": ["to-hf", OLD / "trained/gdn"],
    "from-hf": ["from-hf", OLD / "export"],
    "adapter": ["adapter", OLD / "adapter", "--format", "safetensors"],
    "upstream": ["adapter", OLD / "adapter", "--format", "upstream"],
}


def fill(disk: Path, left: int) -> Path:
    """A file that leaves `left` bytes of the disk free."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return filler


@pytest.mark.parametrize("command", COMMANDS)
def test_a_conversion_that_does_not_fit_is_one_line_and_leaves_nothing(disk, tmp_path, capsys, command) -> None:
    words, source, *options = COMMANDS[command]
    argv = ["convert", words, str(source)]
    assert main([*argv, str(tmp_path / "whole"), *options]) == 0
    files = [path for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    room = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
    for share in (0, 0.1, 0.4, 0.7, 0.9):
        filler = fill(disk, int(share * room))
        capsys.readouterr()
        code = main([*argv, str(disk / "out"), *options])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dla convert:")]
        assert code != 0 and len(lines) == 1 and "No space left" in lines[0] and str(disk) in lines[0], (share, lines)
        assert {path.name for path in disk.iterdir()} <= {"filler", "out"}  # no temporary directory
        assert not [path for path in (disk / "out").rglob("*") if path.is_file()], share
        shutil.rmtree(disk / "out", ignore_errors=True)
        filler.unlink()
    assert main([*argv, str(disk / "out"), *options]) == 0


def test_a_tokenizer_that_does_not_fit_names_its_file(disk, tokenizer) -> None:
    """The package tokenizers raises no OSError."""
    (disk / "out").mkdir()
    fill(disk, 8192)  # for tokenizer_config.json
    with pytest.raises(OSError, match="No space left") as caught:
        write_tokenizer(disk / "out", tokenizer.path, 384)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(disk / "out" / TOKENIZER_JSON))
