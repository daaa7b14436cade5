"""The recipe: one YAML file for a whole experiment, read strictly and checked before any work starts.

Nothing here imports torch, Ray or FAISS, so a mistake is told of within a second or two.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from winnow.curation.algebra.tree import parse
from winnow.curation.columns.table import measure_of
from winnow.curation.filters.base import Node
from winnow.curation.measures import MEASURES
from winnow.curation.measures.base import Measure, make, with_upstream
from winnow.curation.noise.inject import InjectConfig
from winnow.evaluate.protocols.base import PROTOCOLS
from winnow.evaluate.sets.layout import is_data
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.params import ParameterError
from winnow.infra.pool.index import find_shards
from winnow.infra.registry import closest_word, unknown
from winnow.pipeline.demo.stage import DemoConfig
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.models.spec import parse_spec
from winnow.pretrain.sections import RENAMED

DEMO = "demo:"

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Trusted(Strict):
    """Pairs known to be good, to train the scorer on: shards held out of the pool, or a pool of their own."""

    shards: tuple[str, ...] = ()
    pool: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Trusted:
        if bool(self.shards) == bool(self.pool):
            raise ValueError("trusted takes either shards (of the pool, held out of it) or a pool")
        return self


class Scorer(Strict):
    """What gives `clip.score` and the embeddings: a pretrained open_clip model, a checkpoint, or one trained here.

    `{model: ViT-B-32, pretrained: openai}`; `{checkpoint: PATH}` or just the path; `{trusted: …, train: …}` trains a
    filtering network first (Fang et al. 2023).
    """

    model: str | None = None
    pretrained: str | None = None
    checkpoint: str | None = None
    trusted: Trusted | None = None
    train: PretrainConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return {"checkpoint": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> Scorer:
        ways = [self.model is not None, self.checkpoint is not None, self.train is not None]
        if sum(ways) != 1:
            raise ValueError("scorer takes one of: model with pretrained; checkpoint; trusted with train")
        if (self.pretrained is None) == (self.model is not None):
            raise ValueError("scorer: model and pretrained go together")
        if (self.trusted is None) == (self.train is not None):
            raise ValueError("scorer: trusted and train go together")
        return self

    @property
    def spec(self) -> str:
        """For `load_encoder`; only for a scorer that is not trained here."""
        return self.checkpoint if self.checkpoint is not None else f"{self.model}:{self.pretrained}"


class EvaluateSection(Strict):
    data: str
    tasks: str | tuple[str, ...] = "all"
    protocols: tuple[str, ...] = Field(("zeroshot",), min_length=1)
    precision: Literal["float32", "bfloat16"] = "float32"

    @field_validator("protocols")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in PROTOCOLS:
                raise ValueError(str(unknown("protocol", name, PROTOCOLS)))
        return value


class ReshardSection(Strict):
    samples_per_shard: int = Field(10_000, ge=1)


class Recipe(Strict):
    """A whole experiment; the keys are those of the YAML file."""

    pool: tuple[str, ...]
    demo: DemoConfig | None = None
    inject: InjectConfig | None = None
    scorer: Scorer | None = None
    measures: dict[str, dict[str, Any]] = {}
    subsets: dict[str, dict[str, Any]] = Field(min_length=1)
    baseline: str | None = None
    reshard: ReshardSection | None = ReshardSection(samples_per_shard=10_000)
    pretrain: PretrainConfig | None = None
    evaluate: EvaluateSection | None = None
    captions: bool | None = None
    max_skipped: float = Field(0.05, ge=0)

    @field_validator("pool", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("subsets", mode="before")
    @classmethod
    def _nothing(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: {} if tree is None else tree for name, tree in value.items()}
        return value

    def trees(self) -> dict[str, Node]:
        """The parsed filter trees."""
        return {name: parse(tree) for name, tree in self.subsets.items()}

    @property
    def needs_captions(self) -> bool:
        """Whether a sample must have a caption: `captions`, else unless nothing here could look at it."""
        if self.captions is not None or self.pretrain is None:
            return self.captions is not False
        columns = {column for node in self.trees().values() for item in node.filters() for column in item.columns()}
        others = self.scorer or self.inject or self.measure_kinds() or "text" in columns
        return self.pretrain.reads_text or bool(others)

    def measure_kinds(self) -> dict[str, tuple[type[Measure], dict[str, Any]]]:
        """The measures to run, by name: those the filters' columns belong to and those asked for, with parameters."""
        kinds = {}
        for key, params in self.measures.items():
            kind = MEASURES.load(key)
            kinds[kind.name] = (kind, params)
        filters = [item for node in self.trees().values() for item in node.filters()]
        columns = {column for item in filters for column in item.columns()}
        wanted = {name for column in columns if (name := measure_of(column))} - set(kinds)
        wanted |= {name for kind, _ in kinds.values() for name in kind.upstream()}
        for name, kind in with_upstream(wanted, MEASURES.load).items():
            kinds.setdefault(name, (kind, {}))
        return dict(sorted(kinds.items()))

    def target_kinds(self, target: str) -> dict[str, tuple[type[Measure], dict[str, Any]]]:
        """The measures to run on a target set, with the parameters they have on the pool."""
        filters = [item for node in self.trees().values() for item in node.filters() if target in item.targets()]
        columns = {column for item in filters for column in item.target_columns()}
        known = self.measure_kinds()
        wanted = with_upstream({name for column in columns if (name := measure_of(column))}, MEASURES.load)
        return {name: known.get(name, (kind, {})) for name, kind in wanted.items()}

    def targets(self) -> list[str]:
        """The target sets that filters name, each once, in order."""
        found = [t for node in self.trees().values() for item in node.filters() for t in item.targets()]
        return list(dict.fromkeys(found))

    @property
    def reference(self) -> str:
        """The subset the others are compared with: `baseline`, else the one without a filter, else the first."""
        if self.baseline is not None:
            return self.baseline
        return next((name for name, tree in self.subsets.items() if not tree), next(iter(self.subsets)))


