"""What `import winnow` exports beyond the classes of the rooms: functions for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from winnow.curation.algebra.parse import parse
from winnow.infra.io import storage
from winnow.infra.io.parquet import read_parquet
from winnow.infra.io.storage import join
from winnow.infra.pool.pool import Pool
from winnow.infra.stages.executors import make_executor
from winnow.infra.stages.progress import RunLog
from winnow.infra.stages.runner import Budget
from winnow.infra.stages.stage import Manifest

if TYPE_CHECKING:
    from PIL.Image import Image

    from winnow.curation.algebra.nodes import Node
    from winnow.pipeline.graph import Graph
    from winnow.pretrain.encoder import Encoder


_BATCH = 256  # images embedded together


def open_pool(url: str | Path) -> Pool:
    """An indexed pool, or DataComp's folder of metadata.

    Raises:
        WinnowError: there is none; `index` makes one of shards.
    """
    return Pool.open(str(url))


def index(
    shards: str | Path | Sequence[str | Path], out: str | Path, *, captions: bool = True, executor: str = "serial"
) -> Pool:
    """Index shards (directories or URLs of NAME.tar, with or without NAME.parquet) and open the pool.

    Args:
        captions: whether a sample must have a caption.
        executor: "serial" or "ray".

    Raises:
        WinnowError: no shard, or more samples are broken than the budget of 5 % allows.
    """
    from winnow.pipeline.commands import index_graph

    urls = [shards] if isinstance(shards, str | Path) else shards
    _run(index_graph(list(map(str, urls)), str(out), captions), executor)
    return Pool.open(str(out))


def measure(
    pool: str | Path,
    out: str | Path,
    measures: Sequence[str] | Mapping[str, Any],
    *,
    scorer: str | None = None,
    executor: str = "serial",
) -> pa.Table:
    """Measure columns of a pool.

    Args:
        pool: directory or URL of an indexed pool, or shards to index first.
        out: directory; the columns are in `out/columns`.
        measures: names, or a mapping as a recipe's `measures:`.
        scorer: encoder of the clip measure, as `load_encoder` takes it.
        executor: "serial" or "ray".

    Returns:
        the columns of the pool and the measured ones (`caption.words`), one row a sample.
    """
    from winnow.curation.measures.base import parse_measures
    from winnow.pipeline.commands import measure_graph

    given = measures if isinstance(measures, Mapping) else {name: {} for name in measures}
    graph = measure_graph(str(pool), str(out), parse_measures(given), scorer)
    ids = _run(graph, executor)["measure"].values["columns"]
    tables = []
    for shard, table in Pool.open(graph.pool_url).tables():
        for name in graph.recipe.pool_measures():
            columns = read_parquet(graph.url("columns", ids[name], f"{shard.name}.parquet"))
            for field in columns.column_names:
                table = table.append_column(f"{name}.{field}", columns[field])
        tables.append(table)
    return pa.concat_tables(tables)


def parse_filters(tree: Mapping[str, Any]) -> Node:
    """A tree of filters from the form that a recipe has it in.

    Args:
        tree: `{}` for none; `{NAME: {parameter: value}}` with a registered filter or `module:Class`; joined by
            `{all: [...]}`, `{any: [...]}`, `{not: {...}}`.

    Raises:
        UsageError: an unknown filter or parameter, or a value that is refused.

    Example:
        >>> import winnow
        >>> tree = winnow.parse_filters({"any": [{"clip_score": {"threshold": 0.3}}, {"random": {"fraction": 0.1}}]})
        >>> tree == winnow.ClipScore(threshold=0.3) | winnow.RandomFraction(fraction=0.1)
        True
    """
    return parse(tree)


def embed(
    encoder: str | Encoder, *, images: Sequence[Image] | None = None, texts: Sequence[str] | None = None
) -> np.ndarray:
    """Embeddings of RGB images or of texts, by an encoder or what `load_encoder` takes; L2-normalised float32, shape
    [n, dim].

    Raises:
        UsageError: the encoder reads no text.
        ValueError: both or neither of images and texts are given.

    Example:
        >>> import winnow
        >>> from PIL import Image
        >>> winnow.embed("pixels:8", images=[Image.new("RGB", (20, 20), "red")]).shape
        (1, 192)
    """
    from winnow.pretrain.encoder import load_encoder

    if (images is None) == (texts is None):
        raise ValueError("give either images or texts")
    loaded = load_encoder(encoder) if isinstance(encoder, str) else encoder
    if texts is not None:
        return loaded.encode_texts(list(texts))
    import torch

    parts = [np.empty((0, loaded.dim), np.float32)]
    for start in range(0, len(images or ()), _BATCH):
        crops = torch.stack([loaded.crop(image) for image in (images or ())[start : start + _BATCH]])
        parts.append(loaded.encode_images(loaded.normalise(crops)))
    return np.concatenate(parts)


def evaluate_encoders(
    encoders: str | Sequence[str],
    data: str | Path,
    out: str | Path,
    *,
    tasks: str | Sequence[str] = "all",
    protocols: Sequence[str] = ("zeroshot",),
    executor: str = "serial",
) -> pa.Table:
    """Score encoders on evaluation sets.

    Args:
        encoders: one or several, as `load_encoder` takes them.
        data: folder of sets in DataComp's layout, or `hf://datasets/OWNER`.
        out: directory of the scores and of the embeddings.
        tasks: "all", or names.
        protocols: names; `winnow ls protocols` lists them.
        executor: "serial" or "ray".

    Returns:
        the scores: checkpoint, task, protocol, metric, value, n, stderr, task_version, seed.
    """
    from winnow.pipeline.commands import evaluate_graph

    specs = [encoders] if isinstance(encoders, str) else encoders
    wanted = tasks if tasks == "all" else [tasks] if isinstance(tasks, str) else tasks
    _run(evaluate_graph(specs, str(out), str(data), wanted, protocols), executor)
    return read_parquet(join(str(out), "scores.parquet"))


def run(
    recipe: str | Path, out: str | Path, *, overrides: Sequence[str] = (), executor: str = "ray"
) -> dict[str, Manifest]:
    """Run a recipe from the pool to the report.

    Args:
        recipe: a file, or the name of a packaged recipe ("quickstart").
        out: directory of the run.
        overrides: `key.path=value`, the value in YAML.
        executor: "serial" or "ray".

    Returns:
        the manifest of each step by its name.

    Raises:
        UsageError: the recipe is wrong.
        WinnowError: a step failed.
    """
    from winnow.infra.importing import search_also
    from winnow.pipeline.graph import Graph
    from winnow.pipeline.recipe.load import load_recipe

    search_also(Path(recipe).absolute().parent)
    return _run(Graph(load_recipe(str(recipe), list(overrides)), str(out)), executor)


def compare(runs: Sequence[str | Path], out: str | Path, *, baseline: str | None = None) -> dict[str, Any]:
    """Compare the subsets of finished runs with one of them. `out` gets the table and the HTML report. Returns the
    content of `out/comparison.json`."""
    from winnow.pipeline.steps import compare_steps, run_steps

    steps = compare_steps(list(map(str, runs)), baseline, str(out))
    run_steps(steps, make_executor("serial"), RunLog(str(out), stream=None), Budget())
    return dict(storage.read_json(join(str(out), "comparison.json")))


def _run(graph: Graph, executor: str) -> dict[str, Manifest]:
    runner = make_executor(executor)
    try:
        return graph.run(runner, RunLog(graph.out, stream=None))
    finally:
        runner.close()
