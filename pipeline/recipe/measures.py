"""Which measures a recipe wants: those its filters read the columns of, those it names, and what these read in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from winnow.curation.columns.table import measure_of
from winnow.curation.measures import MEASURES
from winnow.curation.measures.base import Measure, make, with_upstream
from winnow.pipeline.recipe.schema import Recipe

Specs = dict[str, tuple[type[Measure], dict[str, Any]]]


def pool_measures(recipe: Recipe) -> Specs:
    """The measures of the pool by name."""
    named = {kind.name: (kind, params) for key, params in recipe.measures.items() for kind in [MEASURES.load(key)]}
    wanted = _owners(column for item in recipe.filters() for column in item.columns())
    wanted |= {name for kind, _ in named.values() for name in kind.upstream()}
    found: Specs = {name: (kind, {}) for name, kind in with_upstream(wanted - set(named), MEASURES.load).items()}
    return dict(sorted((found | named).items()))


def target_measures(recipe: Recipe, target: str) -> Specs:
    """The measures of a target set, with the parameters they have on the pool."""
    known = pool_measures(recipe)
    filters = [item for item in recipe.filters() if target in item.targets()]
    wanted = _owners(column for item in filters for column in item.target_columns())
    return {name: known.get(name, (kind, {})) for name, kind in with_upstream(wanted, MEASURES.load).items()}


def make_measures(specs: Specs, scorer: Callable[[], tuple[str, str]]) -> tuple[Measure, ...]:
    """The measures; `scorer` gives the encoder (spec and digest) to those that name none."""
    return tuple(make(kind, params, scorer) for kind, params in specs.values())


def _owners(columns: Iterable[str]) -> set[str]:
    return {name for column in columns if (name := measure_of(column))}
