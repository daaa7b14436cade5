"""The floors: which room may import which, read from the source; and what must be quick to import is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downwards(room):
    for path in (ROOT / room).rglob("*.py"):
        for name in imports_of(path):
            top = name.split(".")[0]
            if top in ROOMS and top != room:
                assert top in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", ["curation", "evaluate"])
def test_models_come_through_the_one_door(room):
    for path in (ROOT / room).rglob("*.py"):
        for name in imports_of(path):
            inside = name.startswith("pretrain.") and not name.startswith("winnow.pretrain.encoder")
            assert not inside, f"{path.relative_to(ROOT)} imports {name}"


def test_rooms_are_listed_for_packaging():
    text = (ROOT / "pyproject.toml").read_text()
    for room in ROOMS:
        for folder in {path.parent for path in (ROOT / room).rglob("*.py")}:
            package = ".".join(folder.relative_to(ROOT).parts)
            assert f'"{package}"' in text, package


def test_reading_a_recipe_imports_nothing_heavy():
    code = (
        "import sys, winnow.pipeline.cli, winnow.pipeline.recipe.load; "
        "print(sorted({'torch', 'ray', 'faiss', 'open_clip', 'deepspeed', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_no_file_over_500_lines():
    for room in (*ROOMS, "tests"):
        for path in (ROOT / room).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 500, path
