"""An installed Winnow is the single package `winnow`; neither another package nor a file of the user replaces it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("infra", "pretrain", "curation", "evaluate", "pipeline")
FOREIGN = '"""A package of the same name as a room."""\n\n\ndef load(name):\n    return name\n'


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a build reads, so that nothing is written into the repository."""
    folder = tmp_path_factory.mktemp("install") / "checkout"
    folder.mkdir()
    for name in (*ROOMS, "winnow"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(checkout: Path, hook: str) -> Path:
    out = checkout.parent / hook
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(checkout):
    return build(checkout, "build_wheel")


@pytest.fixture(scope="module", params=["build_wheel", "build_editable"])
def installed(request, checkout, tmp_path_factory):
    """The `bin` folder of an environment that holds Winnow, a package `evaluate` and the dependencies of this one."""
    home = tmp_path_factory.mktemp("environment")
    wheel = request.getfixturevalue("wheel") if request.param == "build_wheel" else build(checkout, request.param)
    venv.create(home, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    (site / "evaluate").mkdir()
    (site / "evaluate" / "__init__.py").write_text(FOREIGN)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-compile", "--quiet", str(wheel)], check=True, env=environment())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    assert (site / "evaluate" / "__init__.py").read_text() == FOREIGN
    assert [path.name for path in (site / "evaluate").iterdir()] == ["__init__.py"]
    return home / "bin"


def environment() -> dict[str, str]:
    """This process's, without what would let a command find this checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def commands(folder: Path, *lines: list[str | Path]) -> list[str]:
    """What each command prints; all run at the same time."""
    pipe = subprocess.PIPE
    running = [
        subprocess.Popen(list(map(str, line)), cwd=folder, env=environment(), stdout=pipe, stderr=pipe, text=True)
        for line in lines
    ]
    printed = []
    for process, line in zip(running, lines, strict=True):
        out, error = process.communicate()
        assert process.returncode == 0, f"{line}: {error}"
        printed.append(out)
    return printed


def test_a_wheel_holds_winnow_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"winnow"}
    kinds = ("*.py", "*.yaml", "*.j2")
    expected = {
        f"winnow/{path.relative_to(ROOT)}" for room in ROOMS for kind in kinds for path in (ROOT / room).rglob(kind)
    }
    expected |= {f"winnow/infra/deploy/{path.name}" for path in (ROOT / "infra" / "deploy").iterdir()}
    assert {name for name in names if name.startswith("winnow/")} == {
        *expected,
        "winnow/__init__.py",
        "winnow/py.typed",
    }


def test_installed_next_to_a_package_named_evaluate(installed, tmp_path):
    winnow = installed / "winnow"
    code = "import evaluate, winnow.evaluate.stage; print(evaluate.load('x'), evaluate is winnow.evaluate)"
    use, plan, tasks, foreign = commands(
        tmp_path,
        [winnow, "--help"],
        [winnow, "plan", "quickstart"],
        [winnow, "ls", "tasks"],
        [installed / "python", "-c", code],
    )
    assert "Usage: winnow" in use
    assert "compare" in plan and "units to do" in plan
    assert "vtab/caltech101" in tasks
    assert foreign.split() == ["x", "False"]


def test_in_a_folder_with_files_named_as_rooms(installed, tmp_path):
    """A checkout of DataComp has an `evaluate.py` and a `baselines/`. Nothing of the folder is imported."""
    for name in ("evaluate.py", "infra.py", "baselines/__init__.py", "yaml.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError(__file__)\n")
    (tmp_path / "my_filters.py").write_text((ROOT / "tests" / "examples" / "caption_length.py").read_text())
    (tmp_path / "r.yaml").write_text(
        'demo: {}\npool: demo:pool\nsubsets: {own: {"my_filters:CaptionLength": {most: 6}}}\n'
    )
    winnow = installed / "winnow"
    module = [installed / "python", "-m", "winnow.pipeline.cli"]
    by_script, by_module, plan = commands(
        tmp_path, [winnow, "ls", "filters"], [*module, "ls", "filters"], [winnow, "plan", "r.yaml"]
    )
    assert by_script == by_module and "clip_score" in by_script
    assert "curate" in plan


def test_the_image_copies_the_package():
    lines = (ROOT / "infra" / "deploy" / "Dockerfile").read_text().splitlines()
    assert {f"COPY {name} {name}" for name in ("winnow", *ROOMS)} <= set(lines)