@dataclass(frozen=True)
class RecipeText:
    """A recipe's text and where each key stands in it, for messages."""

    name: str
    lines: dict[tuple[str | int, ...], int]
    overrides: frozenset[str] = frozenset()

    def where(self, loc: tuple[str | int, ...]) -> str:
        """`FILE, line N` of a key or its nearest parent; the `--set` that gave it if one did."""
        path = tuple(part for part in loc)
        while path:
            dotted = ".".join(map(str, path))
            if dotted in self.overrides:
                return f"--set {dotted}"
            if path in self.lines:
                return f"{self.name}, line {self.lines[path]}"
            path = path[:-1]
        return self.name


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """Read, override, check.

    Args:
        path: a YAML file, or the name of a packaged recipe ("quickstart").
        overrides: `key.path=value`, the value in YAML.

    Raises:
        UsageError: saying the line and, for a misspelt word, the nearest valid one.
    """
    file = Path(path)
    if not file.exists() and (packaged := Path(__file__).parents[1] / "recipes" / f"{path}.yaml").exists():
        file = packaged
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read ({error})", where=path) from None
    return parse_recipe(text, str(path), overrides or [])


def parse_recipe(text: str, name: str, overrides: list[str]) -> Recipe:
    """`load_recipe` on a text; `name` stands for the file in messages."""
    recipe, source = read_model(Recipe, text, name, overrides)
    _check(recipe, source)
    return recipe


