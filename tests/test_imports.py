"""Which room may import which, read from the source; and what must be quick to import is."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("infra", "pretrain", "curation", "evaluate", "pipeline")
ALLOWED = {
    "infra": set(),
    "pretrain": {"infra"},
    "curation": {"infra", "pretrain"},
    "evaluate": {"infra", "pretrain"},
    "pipeline": {"infra", "pretrain", "curation", "evaluate"},
}


def imports_of(path: Path) -> set[str]:
    """Full names of the modules a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("winnow", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def graph() -> dict[str, set[str]]:
    """Every module of the rooms, with those of the rooms that it imports."""
    paths = {module_name(path): path for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    edges = {}
    for name, path in paths.items():
        found = imports_of(path) & set(paths)
        # `from winnow.infra.io import storage` names the module; its package is not meant.
        packages = {package for package in found if any(other.startswith(f"{package}.") for other in found)}
        named = {alias for alias in packages if paths[alias].read_text().count("\n") > 3}
        edges[name] = (found - packages) | {package for package in named if _from_package(path, package, paths)}
    return edges


def _from_package(path: Path, package: str, paths: dict[str, Path]) -> bool:
    """Whether a file takes something of a package's own `__init__`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            return any(f"{package}.{alias.name}" not in paths for alias in node.names)
    return False


def circles(edges: dict[str, set[str]]) -> Iterator[list[str]]:
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> Iterator[list[str]]:
        if name in path:
            yield [*path[path.index(name) :], name]
        elif name not in done:
            for other in sorted(edges[name]):
                yield from walk(other, [*path, name])
            done.add(name)

    for name in sorted(edges):
        yield from walk(name, [])


def test_no_two_files_import_each_other():
    assert not [" -> ".join(circle) for circle in circles(graph())]


def test_a_circle_would_be_found():
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == [["b", "c", "b"]]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downwards(room):
    for path in (ROOT / room).rglob("*.py"):
        for name in imports_of(path):
            package, _, rest = name.partition(".")
            top = rest.split(".")[0]
            assert package not in ROOMS, f"{path.relative_to(ROOT)} imports {name} by its bare name"
            if package == "winnow" and top in ROOMS and top != room:
                assert top in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", ["curation", "evaluate"])
def test_models_come_through_the_one_door(room):
    for path in (ROOT / room).rglob("*.py"):
        for name in imports_of(path):
            inside = name.startswith("winnow.pretrain.") and not name.startswith("winnow.pretrain.encoder")
            assert not inside, f"{path.relative_to(ROOT)} imports {name}"


def test_an_install_holds_winnow_alone():
    packages = set(find_packages(str(ROOT), include=["winnow*"]))
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert packages == {"winnow", *(".".join(("winnow", *folder.relative_to(ROOT).parts)) for folder in folders)}


def test_reading_a_recipe_imports_nothing_heavy():
    code = (
        "import sys, winnow.pipeline.cli, winnow.pipeline.recipe.load; "
        "print(sorted({'torch', 'ray', 'faiss', 'open_clip', 'deepspeed', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_no_function_over_60_lines():
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_no_source_is_parsed():
    """Traits and parameters are read from classes, not from their text."""
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            assert "ast.parse" not in path.read_text(), path


def test_no_file_over_500_lines():
    for room in (*ROOMS, "tests"):
        for path in (ROOT / room).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 500, path
