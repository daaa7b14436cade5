"""ARCHITECTURE.md follows three values through the code: every function it names exists, and the ways are short."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("infra", "pretrain", "curation", "evaluate", "pipeline")
TEXT = (ROOT / "ARCHITECTURE.md").read_text()


def stops(title: str) -> list[str]:
    """The first name of each numbered line below a title."""
    section = TEXT[TEXT.index(f"**{title}**") :]
    section = section[: section.find("\n\n", section.index("\n1. "))]
    return re.findall(r"^\d+\. `([\w.]+)`", section, re.MULTILINE)


def defined(class_name: str) -> list[str]:
    """Modules of the rooms that define a class."""
    return [
        ".".join(("winnow", *path.relative_to(ROOT).with_suffix("").parts))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if re.search(rf"^class {class_name}\b", path.read_text(), re.MULTILINE)
    ]


@pytest.mark.parametrize(
    ("title", "most"), [("The fraction of a filter", 12), ("A learning rate", 8), ("A test image", 14)]
)
def test_the_way_of_a_value_is_short_and_names_what_exists(title, most):
    names = stops(title)
    assert 5 < len(names) <= most
    for name in names:
        head, _, last = name.rpartition(".")
        if name.split(".")[0] not in ROOMS:
            (module,) = defined(head)
            owner = getattr(importlib.import_module(module), head)
        elif head.rpartition(".")[2][0].isupper():
            module, _, class_name = head.rpartition(".")
            owner = getattr(importlib.import_module(f"winnow.{module}"), class_name)
        else:
            owner = importlib.import_module(f"winnow.{head}")
        assert callable(getattr(owner, last)), name
