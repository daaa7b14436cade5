"""What the single-stage commands need between their arguments and a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml

from winnow.infra.errors import UsageError
from winnow.infra.io import storage
from winnow.infra.io.parquet import read_parquet
from winnow.infra.io.storage import digest_json, join
from winnow.infra.pool.metadata import is_metadata
from winnow.infra.pool.pool import Pool
from winnow.infra.registry import unknown
from winnow.infra.stages.runner import Budget
from winnow.infra.stages.stage import Stage, need_manifest, read_manifest
from winnow.pipeline.listing import aligned

if TYPE_CHECKING:
    from winnow.curation.algebra.tree import NodeDecision
    from winnow.curation.filters.base import Node
    from winnow.evaluate.stage import EvaluateStage

STAGES = ("demo", "index", "inject", "pretrain", "measure", "curate", "reshard", "embed", "evaluate", "compare")


def check_stage(name: str | None) -> None:
    """Raises UsageError when `--until` names no stage."""
    if name is not None and name not in STAGES:
        raise unknown("stage", name, STAGES, "--until")


def make_measures(names: list[str], scorer: str | None) -> tuple[Any, ...]:
    """Measures by name, and those they read of, with the given encoder where they want one.

    Raises:
        UsageError: one wants an encoder and there is none, or parameters that only a recipe can give.
    """
    from winnow.curation.measures import MEASURES
    from winnow.curation.measures.base import make, with_upstream

    def encoder() -> tuple[str, str]:
        if scorer is None:
            raise UsageError("the clip measure needs an encoder", do="Give --scorer: a checkpoint folder, or NAME:TAG.")
        from winnow.pretrain.encoder import encoder_digest

        return scorer, encoder_digest(scorer)

    return tuple(make(kind, {}, encoder) for kind in with_upstream(names, MEASURES.load).values())


def load_filters(path: str) -> dict[str, Any]:
    """The tree in a YAML file, checked. Raises UsageError."""
    from winnow.curation.algebra.tree import parse
    from winnow.pipeline.recipe.load import find_lines

    if not storage.exists(path):
        raise UsageError("no such file", where=path)
    try:
        text = storage.read_bytes(path)
        tree = yaml.safe_load(text)
        if (root := yaml.compose(text, yaml.SafeLoader)) is not None:
            find_lines(root, (), {}, path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"is not valid YAML ({' '.join(str(error).split())})", where=path) from None
    try:
        parse(tree)
    except UsageError as error:
        raise UsageError(error.what, where=path, do=error.do) from None
    return tree or {}


def need_images(pool: str, names: list[str], where: str | None = None) -> None:
    """Raises UsageError when a measure wants images and the pool is a folder of metadata."""
    from winnow.curation.measures import MEASURES

    for name in names:
        kind = MEASURES.load(name)
        if (kind.pixels or kind.encoded) and is_metadata(pool):
            hint = "Give the shards with the images as the pool."
            if name == "clip":
                hint += " Scores and embeddings that the metadata has are called by `model: b32` or `l14`, `l14_img` …"
            raise UsageError(
                f'the measure "{name}" needs images, and the pool is a folder of metadata',
                where=where or pool,
                do=hint,
            )


def curate_stages(
    tree: dict[str, Any], pool: str, out: str, scorer: str | None, columns: str | None, reasons: bool = True
) -> list[Stage]:
    """The measure stages that a tree needs, and the curate stage."""
    from winnow.curation.algebra.tree import parse
    from winnow.curation.columns.table import measure_of
    from winnow.curation.curate import CurateStage, MeasuredPool, check_trees, columns_of
    from winnow.curation.measures.stage import MeasureStage
    from winnow.infra.pool.index import IndexStage

    node = parse(tree)
    stages: list[Stage] = []
    ready = {t: MeasuredPool(t) for item in node.filters() for t in item.targets() if is_metadata(t)}
    check_trees(MeasuredPool(pool), [tree], ready)
    names = sorted({name for column in columns_of(node) if (name := measure_of(column))})
    if names and columns is None:
        need_images(pool, names)
        columns = join(out, "work", "columns")
        stages.append(MeasureStage(pool, make_measures(names, scorer), columns))
    targets = {}
    for item in node.filters():
        for target in item.targets():
            if target in targets:
                continue
            if is_metadata(target):
                targets[target] = MeasuredPool(storage.absolute(target))
                continue
            work = join(out, "work", f"target-{digest_json(storage.absolute(target))[:8]}")
            stages.append(IndexStage((target,), work, captions=False))
            wanted = target_measures(node, target)
            stages.append(MeasureStage(work, make_measures(wanted, scorer), join(work, "columns")))
            targets[target] = MeasuredPool(work, join(work, "columns"))
    stages.append(CurateStage(MeasuredPool(pool, columns), (("", tree),), out, targets, reasons))
    return stages


def target_measures(node: Node, target: str) -> list[str]:
    """Names of the measures whose columns a tree's filters read of a target set."""
    from winnow.curation.columns.table import measure_of

    columns = [name for item in node.filters() if target in item.targets() for name in item.target_columns()]
    return sorted({name for column in columns if (name := measure_of(column))})


