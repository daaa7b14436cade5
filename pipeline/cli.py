"""The command line. Exit status: 0 done; 1 failed; 2 wrong usage or recipe."""

from __future__ import annotations

import math
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.importing import search_also
from winnow.infra.io import storage
from winnow.infra.pool.metadata import is_metadata
from winnow.infra.stages.executors import make_executor
from winnow.infra.stages.progress import RunLog
from winnow.infra.stages.runner import Budget, execute
from winnow.infra.stages.stage import LOCATIONS, RECORDS, Manifest, Stage, read_manifest

app = typer.Typer(
    name="winnow",
    help="Curate web image-text shards, pretrain on the subsets, and say which subset was better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Out = Annotated[str, typer.Option("--out", help="Directory or URL to write to.")]
ExecutorName = Annotated[str, typer.Option("--executor", help="Where units run: ray or serial.")]
Address = Annotated[str | None, typer.Option("--address", help="Ray cluster to join; none starts one on this machine.")]
MaxSkipped = Annotated[
    float, typer.Option("--max-skipped", help="Budget of samples skipped: a share below 1, else a number.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, value in YAML.")
]


def _search_custom(*files: str | None) -> None:
    """Let `module:Class` names be found next to a recipe and in the working directory, after all else."""
    search_also(*(Path(file).absolute().parent for file in files if file is not None), Path.cwd())


def _run(stage: Stage, executor: str, address: str | None, max_skipped: float = 0.05) -> Manifest:
    runner = make_executor(executor, address)
    try:
        return execute(stage, runner, budget=Budget(max_skipped), log=RunLog(stage.out))
    finally:
        runner.close()


def _pool(
    url: str, work: str, executor: str, address: str | None, captions: bool = True, max_skipped: float = 0.05
) -> str:
    """The pool directory of a URL: itself if it is indexed or a folder of metadata, else an index made below `work`."""
    try:
        manifest = read_manifest(url)
    except WinnowError:  # a file of that name that is not ours
        manifest = None
    if (manifest is not None and "shards" in manifest.values) or is_metadata(url):
        return storage.absolute(url)
    if manifest is None and storage.exists(storage.join(url, LOCATIONS)) and storage.is_dir(storage.join(url, RECORDS)):
        raise WinnowError("is not finished", where=url, do="Run again what makes it.")
    from winnow.infra.pool.index import IndexStage

    out = storage.join(storage.absolute(work), "pool")
    _run(IndexStage((url,), out, captions=captions), executor, address, max_skipped)
    return out


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a packaged one (quickstart, real).")],
    out: Annotated[str | None, typer.Option("--out", help="Directory of the run; runs/NAME if not given.")] = None,
    overrides: Overrides = None,
    executor: ExecutorName = "ray",
    address: Address = None,
    until: Annotated[str | None, typer.Option("--until", help="Stop after this stage (curate, say).")] = None,
    debug: Debug = False,
) -> None:
    """Run a recipe from the pool to the report. What is finished is not done again."""
    from winnow.pipeline.recipe.load import load_recipe
    from winnow.pipeline.stages import check_stage

    _search_custom(recipe)
    read = load_recipe(recipe, overrides)
    check_stage(until)
    from winnow.pipeline.graph import Graph

    graph = Graph(read, out or f"runs/{Path(recipe).stem}")
    runner = make_executor(executor, address)
    log = RunLog(graph.out)
    try:
        manifests = graph.run(runner, log, until)
    finally:
        runner.close()
    if "compare" in manifests:
        typer.echo(storage.read_bytes(graph.url("report", "comparison.txt")).decode())
        typer.echo(f"Report: {graph.url('report', 'report.html')}")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a packaged one.")],
    out: Annotated[str | None, typer.Option("--out", help="Directory of the run; runs/NAME if not given.")] = None,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Check a recipe and say what running it would do, without doing it."""
    from winnow.pipeline.recipe.load import load_recipe

    _search_custom(recipe)
    read = load_recipe(recipe, overrides)
    from winnow.pipeline.graph import Graph

    graph = Graph(read, out or f"runs/{Path(recipe).stem}")
    for step in graph.plan():
        typer.echo(f"{step.name:<24} {step.text}")


@app.command()
def index(
    pool: Annotated[list[str], typer.Argument(help="Folders or URLs of NAME.tar, with or without NAME.parquet.")],
    out: Out,
    captions: Annotated[bool, typer.Option(help="Whether a sample must have a caption.")] = True,
    executor: ExecutorName = "ray",
    address: Address = None,
    max_skipped: MaxSkipped = 0.05,
    debug: Debug = False,
) -> None:
    """Index shards: uids, captions, sizes, and the byte offsets of every member."""
    from winnow.infra.pool.index import IndexStage

    manifest = _run(IndexStage(tuple(pool), out, captions=captions), executor, address, max_skipped)
    typer.echo(f"{manifest.items:,} samples in {manifest.units} shards, {manifest.state}: {out}")


@app.command()
def measure(
    pool: Annotated[str, typer.Argument(help="Indexed pool, shards to index first, or DataComp's metadata folder.")],
    out: Out,
    measures: Annotated[
        str, typer.Option("--measures", help="Names, comma-separated; `winnow ls measures` lists them.")
    ],
    scorer: Annotated[
        str | None, typer.Option("--scorer", help="Encoder of the clip measure: a checkpoint, or NAME:TAG.")
    ] = None,
    captions: Annotated[bool, typer.Option(help="Whether a sample must have a caption.")] = True,
    executor: ExecutorName = "ray",
    address: Address = None,
    max_skipped: MaxSkipped = 0.05,
    debug: Debug = False,
) -> None:
    """Compute columns: embeddings and scores, language, caption statistics."""
    from winnow.curation.measures.stage import MeasureStage
    from winnow.pipeline.stages import make_measures, need_images

    names = [name.strip() for name in measures.split(",")]
    need_images(pool, names)
    made = make_measures(names, scorer)
    url = _pool(pool, out, executor, address, captions, max_skipped)
    stage = MeasureStage(url, made, storage.join(out, "columns"))
    manifest = _run(stage.with_existing(), executor, address, max_skipped)
    typer.echo(f"{', '.join(manifest.values['columns'])}: {storage.join(out, 'columns')}")


@app.command()
def curate(
    pool: Annotated[str, typer.Argument(help="Indexed pool, shards to index first, or DataComp's metadata folder.")],
    out: Out,
    filters: Annotated[str, typer.Option("--filters", help="YAML file with one tree of filters.")],
    scorer: Annotated[
        str | None, typer.Option("--scorer", help="Encoder of the clip measure: a checkpoint, or NAME:TAG.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="Columns measured before; else they are measured here.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the funnel.")] = False,
    why: Annotated[
        str | None, typer.Option("--why", metavar="UID", help="Say what each node made of this sample.")
    ] = None,
    reasons: Annotated[
        bool, typer.Option("--reasons", help="Write reasons.parquet: for each dropped sample, which node dropped it.")
    ] = False,
    executor: ExecutorName = "ray",
    address: Address = None,
    max_skipped: MaxSkipped = 0.05,
    debug: Debug = False,
) -> None:
    """Apply a tree of filters; write subset.npy, funnel.json and the manifest."""
    from winnow.curation.curate import CurateStage, check_uid
    from winnow.pipeline.stages import curate_stages, load_filters, print_funnel, print_why

    _search_custom(filters)
    tree = load_filters(filters)
    if why is not None:
        check_uid(why)
    runner = make_executor(executor, address)
    try:
        url = _pool(pool, storage.join(out, "work"), executor, address, max_skipped=max_skipped)
        for stage in curate_stages(tree, url, out, scorer, columns, reasons):
            manifest = execute(stage, runner, budget=Budget(max_skipped), log=RunLog(out))
    finally:
        runner.close()
    if explain:
        funnel, timings = (storage.read_json(storage.join(out, name)) for name in ("funnel.json", "timings.json"))
        typer.echo(print_funnel(funnel, timings))
    if why is not None:
        assert isinstance(stage, CurateStage)
        typer.echo(print_why(why, *stage.why("", why)))
    kept = manifest.values["subsets"]["subset"]
    typer.echo(f"{kept:,} of {manifest.items:,} samples: {storage.join(out, 'subset.npy')}")


@app.command()
def reshard(
    pool: Annotated[str, typer.Argument(help="Indexed pool, or shards to index first.")],
    out: Out,
    subset: Annotated[
        str | None, typer.Option("--subset", help="Subset file (.npy); the whole pool if not given.")
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in each shard but the last.")] = 10_000,
    executor: ExecutorName = "ray",
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Copy a subset's samples into webdataset shards of its own."""
    from winnow.curation.reshard import ReshardStage, subset_digest

    digest = subset_digest(subset) if subset is not None else ""
    url = _pool(pool, storage.join(out, "work"), executor, address)
    manifest = _run(ReshardStage(url, subset, digest, out, samples_per_shard), executor, address)
    typer.echo(f"{manifest.items:,} samples in {manifest.units} shards: {out}")


