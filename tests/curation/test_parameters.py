"""Parameters of filters and measures: wrong values are refused when they are parsed, with the path to them."""

import types
import typing

import pytest

from winnow.curation.algebra.parse import parse
from winnow.curation.filters import FILTERS
from winnow.curation.measures import MEASURES
from winnow.curation.measures.base import parse_measures
from winnow.infra.params import ParameterError, build


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("basic", {"min_side": "big"}, "min_side must be a whole number, not 'big'"),
        ("near_duplicates", {"radius": 2.5}, "radius must be a whole number, not 2.5"),
        ("image_cluster", {"target": "t", "clusters": 10.5}, "clusters must be a whole number, not 10.5"),
        ("decontaminate", {"target": 3}, "target must be a text, not 3"),
        ("clip_score", {"fraction": True}, "fraction must be a number, not True"),
        ("clip_score", {"fraction": "high"}, "fraction must be a number, not 'high'"),
        ("clip_score", {"fraction": float("nan")}, "fraction must be a finite number"),
        ("score", {"clip": True, "fraction": 0.3}, "clip must be a number, not True"),
        ("norm_sim", {"target": "t", "p": 3, "fraction": 0.3}, "p must be one of 2, 'inf', not 3"),
    ],
)
def test_wrong_values_are_refused_with_their_path(name, params, words):
    key = words.split()[0]
    with pytest.raises(ParameterError, match=words) as caught:
        parse({"any": [{"basic": {}}, {"not": {name: params}}]})
    assert caught.value.path == ("any", 1, "not", name, key)
    assert str(caught.value).startswith(f"{name}: {key}")


def test_paths_lead_to_names_and_shapes():
    cases = [
        ({"all": [{"basic": {}}, {"clip_scor": {}}]}, ("all", 1, "clip_scor")),
        ({"not": {"clip_score": {"fractoin": 0.3}}}, ("not", "clip_score", "fractoin")),
        ({"any": ({"basic": 3},)}, ("any", 0, "basic")),
        ({"all": {"basic": {}}}, ("all",)),
        ({"all": [3]}, ("all", 0)),
        ({"clip_score": {"fraction": 0.3, "keep": 3}}, ("clip_score",)),
    ]
    for tree, path in cases:
        with pytest.raises(ParameterError) as caught:
            parse(tree)
        assert caught.value.path == path, tree


def numeric_fields(kind):
    """Names of the fields whose annotation holds int or float."""

    def kinds(annotation):
        if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
            return {found for arg in typing.get_args(annotation) for found in kinds(arg)}
        return {annotation} if isinstance(annotation, type) else set()

    return [name for name, info in kind.__pydantic_fields__.items() if {int, float} & kinds(info.annotation)]


@pytest.mark.parametrize("registry", [FILTERS, MEASURES], ids=["filters", "measures"])
def test_every_numeric_parameter_refuses_a_text_and_a_boolean(registry):
    checked = 0
    for name in registry.names():
        kind = registry.load(name)
        for key in numeric_fields(kind):
            for value in ("3", True):
                with pytest.raises(ParameterError) as caught:
                    build(kind, {**kind.example, key: value}, name)
                assert caught.value.path == (key,), (name, key)
                checked += 1
    assert checked > 40 or registry is MEASURES


@pytest.mark.parametrize(
    ("measures", "path", "words"),
    [
        ({"langage": {}}, ("langage",), 'Did you mean "language"'),
        ({"langage": {"path": "x"}}, ("langage",), 'unknown measure "langage"'),
        ({"language": {"pth": "x"}}, ("language", "pth"), 'Did you mean "path"'),
        ({"language": {"path": 3}}, ("language", "path"), "path must be a text"),
        ({"language": 3}, ("language",), "parameters are written"),
        ({"clip": {"digest": "x"}}, ("clip", "digest"), "unknown parameter of clip"),
        ({"nsfw": {"encoder": "x"}}, ("nsfw", "encoder"), "unknown parameter of nsfw"),
        ({"nsfw": {"yes": ["a"]}}, ("nsfw", "no"), "make no pairs"),
        ({"aesthetic": {}}, ("aesthetic", "head"), 'aesthetic needs "head"'),
        ({"big": {"clipp": {}}}, ("big", "clipp"), 'Did you mean "clip"'),
        ({"big": {"clip": {"device": "tpu"}}}, ("big", "clip", "device"), "device"),
        ({"b32": {"clip": {}}}, ("b32",), "cannot name a measure"),
        ({"a.b": {"clip": {}}}, ("a.b",), "cannot name a measure"),
        ({"pathlib:Path": {}}, ("pathlib:Path",), "not a Measure"),
    ],
)
def test_wrong_measures_are_refused_with_their_path(measures, path, words):
    with pytest.raises(ParameterError, match=words) as caught:
        parse_measures(measures)
    assert caught.value.path == path


def test_two_measures_of_one_name_are_refused():
    path = "tests.examples.brightness:Brightness"
    with pytest.raises(ParameterError, match='two measures are called "brightness"'):
        parse_measures({"brightness": {path: {}}, path: {}})
