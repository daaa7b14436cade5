"""The examples in docstrings run, and give what they show."""

import doctest
import importlib

import pytest

MODULES = [
    "winnow",
    "winnow.curation.algebra.in_memory",
    "winnow.curation.algebra.parse",
    "winnow.infra.io.prefetch",
    "winnow.infra.params",
    "winnow.infra.pool.sample",
    "winnow.pipeline.api",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