def print_why(uid: str, dropped_by: str | None, decisions: Sequence[NodeDecision]) -> str:
    """What each node of a tree said of one sample, as an indented table under one sentence."""
    rows: list[tuple[str, ...]] = [("node", "verdict", "values")]
    for decision in decisions:
        facts = ", ".join(f"{name} = {_value(value)}" for name, value in decision.facts.items())
        rows.append((f"{'  ' * decision.depth}{decision.label}", "keeps" if decision.kept else "drops", facts))
    end = "kept" if dropped_by is None else f"dropped by {dropped_by}"
    return f"{uid} is {end}.\n{aligned(rows)}"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    text = f"{value:.6g}" if isinstance(value, float) else f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def print_funnel(funnel: dict[str, Any], timings: dict[str, float]) -> str:
    """The funnel as an indented table, and under it what each filter was fitted to and the seconds that took."""
    facts: dict[str, str] = {}
    rows: list[tuple[str, ...]] = [("node", "kept", "dropped", "by it alone", "no value")]

    def walk(node: dict[str, Any], depth: int) -> None:
        counts = [f"{node[name]:,}" for name in ("kept", "dropped", "alone", "nan")]
        rows.append((f"{'  ' * depth}{node['label']}", *counts))
        if found := [f"{name} = {_value(value)}" for name, value in node.get("facts", {}).items()]:
            facts[node["label"]] = ", ".join(found)
        for child in node["children"]:
            walk(child, depth + 1)

    walk(funnel["tree"], 0)
    lines = [
        f"{label}: {', '.join(filter(None, [facts.get(label), f'fitted in {seconds:.2f} s']))}"
        for label, seconds in timings.items()
        if label in facts
    ]
    return "\n".join([aligned(rows), *lines])


def load_pretrain_config(path: str | None, overrides: list[str]) -> Any:
    """A PretrainConfig out of a YAML file and `--set key=value`. Raises UsageError."""
    from winnow.pipeline.recipe.load import read_model
    from winnow.pretrain.config import PretrainConfig

    text = "{}" if path is None else storage.read_bytes(path).decode(errors="replace")
    return read_model(PretrainConfig, text, path or "--set", overrides)[0]


def pretrain_stage(config: Any, pool: str, subset: str | None, seed: int, out: str) -> Stage:
    """The stage that trains one model."""
    from winnow.pretrain.stage import PretrainStage, TrainRun

    manifest = read_manifest(pool)
    if config.reads_text and manifest is not None and manifest.params.get("captions") is False:
        raise UsageError(
            f"was indexed without asking for captions, from which {config.objective_name} learns",
            where=pool,
            do="Index it again, without --no-captions.",
        )
    mark = storage.digest_file(subset) if subset is not None else None
    digest = digest_json([Pool.open(pool).digest, mark])
    run = TrainRun(name="model", seed=seed, pool=pool, subset=subset, digest=digest)
    return PretrainStage(config=config, runs=(run,), out=out)


def draw_samples(
    checkpoint: str, out: str, n: int, settings: dict[str, Any], pool: str | None, encoder: str | None
) -> list[str]:
    """Write a grid of samples; with a pool and an encoder also say how far from its images they are.

    Args:
        settings: keyword arguments of `winnow.pretrain.diffusion.sampling.sample`.
    """
    if (pool is None) != (encoder is None):
        raise UsageError("a Fréchet distance takes both a pool and an encoder", do="Give --against and --features.")
    if not out.lower().endswith(".png"):
        raise UsageError("is no .png file", where=out)
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


