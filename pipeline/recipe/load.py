"""From the text of a recipe to a `Recipe`: YAML, overrides, `${…}`, types, checks.

Nothing here imports torch, Ray or FAISS, so a mistake is reported within a second or two.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from winnow.curation.algebra.nodes import Node
from winnow.curation.algebra.parse import parse
from winnow.curation.located import located
from winnow.curation.measures.base import MeasureSpec, parse_measures
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io.text import read_text
from winnow.infra.io.yaml_lines import Lines, read_value, read_yaml
from winnow.infra.params import ParameterError, build, names_of
from winnow.infra.registry import unknown
from winnow.infra.stages.names import check_name
from winnow.pipeline.recipe.check import check_models, check_recipe
from winnow.pipeline.recipe.schema import Recipe, is_task_file, several
from winnow.pretrain.config import PretrainConfig

RECIPES = Path(__file__).parents[1] / "recipes"
OPEN_KEYS = {"pool": "SHARDS", "evaluate.data": "EVALSETS"}
OPEN = "???"  # a value that a recipe leaves to `--set`, as in OmegaConf


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """Read, override, check.

    Args:
        path: a YAML file, or the name of a packaged recipe ("quickstart").
        overrides: `key.path=value`, the value in YAML.

    Raises:
        UsageError: saying the line and, for a misspelt word, the nearest valid one.
    """
    file = Path(path)
    if not file.exists() and file.name == path and not file.suffix:
        names = [recipe.stem for recipe in RECIPES.glob("*.yaml")]
        if path not in names:
            raise unknown("recipe", path, names)
        file = RECIPES / f"{path}.yaml"
    return parse_recipe(_text(str(file)), path, overrides or [], file.absolute().parent)


def parse_recipe(text: str, name: str, overrides: list[str], folder: Path = Path()) -> Recipe:
    """`load_recipe` on a text; `name` names the file in messages, and `folder` is where task files are looked for."""
    raw, lines = read_values(text, name, overrides)
    if left := _left_open(raw):
        do = f"Add {' '.join(f'--set {key}={OPEN_KEYS.get(key, key)}' for key in left)}; docs/data.md describes both."
        raise UsageError(f"{' and '.join(left)} must be given", where=name, do=do)
    with _at_lines(lines):
        for key in raw:
            _check_key(key)
        for key in ("pool", "subsets"):
            if not raw.get(key):
                raise ParameterError(f'"{key}" is missing')
        subsets = _parse_subsets(raw["subsets"])
        given = _mapping({} if raw.get("measures") is None else raw["measures"], "measures", "parameters")
        with located("measures"):
            measures = parse_measures(given)
        recipe = _find_task_files(build(Recipe, raw | {"subsets": subsets, "measures": measures}, ""), folder)
        recipe._text = raw
        check_recipe(recipe)
        check_models(recipe)
    return recipe


def load_training(path: str | None, overrides: list[str]) -> PretrainConfig:
    """The `pretrain:` section of a recipe from a file, or from overrides alone. Raises UsageError."""
    text = "{}" if path is None else _text(path)
    raw, lines = read_values(text, path or "--set", overrides)
    with _at_lines(lines):
        config = build(PretrainConfig, raw, "")
        config.check()
    return config


def load_tree(path: str) -> Node:
    """The tree of filters in a YAML file. Raises UsageError."""
    text = _text(path)
    tree, lines = read_yaml(text, path) if text.strip() else ({}, Lines(path))
    with _at_lines(lines):
        return parse(tree)


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
        name, text = given, _text(given)
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


def _text(path: str) -> str:
    """The text of a file that the command line names. Raises UsageError."""
    try:
        return read_text(path)
    except WinnowError as error:
        raise UsageError(error.what, where=path) from None


def read_values(text: str, name: str, overrides: list[str]) -> tuple[dict[str, Any], Lines]:
    """The mapping of a YAML text with `key.path=value` over it and every `${…}` replaced; and where its values are."""
    raw, lines = read_yaml(text, name)
    keys = [_override(raw, item) for item in overrides]
    lines = replace(lines, overrides=frozenset(keys))
    return _interpolate(raw, raw, lines), lines


@contextlib.contextmanager
def _at_lines(lines: Lines) -> Iterator[None]:
    """ParameterErrors of the block become UsageErrors with the line of the fault."""
    try:
        yield
    except ParameterError as error:
        raise UsageError(error.what, where=error.where or lines.where(error.path), do=error.do) from None


def _left_open(value: Any, key: str = "") -> list[str]:
    """The keys whose value is OPEN."""
    if isinstance(value, Mapping):
        return [found for name, item in value.items() for found in _left_open(item, f"{key}.{name}".lstrip("."))]
    return [key] if value == OPEN else []


def _parse_subsets(subsets: Any) -> dict[str, Node]:
    nodes = {}
    for name, tree in _mapping(subsets, "subsets", "filters").items():
        with located("subsets", name):
            check_name("subset", name)
            nodes[name] = parse(tree)
    return nodes


def _mapping(given: Any, key: str, values: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ParameterError(f"{key} must be a mapping of names to {values}, not {given!r}").below(key)
    return given


def _find_task_files(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the URLs of the task files that are in its folder."""
    if recipe.evaluate is None:
        return recipe
    given = recipe.evaluate.tasks
    found = [str(folder / word) if is_task_file(word) and (folder / word).exists() else word for word in several(given)]
    section = recipe.evaluate.model_copy(update={"tasks": found[0] if isinstance(given, str) else tuple(found)})
    return recipe.model_copy(update={"evaluate": section})


def _check_key(key: Any) -> None:
    with located(key):
        if key in Recipe.renamed:
            raise ParameterError(f"`{key}` is now `{Recipe.renamed[key]}`")
        if key not in names_of(Recipe):
            raise unknown("key", str(key), names_of(Recipe))


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