@app.command()
def pretrain(
    pool: Annotated[str, typer.Argument(help="Indexed pool or resharded subset, or shards to index first.")],
    out: Out,
    config: Annotated[
        str | None, typer.Option("--config", help="YAML file with the keys of a recipe's `pretrain:`.")
    ] = None,
    overrides: Overrides = None,
    subset: Annotated[str | None, typer.Option("--subset", help="Subset file (.npy) to train on.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and the order.")] = 0,
    executor: ExecutorName = "ray",
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Train a model; stopped and started again it goes on where it was."""
    from winnow.pipeline.stages import load_pretrain_config, pretrain_stage

    _search_custom(config)
    read = load_pretrain_config(config, overrides or [])
    url = _pool(pool, storage.join(out, "work"), executor, address, captions=read.reads_text)
    _run(pretrain_stage(read, url, subset, seed, out), executor, address)
    typer.echo(f"Checkpoint: {storage.join(out, 'model', f'seed-{seed}')}")


@app.command()
def sample(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder of a diffusion training.")],
    out: Annotated[str, typer.Option("--out", help="PNG file to write the grid of samples to.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of samples.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Timesteps that the sampler visits.")] = 50,
    guidance: Annotated[float, typer.Option(help="Weight w of classifier-free guidance; 0 for none.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    sampler: Annotated[str, typer.Option(help="ddim or ancestral.")] = "ddim",
    eta: Annotated[float, typer.Option(min=0, help="Of DDIM: 0 adds no noise, 1 as much as ancestral sampling.")] = 0.0,
    classes: Annotated[str | None, typer.Option(help="Classes, comma-separated, in turn; all if not given.")] = None,
    caption: Annotated[list[str] | None, typer.Option("--caption", help="A caption; several take turns.")] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Indexed pool to say the samples' Fréchet distance from.")
    ] = None,
    features: Annotated[
        str | None, typer.Option("--features", help="Encoder over whose features that distance is.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw images from a diffusion checkpoint."""
    from winnow.pipeline.stages import draw_samples

    selected = [name.strip() for name in classes.split(",")] if classes else None
    settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed, "sampler": sampler, "eta": eta}
    settings |= {"classes": selected, "captions": caption}
    for line in draw_samples(checkpoint, out, n, settings, against, features):
        typer.echo(line)