def read_model(model: type[Model], text: str, name: str, overrides: list[str]) -> tuple[Model, RecipeText]:
    """A pydantic model out of a YAML text, with `key.path=value` over it; and where its values come from.

    Raises:
        UsageError: with the line, and for a misspelt key the nearest one.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"is not valid YAML ({' '.join(str(error).split())})", where=name) from None
    if not isinstance(raw, dict) or root is None:
        raise UsageError("is no mapping of keys to values", where=name)
    lines: dict[tuple[str | int, ...], int] = {}
    find_lines(root, (), lines, name)
    keys = [_override(raw, item) for item in overrides]
    source = RecipeText(name, lines, frozenset(keys))
    raw = _interpolate(raw, raw, source)
    try:
        return model.model_validate(raw), source
    except ValidationError as error:
        raise _explain(error, source, model) from None


def find_lines(node: yaml.Node, path: tuple, lines: dict, name: str) -> None:
    """Note the line of each key. Raises UsageError for one that is given twice, of which YAML takes the last."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise UsageError(
                    f'"{key.value}" is given twice (before in line {seen[key.value]})', where=f"{name}, line {line}"
                )
            seen[key.value] = line
            lines[(*path, key.value)] = line
            find_lines(value, (*path, key.value), lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            find_lines(value, (*path, i), lines, name)


def _override(raw: dict[str, Any], item: str) -> str:
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise UsageError("is not of the form key.path=value", where=f"--set {item}")
    *parents, last = key.split(".")
    path_: Any = raw
    for part in parents:
        if path_.get(part) is None:
            path_[part] = {}
        path_ = path_[part]
        if not isinstance(path_, dict):
            raise UsageError(f'"{part}" has no keys below it', where=f"--set {item}")
    try:
        path_[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError("the value is not valid YAML", where=f"--set {item}") from None
    return key


def _interpolate(value: Any, root: dict[str, Any], source: RecipeText, path: tuple = ()) -> Any:
    """`${a.b}` in a string becomes the value at that key."""
    if isinstance(value, dict):
        return {key: _interpolate(item, root, source, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item, root, source, (*path, i)) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def look(match: re.Match[str]) -> str:
        found: Any = root
        for part in match[1].split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if not isinstance(found, (str, int, float)):
            raise UsageError(f'"${{{match[1]}}}" names no value in the recipe', where=source.where(path))
        return str(found)

    return re.sub(r"\$\{([\w.\-]+)\}", look, value)


def _fields_at(loc: tuple[str | int, ...], model: type[BaseModel]) -> list[str]:
    """Known keys of the mapping at a place in a model."""
    kind: Any = model
    for part in loc:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            info = kind.model_fields.get(str(part))
            kind = info.annotation if info else None
        elif typing.get_origin(kind) in (dict, Mapping):
            kind = typing.get_args(kind)[1]
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            models = [arg for arg in typing.get_args(kind) if isinstance(arg, type) and issubclass(arg, BaseModel)]
            kind = models[0] if models else None
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _explain(error: ValidationError, source: RecipeText, model: type[BaseModel]) -> UsageError:
    """The first fault as one sentence with its line."""
    errors = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    fault = errors[0]
    loc = fault["loc"]
    where = source.where(loc)
    dotted = ".".join(map(str, loc))
    if (
        fault["type"] == "extra_forbidden"
        and loc[-1] in RENAMED
        and loc[:-1] in ((), ("pretrain",), ("scorer", "train"))
    ):
        return UsageError(f"`{loc[-1]}` is now `{RENAMED[str(loc[-1])]}`", where=where)
    if fault["type"] == "extra_forbidden":
        return unknown("key", str(loc[-1]), _fields_at(loc[:-1], model) or ["(none)"], where)
    if fault["type"] == "missing":
        near = closest_word(str(loc[-1]), [])
        return UsageError(f'"{dotted}" is missing', where=where, do=near)
    if fault["type"] == "value_error":
        cause = fault.get("ctx", {}).get("error")
        where = source.where((*loc, *getattr(cause, "path", ())))
        return UsageError(str(cause) if cause else fault["msg"], where=where, do=getattr(cause, "do", None))
    return UsageError(f"{dotted}: {fault['msg'][0].lower()}{fault['msg'][1:]}, not {fault['input']!r}", where=where)


def _check(recipe: Recipe, source: RecipeText) -> None:
    """What pydantic cannot know: filters, folders, names that refer to each other."""
    for name, tree in recipe.subsets.items():
        if not re.fullmatch(r"[\w.+-]+", name) or not name.strip("."):
            raise UsageError(
                f'subset "{name}": a name has letters, digits and . _ + - alone', where=source.where(("subsets", name))
            )
        _check_tree(tree, ("subsets", name), source)
    if recipe.baseline is not None and recipe.baseline not in recipe.subsets:
        raise unknown("baseline", recipe.baseline, recipe.subsets, source.where(("baseline",)))
    for name, params in recipe.measures.items():
        try:
            kind = MEASURES.load(name)
            known = {item.name for item in fields(kind)} - {"encoder", "digest"}
            for key in params:
                if key not in known:
                    raise unknown(f"parameter of {name}", key, known or ["(none)"])
        except UsageError as error:
            raise UsageError(error.what, where=source.where(("measures", name)), do=error.do) from None
    for name, (kind, params) in recipe.measure_kinds().items():
        try:
            make(kind, params, lambda: ("", ""))
        except (UsageError, TypeError) as error:
            what, do = (error.what, error.do) if isinstance(error, UsageError) else (str(error), None)
            raise UsageError(what, where=source.where(("measures", name)), do=do) from None
    on_targets = [name for target in recipe.targets() for name in recipe.target_kinds(target)]
    if recipe.scorer is None and "clip" in (*recipe.measure_kinds(), *on_targets):
        users = [
            name
            for name, node in recipe.trees().items()
            if any("clip." in c for f in node.filters() for c in f.columns())
        ]
        raise UsageError(
            f'subset "{users[0] if users else ""}" needs clip embeddings or scores, and the recipe has no scorer',
            where=source.where(("subsets", users[0]) if users else ("measures",)),
            do="Add `scorer: {model: ViT-B-32, pretrained: openai}`, a checkpoint, or one to train on trusted pairs.",
        )
    if recipe.scorer is not None and recipe.scorer.train is None:
        try:
            parse_spec(recipe.scorer.spec)
        except UsageError as error:
            raise UsageError(f"{error.what}", where=source.where(("scorer",)), do=error.do) from None
    if recipe.evaluate is not None and recipe.pretrain is None:
        raise UsageError("there is nothing to evaluate without `pretrain`", where=source.where(("evaluate",)))
    _check_folders(recipe, source)
    scorer = recipe.scorer.train if recipe.scorer else None
    for config, path in ((scorer, ("scorer", "train")), (recipe.pretrain, ("pretrain",))):
        if config is not None:
            check_training(config, path, source)


def check_training(config: PretrainConfig, path: tuple[str, ...], source: RecipeText) -> None:
    """Check what only the objective knows; imports torch, so it comes last."""
    try:
        config.check()
    except ParameterError as error:
        raise UsageError(error.what, where=source.where((*path, *error.path)), do=error.do) from None


def _check_tree(tree: Any, path: tuple[str | int, ...], source: RecipeText) -> None:
    """Parse inner trees first, so that a fault is told of at its own line."""
    if isinstance(tree, Mapping):
        for key, body in tree.items():
            if key in ("all", "any") and isinstance(body, list):
                for i, child in enumerate(body):
                    _check_tree(child, (*path, key, i), source)
            elif key == "not":
                _check_tree(body, (*path, key), source)
    try:
        parse(tree)
    except UsageError as error:
        key = next(iter(tree)) if isinstance(tree, Mapping) and len(tree) else None
        path_ = (*path, key) if key is not None else path
        inner = re.search(r'"([^"]+)"', error.what)
        if inner and (*path_, inner[1]) in source.lines:
            path_ = (*path_, inner[1])
        raise UsageError(error.what, where=source.where(path_), do=error.do) from None


def _check_folders(recipe: Recipe, source: RecipeText) -> None:
    def shards_in(url: str, path_: tuple[str | int, ...]) -> list[str]:
        try:
            return find_shards(url)
        except WinnowError as error:
            raise UsageError(f"{error.what}", where=f"{source.where(path_)}: {url}", do=error.do) from None

    def is_demo(url: str, path_: tuple[str | int, ...]) -> bool:
        if url.startswith(DEMO) and recipe.demo is None:
            raise UsageError(f'"{url}" needs a `demo:` block', where=source.where(path_))
        return url.startswith(DEMO)

    stems: set[str] = set()
    for i, url in enumerate(recipe.pool):
        if not is_demo(url, ("pool", i)):
            found = shards_in(url, ("pool",))
            stems.update(found if len(recipe.pool) == 1 else [f"{i}-{stem}" for stem in found])
    trusted = recipe.scorer.trusted if recipe.scorer else None
    if trusted is not None:
        path_ = ("scorer", "trusted")
        if trusted.pool is not None and not is_demo(trusted.pool, path_):
            shards_in(trusted.pool, path_)
        for name in trusted.shards:
            if stems and name not in stems:
                raise unknown("shard", name, stems, source.where((*path_, "shards")))
        if stems and set(trusted.shards) >= stems:
            raise UsageError("every shard of the pool is trusted, none is left", where=source.where((*path_, "shards")))
    for target in recipe.targets():
        if not is_demo(target, ("subsets",)):
            shards_in(target, ("subsets",))
    data = recipe.evaluate.data if recipe.evaluate is not None else None
    if data is not None and not is_demo(data, ("evaluate", "data")) and not is_data(data):
        raise UsageError("no such folder", where=f"{source.where(('evaluate', 'data'))}: {data}")
