"""YAML with the lines of its keys."""

import os
import subprocess
import sys

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


# Each level is nine times the one before.
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{chr(ord(name) - 1)}'] * 9)}]\n" for name in "bcdefghij"
)
MERGES = "a: &a {k: 1, l: 1, m: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join([f'*{chr(ord(name) - 1)}'] * 9)}]}}\n" for name in "bcdefghij"
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "not a mapping"),
        ("a: 1\na: 2", 'line 2: "a" is given twice'),
        ("a: 1\nno: 2", 'line 2: YAML reads the key `no` as bool, not as text. Write "no", with quotes'),
        ("a: {1: 2}", "line 1: YAML reads the key `1` as int"),
        ("a:\n  ~: 2", "line 2: YAML reads the key `~` as null"),
        ("a: 2024-02-30", "not valid YAML .day is out of range"),
        (f"a: {'9' * 5000}", "not valid YAML .Exceeds the limit"),
        ("a: &a [*a]", "an alias within what it stands for"),
        ("a: " + "[" * 5000, "more than 50 levels deep"),
        ("\n".join("  " * i + "a:" for i in range(300)), "more than 50 levels deep"),
        ("a: [" + "1," * 60_000 + "]", "more than 50,000 values"),
        ("a: " + "x" * (1 << 20), "more than 1,048,576 characters"),
        (BOMB, "more than 50,000 values, with aliases expanded"),
        (MERGES, "more than 50,000 values, with aliases expanded"),
    ],
    ids=lambda value: value[:20].replace("\n", " "),
)
def test_what_cannot_be_used_is_refused(text, words):
    with pytest.raises(UsageError, match=words):
        read_yaml(text, "f.yaml")


def test_aliases_and_merges_of_a_reasonable_size_are_read():
    raw, lines = read_yaml("a: &a {x: 1, z: [1]}\nb: {<<: *a, y: 2}\nc: [*a, *a]", "f.yaml")
    assert raw["b"] == {"x": 1, "z": [1], "y": 2} and raw["c"] == [raw["a"]] * 2
    assert lines.where(("c", 1)) == "f.yaml, line 1"


def test_a_bomb_takes_little_memory():
    """It stands for 9**10 values; reading its lines took 2.3 GB."""
    code = f"""
import resource
from winnow.infra.io.yaml_lines import read_yaml
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
for text in {[BOMB, MERGES]!r}:
    try:
        read_yaml(text, "f.yaml")
    except Exception as error:
        print(type(error).__name__)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["UsageError"] * 2, done.stderr