@app.command()
def evaluate(
    data: Annotated[
        str, typer.Option("--data", help="Folder of evaluation sets in DataComp's layout, or hf://datasets/OWNER.")
    ],
    specs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SPEC...", help="Checkpoint folders, NAME:TAG, NAME:FILE, CONFIG.json:WEIGHTS, pixels:SIZE."
        ),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="Directory or URL to write to.")] = None,
    tasks: Annotated[str, typer.Option("--tasks", help="all, or names, comma-separated.")] = "all",
    protocols: Annotated[
        str, typer.Option("--protocols", help="Comma-separated; `winnow ls protocols` lists them.")
    ] = "zeroshot",
    features: Annotated[
        str | None,
        typer.Option("--features", help="Where embeddings are kept and looked for; OUT/features if not given."),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="Of the encoders: float32, or bfloat16, faster on a GPU.")
    ] = "float32",
    check: Annotated[
        bool, typer.Option("--check", help="Say which sets are there, whole or in part, and do nothing else.")
    ] = False,
    executor: ExecutorName = "ray",
    address: Address = None,
    max_skipped: Annotated[
        float,
        typer.Option(
            "--max-skipped",
            help="Share (or number, from 1 up) of a set's images that may be undecodable; with more it is left out.",
        ),
    ] = 0.05,
    debug: Debug = False,
) -> None:
    """Score checkpoints on the evaluation sets; write scores.parquet and eval_results.jsonl."""
    from winnow.pipeline.stages import check_text, evaluate_stage, score_table, unscored

    if check:
        typer.echo(check_text(data, tasks))
        return
    if out is None:
        raise UsageError("--out is missing", do="Give the directory to write to.")
    stage = evaluate_stage(specs or [], data, tasks, protocols, out, features, precision, max_skipped)
    runner = make_executor(executor, address)
    try:
        # A broken set is missing, and the others' figures stand; how many images a set may lack the stage knows.
        execute(stage.embedding(), runner, budget=Budget(math.inf), log=RunLog(out))
        execute(stage, runner, budget=Budget(math.inf), log=RunLog(out))
    finally:
        runner.close()
    typer.echo(score_table(out))
    if without := unscored(out):
        raise WinnowError(f"no figure of {'; '.join(without)}")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Directories of finished runs.")],
    out: Out,
    baseline: Annotated[str | None, typer.Option("--baseline", help="Subset the others are compared with.")] = None,
    debug: Debug = False,
) -> None:
    """Compare the subsets of one or more runs: table, CSV and HTML report."""
    from winnow.pipeline.stages import compare_stages

    for stage in compare_stages(runs, baseline, out):
        _run(stage, "serial", None)
    typer.echo(storage.read_bytes(storage.join(out, "comparison.txt")).decode())
    typer.echo(f"Report: {storage.join(storage.absolute(out), 'report.html')}")


@app.command()
def ls(
    what: Annotated[str, typer.Argument(help="filters, measures, objectives, tasks, protocols or recipes.")],
    debug: Debug = False,
) -> None:
    """List what is registered."""
    from winnow.pipeline.listing import listing

    typer.echo(listing(what))


@app.command()
def doctor(debug: Debug = False) -> None:
    """Check this machine: versions, shadowed packages, devices, space. Exit status 1 if something is broken."""
    from winnow.pipeline.doctor import examine

    findings = examine()
    for finding in findings:
        typer.echo(finding.line())
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


STOPPED = "winnow: stopped; what is finished is kept."
INTERRUPTED = 130  # exit status, as shells have it


def main() -> None:
    """Entry point: errors become one paragraph on stderr."""
    debug = "--debug" in sys.argv or os.environ.get("WINNOW_DEBUG") == "1"
    try:
        app()
    except WinnowError as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"winnow: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # typer's answer to an interrupt
            print(STOPPED, file=sys.stderr)
        raise
    except Exception as error:
        if debug:
            raise
        print(f"winnow: {type(error).__name__}: {error} (--debug shows where).", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    # `python -m` puts the working directory first, where a file may have the name of an installed module.
    sys.path.append(sys.path.pop(0))
    main()
