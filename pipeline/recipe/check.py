"""What the types of a recipe cannot know: names that refer to each other, folders, and what filters need."""

from __future__ import annotations

from collections.abc import Iterable

from winnow.curation.columns.table import measure_of
from winnow.curation.located import located
from winnow.curation.measures.base import MeasureSpec, check_fields, with_upstream
from winnow.evaluate.sets.layout import is_data
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.params import ParameterError, Path
from winnow.infra.pool.layouts import find_shards
from winnow.infra.pool.metadata import is_metadata
from winnow.infra.registry import unknown
from winnow.pipeline.recipe.schema import DEMO, EvaluateSection, Recipe, is_task_file, several
from winnow.pretrain.models.spec import parse_spec


def check_recipe(recipe: Recipe) -> None:
    """Raises ParameterError, whose path leads to what is wrong."""
    if recipe.baseline is not None and recipe.baseline not in recipe.subsets:
        with located("baseline"):
            raise unknown("baseline", recipe.baseline, recipe.subsets)
    check_measures(recipe)
    if recipe.evaluate is not None and recipe.pretrain is None:
        raise ParameterError("there is nothing to evaluate without `pretrain`").below("evaluate")
    _check_folders(recipe)


def check_models(recipe: Recipe) -> None:
    """What only an objective or a model's library knows. Imports torch, so it comes last. Raises ParameterError."""
    if recipe.scorer is not None and recipe.scorer.train is None:
        with located("scorer"):
            parse_spec(recipe.scorer.spec)
    trained = [(("pretrain",), recipe.pretrain), (("scorer", "train"), recipe.scorer.train if recipe.scorer else None)]
    for path, config in trained:
        if config is not None:
            with located(*path):
                config.check()


def check_measures(recipe: Recipe, pool: bool = True) -> None:
    """Raises ParameterError where a measure is not known, lacks a parameter or a column, or has no encoder.

    Args:
        recipe: its measures and the trees of its subsets are checked.
        pool: whether the pool is measured; else the target sets alone.
    """
    for name, node in recipe.subsets.items():
        for item in node.filters():
            columns = [*(item.columns() if pool else ()), *(item.target_columns() if item.targets() else ())]
            read = [measure for column in columns if (measure := measure_of(column))]
            with located("subsets", name):
                _check_specs(recipe, read)
                check_fields(columns, with_upstream(read, recipe.measures))
    if pool:
        with located("measures"):
            _check_specs(recipe, list(recipe.measures))


def _check_specs(recipe: Recipe, names: list[str]) -> None:
    for spec in with_upstream(names, recipe.measures).values():
        if spec.needs_scorer and recipe.scorer is None:
            do = "Add `scorer: {model: ViT-B-32, pretrained: openai}`, a checkpoint, or one to train on trusted pairs."
            raise UsageError(f'the measure "{spec.name}" needs an encoder, and there is no scorer', do=do)


def check_images(pool: str, specs: Iterable[MeasureSpec]) -> None:
    """Raises UsageError when a measure wants images and the pool is a folder of metadata."""
    if not is_metadata(pool):
        return
    for spec in specs:
        if spec.kind.pixels or spec.kind.encoded or spec.kind.members:
            hint = "Give the shards with the images as the pool."
            if spec.kind.name == "clip":
                hint += " Scores and embeddings that the metadata has are called by `model: b32` or `l14`, `l14_img` …"
            what = f'the measure "{spec.name}" needs images, and the pool is a folder of metadata'
            raise UsageError(what, where=pool, do=hint)


def _check_folders(recipe: Recipe) -> None:
    stems: set[str] = set()
    for i, url in enumerate(recipe.pool):
        if not _is_demo(recipe, url, ("pool", i)):
            found = _shards(url, ("pool", i))
            stems.update(found if len(recipe.pool) == 1 else [f"{i}-{stem}" for stem in found])
    if recipe.scorer is not None and (trusted := recipe.scorer.trusted) is not None:
        path: Path = ("scorer", "trusted")
        if trusted.pool is not None and not _is_demo(recipe, trusted.pool, path):
            _shards(trusted.pool, path)
        for name in trusted.shards:
            if stems and name not in stems:
                with located(*path, "shards"):
                    raise unknown("shard", name, stems)
        if stems and set(trusted.shards) >= stems:
            raise ParameterError("every shard of the pool is trusted, none is left").below(*path, "shards")
    for target in recipe.targets():
        readers = (name for name, node in recipe.subsets.items() for item in node.filters() if target in item.targets())
        path = ("subsets", next(readers))
        if not _is_demo(recipe, target, path) and not is_metadata(target):
            _shards(target, path)
    if recipe.evaluate is not None:
        _check_evaluation(recipe, recipe.evaluate)


def _check_evaluation(recipe: Recipe, section: EvaluateSection) -> None:
    if not _is_demo(recipe, section.data, ("evaluate", "data")) and not is_data(section.data):
        raise ParameterError(f"no such folder: {section.data}").below("evaluate", "data")
    for word in filter(is_task_file, several(section.tasks)):
        local = not section.data.startswith((DEMO, "hf://"))
        if not (storage.exists(word) or (local and storage.exists(storage.join(section.data, word)))):
            do = "It may be next to the recipe or in the data folder."
            raise ParameterError(f"no such task file: {word}", do=do).below("evaluate", "tasks")


def _is_demo(recipe: Recipe, url: str, path: Path) -> bool:
    if url.startswith(DEMO) and recipe.demo is None:
        raise ParameterError(f'"{url}" needs a `demo:` block').below(*path)
    return url.startswith(DEMO)


def _shards(url: str, path: Path) -> list[str]:
    try:
        return find_shards(url)
    except WinnowError as error:
        raise ParameterError(f"{url}: {error.what}", do=error.do).below(*path) from None
