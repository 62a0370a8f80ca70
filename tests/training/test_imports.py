"""Which way imports run: tasks know the trainer, the trainer knows tasks by their interface alone."""

import ast
from pathlib import Path

import megatron_dla

PACKAGE = Path(megatron_dla.__file__).parent


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module or "")
            if node.level:  # the files that exports carry
                package = path.relative_to(PACKAGE.parent).parts[: -node.level]
                module = ".".join([*package, *filter(None, [module])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def uses(path: Path, *packages: str) -> set[str]:
    """Those of `packages` (or modules in them) that a file imports."""
    return {name for name in imported(path) if any(f"{name}.".startswith(f"{package}.") for package in packages)}


def files_of(package: str) -> list[Path]:
    files = sorted((PACKAGE / package).rglob("*.py"))
    assert PACKAGE / package / "__init__.py" in files
    return files


def test_the_trainer_does_not_know_the_tasks() -> None:
    files = sorted((PACKAGE / "training").glob("*.py"))
    assert {"trainer.py", "step.py", "task.py"} <= {path.name for path in files}
    found = {(path.name, name) for path in files for name in uses(path, "megatron_dla.adapters", "megatron_dla.tasks")}
    assert not found


def test_only_what_serves_or_evaluates_uses_the_serving_code() -> None:
    for package in ("adapters", "hf", "mixers", "model", "parallel", "checkpoint", "data", "training", "config"):
        for path in files_of(package):
            assert not uses(path, "megatron_dla.serving"), path


def test_the_memory_and_the_serving_code_do_not_know_the_tasks() -> None:
    for package in ("adapters", "mixers", "model", "parallel", "checkpoint", "data", "hf", "serving"):
        for path in files_of(package):
            assert not uses(path, "megatron_dla.tasks", "megatron_dla.training"), path
