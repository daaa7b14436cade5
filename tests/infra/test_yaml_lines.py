"""YAML with the lines of its keys."""

import pytest

from winnow.infra.errors import UsageError
from winnow.infra.io.yaml_lines import read_value, read_yaml

TEXT = """\
a: 1
b:
  - x
  - c: 2e-3
"""


def test_every_key_and_item_has_its_line():
    raw, lines = read_yaml(TEXT, "f.yaml")
    assert raw == {"a": 1, "b": ["x", {"c": 0.002}]}
    assert [lines.where(path) for path in (("a",), ("b", 0), ("b", 1, "c"), ("b", 1, "d"), ("z",))] == [
        "f.yaml, line 1",
        "f.yaml, line 3",
        "f.yaml, line 4",
        "f.yaml, line 4",
        "f.yaml",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("-1E3", -1e3),
        ("1.5e+2", 150.0),
        ("3", 3),
        ("0x10", 16),
        ("1e", "1e"),
        ("5e-4x", "5e-4x"),
        ("e5", "e5"),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text, value):
    read = read_value(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "not valid YAML"), ("- 1", "not a mapping"), ("a: 1\na: 2", 'line 2: "a" is given twice')],
)
def test_what_is_not_a_mapping_is_refused(text, words):
    with pytest.raises(UsageError, match=words):
        read_yaml(text, "f.yaml")
