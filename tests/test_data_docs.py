"""docs/data.md, the packaged recipes and the installation, as someone who has only the repository finds them."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.evaluate.sets import write_classification
from tests.field.helpers import index, winnow
from winnow import __version__

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "data.md").read_text()
RECIPES = sorted(path.stem for path in (ROOT / "pipeline" / "recipes").glob("*.yaml"))


def test_the_shard_of_the_page_is_indexed(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    exec(code, {})
    manifest = index("shards", "pool", 0)
    assert (manifest["items"], manifest["skipped"]["count"]) == (3, 0)


def test_a_folder_without_shards_is_described(tmp_path):
    (tmp_path / "S").mkdir()
    command = ("index", tmp_path / "S", "--out", tmp_path / "P", "--executor", "serial")
    assert "holds no .tar shard; it is empty. docs/data.md" in winnow(*command)[1]
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.zip", "e.zip", "README"):
        (tmp_path / "S" / name).write_bytes(b"")
    status, printed = winnow(*command)
    assert status == 2 and "holds no .tar shard; there are 3 .jpg, 2 .zip, 1 without an ending" in printed
    assert (ROOT / "docs" / "data.md").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_a_packaged_recipe_runs_or_says_in_a_sentence_what_it_is_given(name, tmp_path):
    status, printed = winnow("plan", name, "--out", tmp_path)
    if name == "quickstart":
        assert status == 0
        return
    assert status == 2 and "must be given. Add --set " in printed and printed.count("\n") == 1
    assert "--set evaluate.data=EVALSETS" in printed
    assert ("--set pool=SHARDS" in printed) == (name in ("clip", "real"))


def test_the_recipes_on_generated_images_are_planned(tmp_path):
    lines = [
        line.split("#")[0].split() for line in TEXT.splitlines() if line.startswith("winnow run") and "demo" in line
    ]
    assert [words[2] for words in lines] == ["clip", "simclr"]
    for words in [*lines, [word.replace("simclr", "moco") for word in lines[1]]]:
        status, printed = winnow("plan", *words[2:], "--out", tmp_path)
        assert status == 0 and "units to do" in printed, printed


def test_the_sets_of_the_page_are_enough(tmp_path):
    """The command for `simclr`, on a set in the layout that the page names."""
    write_classification(tmp_path / "E", "wds_cifar10_test", n=10)
    (tmp_path / "E" / "wds_cifar10_test" / "train").symlink_to("test")
    status, printed = winnow("plan", "simclr", "--set", f"evaluate.data={tmp_path / 'E'}", "--out", tmp_path / "R")
    assert status == 0, printed


def test_nothing_names_a_folder_outside_the_repository():
    pages = [path for path in ROOT.rglob("*.md") if not {"tests", ".venv", "runs"} & set(path.relative_to(ROOT).parts)]
    assert len(pages) > 8
    for path in [*pages, *(ROOT / "pipeline" / "recipes").glob("*.yaml")]:
        assert "../shared" not in path.read_text(), path


def test_a_misspelt_recipe_and_the_version(tmp_path):
    status, printed = winnow("run", "quickstrat", "--out", tmp_path)
    assert status == 2 and 'unknown recipe "quickstrat". Did you mean "quickstart"?' in printed
    assert winnow("--version") == (0, f"winnow {__version__}\n")


def test_installs_with_and_without_cuda_and_the_tools_for_tests(tmp_path):
    def commands(*words: str) -> str:
        make = ["make", "-n", "-f", ROOT / "Makefile", f"VENV={tmp_path}", *words]
        return subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert "-e '.'" in commands("install") and "dev" not in commands("install")
    assert "-e '.[dev]'" in commands("test") and "cpu" not in commands("test")
    cpu = commands("install", "CPU=1")
    assert "--torch-backend cpu" in cpu