def evaluate_stage(
    specs: list[str],
    data: str,
    tasks: str,
    protocols: str,
    out: str,
    features: str | None = None,
    precision: str = "float32",
    max_skipped: float = 0.05,
) -> EvaluateStage:
    """The stage that scores checkpoints; its `embedding()` comes first. Raises UsageError for a wrong argument."""
    from winnow.evaluate.protocols import PROTOCOLS
    from winnow.evaluate.sets.layout import is_data
    from winnow.evaluate.stage import EvaluateStage
    from winnow.pretrain.encoder import encoder_digest

    specs = [spec.rstrip("/") or spec for spec in specs]
    if not specs:
        raise UsageError("no checkpoint to evaluate", do="Give folders, NAME:TAG, NAME:FILE or CONFIG.json:WEIGHTS.")
    if duplicates := [spec for spec in specs if specs.count(spec) > 1]:
        raise UsageError(f'"{duplicates[0]}" is given twice')
    if not is_data(data):
        raise UsageError("no such folder", where=data)
    selected = _names(protocols)
    for protocol in selected:
        PROTOCOLS.path(protocol)
    if not _names(tasks):
        raise UsageError("no task to evaluate", do="Give all, or names, comma-separated.")
    if precision not in ("float32", "bfloat16"):
        raise unknown("precision", precision, ("float32", "bfloat16"), "--precision")
    Budget(max_skipped)
    return EvaluateStage(
        checkpoints=tuple((spec, spec, encoder_digest(spec)) for spec in specs),
        data=data,
        tasks=tasks if tasks == "all" else _names(tasks),
        protocols=selected,
        features=features or "",
        out=out,
        precision=precision,
        max_skipped=max_skipped,
    )


def _names(text: str) -> tuple[str, ...]:
    """Names that commas divide, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def check_text(data: str, tasks: str) -> str:
    """Which evaluation sets are there. Raises UsageError."""
    from winnow.evaluate.check import check_table, check_tasks

    return check_table(check_tasks(storage.absolute(data), tasks if tasks == "all" else _names(tasks)))


def score_table(out: str) -> str:
    """The main metrics of a finished evaluation as text."""
    from winnow.evaluate.report.score_table import scores_text

    rows = read_parquet(join(out, "scores.parquet")).to_pylist()
    return scores_text(rows, need_manifest(out, "scores").values)


def unscored(out: str) -> list[str]:
    """Checkpoints of a finished evaluation without any figure, with the reason."""
    scored = set(read_parquet(join(out, "scores.parquet"), ["checkpoint"])["checkpoint"].to_pylist())
    values = need_manifest(out, "scores").values
    reasons = {entry["checkpoint"]: entry["reason"] for entry in reversed(values["missing"])}
    without = [name for name in values["checkpoints"] if name not in scored and name in reasons]
    return [f"{name}: {reasons[name].rstrip('.')}" for name in without]


def compare_stages(runs: list[str], baseline: str | None, out: str) -> list[Stage]:
    """What compares the subsets of finished runs; with several runs, names get the run's in front."""
    from winnow.evaluate.report.compare import CompareStage
    from winnow.evaluate.report.merge import MergeScoresStage
    from winnow.pipeline.graph import Graph
    from winnow.pipeline.recipe.load import parse_recipe

    if storage.absolute(out) in map(storage.absolute, runs):
        raise UsageError("compare would write into a run", where=out, do="Give another directory.")
    graphs = {}
    for url in runs:
        name = storage.name_of(url)
        if name in graphs:
            raise UsageError(f'two runs are called "{name}"', do="Rename one of the directories.")
        need_manifest(join(url, "scores"), "scores")
        text = storage.read_bytes(join(url, "recipe.yaml")).decode()
        graphs[name] = Graph(parse_recipe(text, join(url, "recipe.yaml"), []), url)
    first = next(iter(graphs.values()))
    stages: list[Stage] = []
    if len(graphs) == 1:
        entries, scores, reference = first.entries(), first.url("scores"), first.recipe.reference
    else:
        scores = join(storage.absolute(out), "scores")
        stages.append(MergeScoresStage(tuple((name, graph.url("scores")) for name, graph in graphs.items()), scores))
        entries = tuple(entry for name, graph in graphs.items() for entry in graph.entries(f"{name}/"))
        reference = f"{next(iter(graphs))}/{first.recipe.reference}"
    names = [entry.name for entry in entries]
    if baseline is not None and baseline not in names:
        raise unknown("baseline", baseline, names, "--baseline")
    return [*stages, CompareStage(entries, scores, out, baseline or reference)]
