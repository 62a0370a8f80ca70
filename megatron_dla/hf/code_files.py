"""The source files of an exported directory. Imports neither config nor Megatron: `dla smoke` uses it without them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dla.files import parse_json

AUTO_MAP = {
    "AutoConfig": "configuration_dla.DLAConfig",
    "AutoModel": "modeling_dla.DLAModel",
    "AutoModelForCausalLM": "modeling_dla.DLAForCausalLM",
    "AutoModelForSequenceClassification": "modeling_dla.DLAForSequenceClassification",
}
_DATA = (".json", ".safetensors")
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
def own_code(hf_dir: Path) -> Iterator[Path]:
    """A temporary directory with the data of an exported one and the code of this package: nothing that lies beside the
    data runs, whatever its config.json asks for. Raises OSError, ValueError."""
    with tempfile.TemporaryDirectory() as place:
        new = Path(place) / "dla_export"  # transformers names the module after it
        new.mkdir()
        for path in hf_dir.resolve().iterdir():
            if path.suffix in _DATA and path.is_file() and path.name != "config.json":
                (new / path.name).symlink_to(path)
        config = parse_json((hf_dir / "config.json").read_bytes())
        (new / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
        for name, path in code_files().items():
            shutil.copyfile(path, new / name)
        yield new
