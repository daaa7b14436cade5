"""From the text of a recipe to a `Recipe`: YAML, overrides, `${…}`, types, checks.

Nothing here imports torch, Ray or FAISS, so a mistake is reported within a second or two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from winnow.curation.algebra.nodes import Node
from winnow.curation.algebra.parse import parse
from winnow.curation.measures.base import MeasureSpec, parse_measures
from winnow.infra.errors import UsageError
from winnow.infra.io import storage
from winnow.infra.io.yaml_lines import Lines, read_value, read_yaml
from winnow.infra.params import ParameterError, build, names_of
from winnow.infra.registry import unknown
from winnow.pipeline.recipe.check import check_models, check_recipe
from winnow.pipeline.recipe.schema import Recipe
from winnow.pretrain.config import PretrainConfig

RECIPES = Path(__file__).parents[1] / "recipes"


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """Read, override, check.

    Args:
        path: a YAML file, or the name of a packaged recipe ("quickstart").
        overrides: `key.path=value`, the value in YAML.

    Raises:
        UsageError: saying the line and, for a misspelt word, the nearest valid one.
    """
    file = Path(path)
    if not file.exists() and (packaged := RECIPES / f"{path}.yaml").exists():
        file = packaged
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read ({error})", where=path) from None
    return parse_recipe(text, path, overrides or [])


def parse_recipe(text: str, name: str, overrides: list[str]) -> Recipe:
    """`load_recipe` on a text; `name` names the file in messages."""
    raw, lines = read_values(text, name, overrides)
    try:
        for key in raw:
            if key not in names_of(Recipe):
                raise _unknown_key(key)
        for key in ("pool", "subsets"):
            if not raw.get(key):
                raise ParameterError(f'"{key}" is missing')
        parsed = {"subsets": parse_subsets(raw["subsets"]), "measures": _measures(raw.get("measures"))}
        recipe = build(Recipe, raw | parsed, "")
        recipe._text = raw
        check_recipe(recipe)
        check_models(recipe)
    except ParameterError as error:
        raise UsageError(error.what, where=error.where or lines.where(error.path), do=error.do) from None
    return recipe


def load_training(path: str | None, overrides: list[str]) -> PretrainConfig:
    """The `pretrain:` section of a recipe from a file, or from overrides alone. Raises UsageError."""
    text = "{}" if path is None else storage.read_bytes(path).decode(errors="replace")
    raw, lines = read_values(text, path or "--set", overrides)
    try:
        config = build(PretrainConfig, raw, "")
        config.check()
    except ParameterError as error:
        raise UsageError(error.what, where=lines.where(error.path), do=error.do) from None
    return config


def load_tree(path: str) -> Node:
    """The tree of filters in a YAML file. Raises UsageError."""
    if not storage.exists(path):
        raise UsageError("no such file", where=path)
    text = storage.read_bytes(path).decode(errors="replace")
    tree, lines = read_yaml(text, path) if text.strip() else ({}, Lines(path))
    try:
        return parse(tree)
    except ParameterError as error:
        raise UsageError(error.what, where=lines.where(error.path), do=error.do) from None


def load_measures(given: str, overrides: list[str]) -> dict[str, MeasureSpec]:
    """The measures that a command line asks for.

    Args:
        given: names divided by commas, a mapping in YAML as a recipe's `measures:`, or a file that holds one.
        overrides: `measures.NAME.PARAMETER=value`, the value in YAML.

    Raises:
        UsageError: an unknown measure or parameter.
    """
    given = given.strip()
    name = "--measures"
    if given.startswith("{"):
        text = given
    elif given.endswith((".yaml", ".yml", ".json")):
        name, text = given, storage.read_bytes(given).decode(errors="replace")
    else:
        names = [part.strip() for part in given.split(",") if part.strip()]
        text = yaml.safe_dump({part: {} for part in names})
    raw, lines = read_yaml(text, name)
    whole = {"measures": raw}
    for item in overrides:
        if not item.startswith("measures."):
            what = "only parameters of measures can be set here"
            raise UsageError(what, where=f"--set {item}", do="Write measures.NAME.PARAMETER=VALUE.")
        _override(whole, item)
    try:
        return parse_measures(whole["measures"])
    except ParameterError as error:
        where = lines.where(error.path) if name == given else "--measures"
        raise UsageError(error.what, where=where, do=error.do) from None


def read_values(text: str, name: str, overrides: list[str]) -> tuple[dict[str, Any], Lines]:
    """The mapping of a YAML text with `key.path=value` over it and every `${…}` replaced; and where its values are."""
    raw, lines = read_yaml(text, name)
    keys = [_override(raw, item) for item in overrides]
    lines = replace(lines, overrides=frozenset(keys))
    return _interpolate(raw, raw, lines), lines


def parse_subsets(subsets: Any) -> dict[str, Node]:
    """The trees of `subsets:` by name. Raises ParameterError."""
    if not isinstance(subsets, Mapping):
        raise ParameterError(f"subsets must be a mapping of names to filters, not {subsets!r}").below("subsets")
    nodes = {}
    for name, tree in subsets.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name) or not name.strip("."):
            raise ParameterError(f'subset "{name}": a name has letters, digits and . _ + - only').below("subsets", name)
        try:
            nodes[name] = parse(tree)
        except ParameterError as error:
            raise error.below("subsets", name) from None
    return nodes


def _measures(given: Any) -> dict[str, MeasureSpec]:
    if not isinstance(given, Mapping | None):
        raise ParameterError(f"measures must be a mapping of names to parameters, not {given!r}").below("measures")
    try:
        return parse_measures(given or {})
    except ParameterError as error:
        raise error.below("measures") from None


def _unknown_key(key: Any) -> ParameterError:
    if key in Recipe.renamed:
        error = ParameterError(f"`{key}` is now `{Recipe.renamed[key]}`")
    else:
        near = unknown("key", str(key), names_of(Recipe))
        error = ParameterError(near.what, do=near.do)
    return error.below(key)


def _override(raw: dict[str, Any], item: str) -> str:
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise UsageError("is not of the form key.path=value", where=f"--set {item}")
    *parents, last = key.split(".")
    inner: Any = raw
    for part in parents:
        if inner.get(part) is None:
            inner[part] = {}
        inner = inner[part]
        if not isinstance(inner, dict):
            raise UsageError(f'"{part}" has no keys below it', where=f"--set {item}")
    try:
        inner[last] = read_value(value)
    except yaml.YAMLError:
        raise UsageError("the value is not valid YAML", where=f"--set {item}") from None
    return key


def _interpolate(value: Any, root: dict[str, Any], lines: Lines, path: tuple = ()) -> Any:
    """`${a.b}` in a string becomes the value at that key."""
    if isinstance(value, dict):
        return {key: _interpolate(item, root, lines, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item, root, lines, (*path, i)) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def look(match: re.Match[str]) -> str:
        found: Any = root
        for part in match[1].split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if not isinstance(found, (str, int, float)):
            raise UsageError(f'"${{{match[1]}}}" names no value in the recipe', where=lines.where(path))
        return str(found)

    return re.sub(r"\$\{([\w.\-]+)\}", look, value)
