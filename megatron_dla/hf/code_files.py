"""The source files of an exported directory. Imports neither config nor Megatron: `dla smoke` uses it without them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENTRY_FILES = ("modeling_dla", "configuration_dla")
# packages that hold the modules of an exported directory, first match wins
_SOURCES = ("megatron_dla.hf", "megatron_dla.kernels.dla", "megatron_dla.mixers", "megatron_dla.config")


def _folder(package: str) -> Path:
    """Of a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, package
    return Path(spec.submodule_search_locations[0])


def code_files() -> dict[str, Path]:
    """File name -> source of all code that an exported directory needs: the entry files and what they import.

    Raises:
        RuntimeError: a relative import has no source (a programming error).
    """
    found: dict[str, Path] = {}
    todo = list(ENTRY_FILES)
    while todo:
        name = todo.pop()
        if f"{name}.py" in found:
            continue
        if "." in name:
            raise RuntimeError(f"the exported code imports from .{name}: only files beside each other can be exported")
        path = next((path for package in _SOURCES if (path := _folder(package) / f"{name}.py").is_file()), None)
        if path is None:
            raise RuntimeError(f"the exported code imports .{name}, which is in none of {', '.join(_SOURCES)}")
        found[f"{name}.py"] = path
        # the rule by which transformers finds the files to fetch
        todo += re.findall(r"^\s*from\s+\.(\S+)\s+import", path.read_text(), flags=re.MULTILINE)
    return dict(sorted(found.items()))


@contextmanager
def current_code(hf_dir: Path) -> Iterator[Path]:
    """The exported directory, or, for one whose own code knows no newer release of transformers than 5.23 (it has no
    `releases.py`), a temporary one with the same files and the code of this version."""
    if (hf_dir / "releases.py").is_file() or not (hf_dir / "modeling_dla.py").is_file():
        yield hf_dir
        return
    with tempfile.TemporaryDirectory() as place:
        new = Path(place) / hf_dir.resolve().name  # transformers names the module after it
        new.mkdir()
        for path in hf_dir.resolve().iterdir():
            if path.suffix != ".py":
                (new / path.name).symlink_to(path)
        for name, path in code_files().items():
            shutil.copyfile(path, new / name)
        yield new
