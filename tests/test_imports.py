"""Imports run one way: no package of the project imports, directly or through others, a package that imports it."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "megatron_dla": ROOT / "megatron_dla",
    "megatron_dla.kernels": ROOT / "kernels",
    "megatron_dla.launch": ROOT / "launch",
    "megatron_dla.data_prep": ROOT / "data_prep",
}
Graph = dict[str, set[str]]


def find_modules() -> dict[str, Path]:
    """Module name -> file of the whole project."""
    found = {}
    for prefix, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


def imported_names(module: str, path: Path) -> Iterator[str]:
    """Absolute names that the file imports, inside functions too; not what only a type checker reads."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)
        todo += ast.iter_child_nodes(node)


def import_graph(modules: dict[str, Path]) -> Graph:
    """Module -> modules of the project that it imports."""
    graph: Graph = {}
    for module, path in modules.items():
        names = {name if name in modules else name.rpartition(".")[0] for name in imported_names(module, path)}
        graph[module] = {name for name in names if name in modules} - {module}
    return graph


def package_of(module: str, modules: dict[str, Path]) -> str:
    """The package of a module; the modules directly in `megatron_dla` (cli, errors, ...) count one by one."""
    package = module if modules[module].name == "__init__.py" else module.rpartition(".")[0]
    return module if package == "megatron_dla" else package


def by_package(graph: Graph, modules: dict[str, Path]) -> Graph:
    merged: Graph = {}
    for module, imports in graph.items():
        package = package_of(module, modules)
        merged.setdefault(package, set()).update({package_of(name, modules) for name in imports} - {package})
    return merged


def assert_no_circle(graph: Graph) -> None:
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


def test_no_import_circle_among_packages() -> None:
    modules = find_modules()
    graph = import_graph(modules)
    assert "megatron_dla.kernels.dla.cache" in graph["megatron_dla.kernels.dla.attention"]
    assert "megatron_dla.kernels.bench.cli" in graph["megatron_dla.cli"]  # inside a function
    assert_no_circle(graph)
    assert_no_circle(by_package(graph, modules))


def test_circles_are_found() -> None:
    assert_no_circle({"a": {"b"}, "b": {"c"}, "c": set()})
    with pytest.raises(pytest.fail.Exception, match="import circle: "):
        assert_no_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
