"""The single commands as graphs: each is a recipe with the sections it needs, and where its outputs go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from winnow.curation.algebra.nodes import Node
from winnow.curation.measures.base import MeasureSpec
from winnow.curation.reshard import ReshardStage
from winnow.evaluate.sets.layout import is_data
from winnow.infra.errors import UsageError
from winnow.infra.io.content import content_digest
from winnow.infra.params import ParameterError, build
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.layouts import base_url
from winnow.infra.pool.pool import Pool
from winnow.infra.registry import unknown
from winnow.infra.stages.runner import check_output
from winnow.pipeline.graph import Given, Graph, Layout, ready_pool
from winnow.pipeline.recipe.check import check_images, check_measures
from winnow.pipeline.recipe.schema import Recipe
from winnow.pretrain.config import PretrainConfig

# `curate`, `reshard` and `pretrain` keep what they make on the way in `work`.
_TARGETS = {"targets": "work/target-{digest}", "target_columns": "work/target-{digest}/columns"}
_OUTPUTS = dict.fromkeys(("recipe", "subsets", "shards", "checkpoints", "scores"), "")
_WORK = Layout(pool="work/pool", columns="work/columns", **_TARGETS, **_OUTPUTS)


def index_graph(pools: Sequence[str], out: str, captions: bool = True, max_skipped: float = 0.05) -> Graph:
    """Index shards into the pool `out`."""
    check_output("index", out, map(base_url, pools), IndexStage.alone)
    recipe = _recipe(pool=tuple(pools), captions=captions, max_skipped=max_skipped)
    return Graph(recipe, out, Layout(recipe="", pool=""))


def measure_graph(
    pool: str,
    out: str,
    measures: Mapping[str, MeasureSpec],
    scorer: str | None = None,
    captions: bool = True,
    max_skipped: float = 0.05,
) -> Graph:
    """Measure `out/columns`; a pool without an index gets one in `out/pool`."""
    recipe = _recipe(pool=(pool,), measures=measures, scorer=scorer, captions=captions, max_skipped=max_skipped)
    check_images(pool, recipe.pool_measures().values())
    check_measures(recipe)
    return Graph(recipe, out, Layout(recipe=""), Given(ready_pool(pool), keep_columns=True))


def curate_graph(
    pool: str,
    out: str,
    tree: Node,
    measures: Mapping[str, MeasureSpec] | None = None,
    scorer: str | None = None,
    columns: str | None = None,
    reasons: bool = False,
    max_skipped: float = 0.05,
) -> Graph:
    """Apply one tree; subset.npy, funnel.json and the manifest are in `out` itself, all else in `out/work`."""
    recipe = _recipe(pool=(pool,), subsets={"": tree}, measures=measures or {}, scorer=scorer, max_skipped=max_skipped)
    if columns is None:
        check_images(pool, recipe.pool_measures().values())
    check_measures(recipe, pool=columns is None)
    return Graph(recipe, out, _WORK, Given(ready_pool(pool), columns, reasons=reasons))


def reshard_graph(pool: str, out: str, subset: str | None = None, samples_per_shard: int = 10_000) -> Graph:
    """Copy a subset's samples into shards in `out`."""
    if subset is not None:
        content_digest(subset)
    check_output("reshard", out, [base_url(pool)], ReshardStage.alone)
    recipe = _recipe(pool=(pool,), reshard={"samples_per_shard": samples_per_shard})
    return Graph(recipe, out, _WORK, Given(ready_pool(pool), subset=subset))


def pretrain_graph(pool: str, out: str, config: PretrainConfig, subset: str | None = None) -> Graph:
    """Train one model for each of the config's seeds, in `out/model`."""
    recipe = _recipe(pool=(pool,), pretrain=config)
    return Graph(recipe, out, _WORK, Given(ready_pool(pool), subset=subset))


def evaluate_graph(
    specs: Sequence[str],
    out: str,
    data: str,
    tasks: str | Sequence[str] = "all",
    protocols: Sequence[str] = ("zeroshot",),
    features: str | None = None,
    precision: str = "float32",
    max_skipped: float = 0.05,
) -> Graph:
    """Score encoders; scores.parquet is in `out` itself. Raises UsageError for a wrong argument."""
    specs = [spec.rstrip("/") or spec for spec in specs]
    if not specs:
        raise UsageError("no checkpoint to evaluate", do="Give folders, NAME:TAG, NAME:FILE or CONFIG.json:WEIGHTS.")
    if duplicates := [spec for spec in specs if specs.count(spec) > 1]:
        raise UsageError(f'"{duplicates[0]}" is given twice')
    if not tasks:
        raise UsageError("no task to evaluate", do="Give all, or names, comma-separated.")
    if precision not in ("float32", "bfloat16"):
        raise unknown("precision", precision, ("float32", "bfloat16"), "--precision")
    section = {"data": data, "tasks": tasks, "protocols": list(protocols), "precision": precision}
    recipe = _recipe(evaluate=section, max_skipped=max_skipped)
    if not is_data(data):
        raise UsageError("no such folder", where=data)
    return Graph(recipe, out, _WORK, Given(checkpoints=tuple(specs), features=features or ""))


def _recipe(**sections: Any) -> Recipe:
    """The recipe of a command: its own sections and nothing else."""
    given = {"reshard": None} | {key: value for key, value in sections.items() if value is not None}
    try:
        return build(Recipe, given, "")
    except ParameterError as error:
        raise UsageError(error.what, do=error.do) from None


def draw_samples(
    checkpoint: str, out: str, n: int, settings: dict[str, Any], pool: str | None, encoder: str | None
) -> list[str]:
    """Write a grid of n samples of a diffusion checkpoint as a PNG, and return lines for the user; with a pool and an
    encoder also the Fréchet distance from its images. `settings` are keyword arguments of
    `winnow.pretrain.diffusion.sampling.sample`."""
    if (pool is None) != (encoder is None):
        raise UsageError("a Fréchet distance takes both a pool and an encoder", do="Give --against and --features.")
    if not out.lower().endswith(".png"):
        raise UsageError("is not a .png file", where=out)
    if pool is not None and encoder is not None:
        from winnow.pretrain.encoder import encoder_digest

        Pool.open(pool)
        encoder_digest(encoder)
    from winnow.infra.io.images import write_image
    from winnow.pretrain.diffusion.sampling import grid, sample

    images = sample(checkpoint, n, **settings)
    write_image(out, grid(images))
    lines = [f"{n:,} samples: {out}"]
    if pool is not None and encoder is not None:
        from winnow.evaluate.protocols.frechet import distance_to_pool

        distance, real = distance_to_pool(images, pool, encoder)
        lines.append(f"Fréchet distance of {n:,} samples from {real:,} images, over {encoder}: {distance:.5g}")
    return lines
