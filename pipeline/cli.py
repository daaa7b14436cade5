"""The command line. Exit status: 0 done; 1 failed; 2 wrong usage or recipe."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from winnow.infra.errors import StorageError, UsageError, WinnowError
from winnow.infra.importing import search_also
from winnow.infra.io import storage
from winnow.infra.registry import unknown
from winnow.infra.stages.executors import make_executor
from winnow.infra.stages.progress import RunLog
from winnow.infra.stages.runner import Budget
from winnow.infra.stages.stage import Manifest

if TYPE_CHECKING:
    from winnow.pipeline.graph import Graph

app = typer.Typer(
    name="winnow",
    help="Curate web image-text shards, pretrain on the subsets, and say which subset was better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _known_executor(name: str) -> str:
    """Refuses another name before a recipe's models are checked, which imports torch."""
    make_executor(name)
    return name


def _known_step(name: str | None) -> str | None:
    from winnow.pipeline.steps import STEPS

    if name is not None and name not in STEPS:
        raise unknown("stage", name, STEPS, "--until")
    return name


Out = Annotated[str, Option("--out", help="Directory or URL to write to.")]
ExecutorName = Annotated[str, Option("--executor", help="Where units run: ray or serial.", callback=_known_executor)]
Address = Annotated[str | None, Option("--address", help="Ray cluster to join; none starts one on this machine.")]
MaxSkipped = Annotated[
    float, Option("--max-skipped", help="Budget of samples skipped: a share below 1, else a number.")
]
ScorerSpec = Annotated[str | None, Option("--scorer", help="Encoder of the clip measure: a checkpoint, or NAME:TAG.")]
Debug = Annotated[bool, Option("--debug", help="Show tracebacks.")]
Overrides = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override a key, value in YAML.")]


def _search_custom(*files: str | None) -> None:
    """Let `module:Class` names be found next to a recipe and in the working directory, after all else."""
    search_also(*(Path(file).absolute().parent for file in files if file is not None), Path.cwd())


def _run(graph: Graph, executor: str, address: str | None, until: str | None = None) -> dict[str, Manifest]:
    runner = make_executor(executor, address)
    try:
        return graph.run(runner, RunLog(graph.out), until)
    finally:
        runner.close()


def _graph(recipe: str, out: str | None, overrides: list[str] | None) -> Graph:
    """The graph of a recipe, which is checked before anything heavy is imported."""
    from winnow.pipeline.recipe.load import load_recipe

    _search_custom(recipe)
    read = load_recipe(recipe, overrides)
    from winnow.pipeline.graph import Graph

    return Graph(read, out or f"runs/{Path(recipe).stem}")


def _names(text: str) -> tuple[str, ...]:
    """Names divided by commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


@app.command()
def run(
    recipe: Annotated[str, Argument(help="Recipe file, or the name of a packaged one (quickstart, real).")],
    out: Annotated[str | None, Option("--out", help="Directory of the run; runs/NAME if not given.")] = None,
    overrides: Overrides = None,
    executor: ExecutorName = "ray",
    address: Address = None,
    until: Annotated[
        str | None, Option("--until", help="Stop after this stage (curate, say).", callback=_known_step)
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a recipe from the pool to the report. What is finished is not done again."""
    graph = _graph(recipe, out, overrides)
    manifests = _run(graph, executor, address, until)
    if "compare" in manifests:
        typer.echo(storage.read_bytes(graph.url("report", "comparison.txt")).decode())
        typer.echo(f"Report: {graph.url('report', 'report.html')}")


@app.command()
def plan(
    recipe: Annotated[str, Argument(help="Recipe file, or the name of a packaged one.")],
    out: Annotated[str | None, Option("--out", help="Directory of the run; runs/NAME if not given.")] = None,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Check a recipe and say what running it would do, without doing it."""
    for step in _graph(recipe, out, overrides).plan():
        typer.echo(f"{step.name:<24} {step.text}")


@app.command()
def index(
    pool: Annotated[list[str], Argument(help="Folders or URLs of NAME.tar, with or without NAME.parquet.")],
    out: Out,
    captions: Annotated[bool, Option(help="Whether a sample must have a caption.")] = True,
    executor: ExecutorName = "ray",
    address: Address = None,
    max_skipped: MaxSkipped = 0.05,
    debug: Debug = False,
) -> None:
    """Index shards: uids, captions, sizes, and the byte offsets of every member."""
    from winnow.pipeline.commands import index_graph

    manifest = _run(index_graph(pool, out, captions, max_skipped), executor, address)["index"]
    typer.echo(f"{manifest.items:,} samples in {manifest.units} shards, {manifest.state}: {out}")


@app.command()
def measure(
    pool: Annotated[str, Argument(help="Indexed pool, shards to index first, or DataComp's metadata folder.")],
    out: Out,
    measures: Annotated[
        str, Option("--measures", help="Names, comma-separated, or a YAML mapping or file as a recipe's `measures:`.")
    ],
    overrides: Overrides = None,
    scorer: ScorerSpec = None,
    captions: Annotated[bool, Option(help="Whether a sample must have a caption.")] = True,
    executor: ExecutorName = "ray",
    address: Address = None,
    max_skipped: MaxSkipped = 0.05,
    debug: Debug = False,
) -> None:
    """Compute columns: embeddings and scores, language, caption statistics."""
    from winnow.pipeline.commands import measure_graph
    from winnow.pipeline.recipe.load import load_measures

    _search_custom()
    wanted = load_measures(measures, overrides or [])
    graph = measure_graph(pool, out, wanted, scorer, captions, max_skipped)
    manifest = _run(graph, executor, address)["measure"]
    typer.echo(f"{', '.join(manifest.values['columns'])}: {storage.join(out, 'columns')}")


@app.command()
def curate(
    pool: Annotated[str, Argument(help="Indexed pool, shards to index first, or DataComp's metadata folder.")],
    out: Out,
    filters: Annotated[str, Option("--filters", help="YAML file with one tree of filters.")],
    measures: Annotated[
        str | None,
        Option("--measures", help="Parameters of measures: a YAML mapping or file as a recipe's `measures:`."),
    ] = None,
    overrides: Overrides = None,
    scorer: ScorerSpec = None,
    columns: Annotated[
        str | None, Option("--columns", help="Columns measured before; else they are measured here.")
    ] = None,
    explain: Annotated[bool, Option("--explain", help="Print the funnel.")] = False,
    why: Annotated[
        str | None, Option("--why", metavar="UID", help="Report what each node decided about this sample.")
    ] = None,
    reasons: Annotated[
        bool, Option("--reasons", help="Write reasons.parquet: for each dropped sample, which node dropped it.")
    ] = False,
    executor: ExecutorName = "ray",
    address: Address = None,
    max_skipped: MaxSkipped = 0.05,
    debug: Debug = False,
) -> None:
    """Apply a tree of filters; write subset.npy, funnel.json and the manifest."""
    from winnow.curation.curate import check_uid
    from winnow.pipeline import printing
    from winnow.pipeline.commands import curate_graph
    from winnow.pipeline.recipe.load import load_measures, load_tree

    _search_custom(filters)
    tree = load_tree(filters)
    if why is not None:
        check_uid(why)
    parameters = load_measures(measures or "", overrides or [])
    graph = curate_graph(pool, out, tree, parameters, scorer, columns, reasons, max_skipped)
    manifest = _run(graph, executor, address)["curate"]
    if explain:
        counts, timings = (storage.read_json(storage.join(out, name)) for name in ("funnel.json", "timings.json"))
        typer.echo(printing.funnel(counts, timings))
    if why is not None:
        typer.echo(printing.decisions(why, *graph.curate_stage().why("", why)))
    kept = manifest.values["subsets"]["subset"]
    skipped = f", {count:,} skipped" if (count := manifest.skipped["count"]) else ""
    typer.echo(f"{kept:,} of {manifest.items:,} samples{skipped}: {storage.join(out, 'subset.npy')}")


@app.command()
def reshard(
    pool: Annotated[str, Argument(help="Indexed pool, or shards to index first.")],
    out: Out,
    subset: Annotated[str | None, Option("--subset", help="Subset file (.npy); the whole pool if not given.")] = None,
    samples_per_shard: Annotated[int, Option(min=1, help="Samples in each shard but the last.")] = 10_000,
    executor: ExecutorName = "ray",
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Copy a subset's samples into webdataset shards."""
    from winnow.pipeline.commands import reshard_graph

    manifest = _run(reshard_graph(pool, out, subset, samples_per_shard), executor, address)["reshard"]
    typer.echo(f"{manifest.items:,} samples in {manifest.units} shards: {out}")


@app.command()
def pretrain(
    pool: Annotated[str, Argument(help="Indexed pool or resharded subset, or shards to index first.")],
    out: Out,
    config: Annotated[str | None, Option("--config", help="YAML file with the keys of a recipe's `pretrain:`.")] = None,
    overrides: Overrides = None,
    subset: Annotated[str | None, Option("--subset", help="Subset file (.npy) to train on.")] = None,
    seed: Annotated[int, Option(min=0, help="Of the weights and the order.")] = 0,
    executor: ExecutorName = "ray",
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Train a model; stopped and started again it goes on where it was."""
    from winnow.pipeline.recipe.load import load_training

    _search_custom(config)
    read = load_training(config, [*(overrides or []), f"seeds=[{seed}]"])
    from winnow.pipeline.commands import pretrain_graph

    _run(pretrain_graph(pool, out, read, subset), executor, address)
    typer.echo(f"Checkpoint: {storage.join(out, 'model', f'seed-{seed}')}")


@app.command()
def sample(
    checkpoint: Annotated[str, Argument(help="Checkpoint folder of a diffusion training.")],
    out: Annotated[str, Option("--out", help="PNG file to write the grid of samples to.")],
    n: Annotated[int, Option("--n", min=1, help="Number of samples.")] = 64,
    steps: Annotated[int, Option(min=1, help="Timesteps that the sampler visits.")] = 50,
    guidance: Annotated[float, Option(help="Weight w of classifier-free guidance; 0 for none.")] = 0.0,
    seed: Annotated[int, Option(help="Of the noise.")] = 0,
    sampler: Annotated[str, Option(help="ddim or ancestral.")] = "ddim",
    eta: Annotated[float, Option(min=0, help="Of DDIM: 0 adds no noise, 1 as much as ancestral sampling.")] = 0.0,
    classes: Annotated[str | None, Option(help="Classes, comma-separated, in turn; all if not given.")] = None,
    caption: Annotated[list[str] | None, Option("--caption", help="A caption; several take turns.")] = None,
    against: Annotated[
        str | None, Option("--against", help="Indexed pool to say the samples' Fréchet distance from.")
    ] = None,
    features: Annotated[str | None, Option("--features", help="Encoder over whose features that distance is.")] = None,
    debug: Debug = False,
) -> None:
    """Draw images from a diffusion checkpoint."""
    from winnow.pipeline.commands import draw_samples

    selected = list(_names(classes)) if classes else None
    settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed, "sampler": sampler, "eta": eta}
    settings |= {"classes": selected, "captions": caption}
    for line in draw_samples(checkpoint, out, n, settings, against, features):
        typer.echo(line)


@app.command()
def evaluate(
    data: Annotated[
        str, Option("--data", help="Folder of evaluation sets in DataComp's layout, or hf://datasets/OWNER.")
    ],
    specs: Annotated[
        list[str] | None,
        Argument(metavar="SPEC...", help="Checkpoint folders, NAME:TAG, NAME:FILE, CONFIG.json:WEIGHTS, pixels:SIZE."),
    ] = None,
    out: Annotated[str | None, Option("--out", help="Directory or URL to write to.")] = None,
    tasks: Annotated[str, Option("--tasks", help="all, or names, comma-separated.")] = "all",
    protocols: Annotated[
        str, Option("--protocols", help="Comma-separated; `winnow ls protocols` lists them.")
    ] = "zeroshot",
    features: Annotated[
        str | None, Option("--features", help="Where embeddings are kept and looked for; OUT/features if not given.")
    ] = None,
    precision: Annotated[
        str, Option("--precision", help="Of the encoders: float32, or bfloat16, faster on a GPU.")
    ] = "float32",
    check: Annotated[
        bool, Option("--check", help="Say which sets are there, whole or in part, and do nothing else.")
    ] = False,
    executor: ExecutorName = "ray",
    address: Address = None,
    max_skipped: Annotated[
        float,
        Option(
            "--max-skipped",
            help="Share (or number, from 1 up) of a set's images that may be undecodable; with more it is left out.",
        ),
    ] = 0.05,
    debug: Debug = False,
) -> None:
    """Score checkpoints on the evaluation sets; write scores.parquet and eval_results.jsonl."""
    if check:
        from winnow.evaluate.check import check_table, check_tasks

        typer.echo(check_table(check_tasks(storage.absolute(data), tasks if tasks == "all" else _names(tasks))))
        return
    if out is None:
        raise UsageError("--out is missing", do="Give the directory to write to.")
    from winnow.pipeline import printing
    from winnow.pipeline.commands import evaluate_graph

    _search_custom()
    selected = tasks if tasks == "all" else _names(tasks)
    graph = evaluate_graph(specs or [], out, data, selected, _names(protocols), features, precision, max_skipped)
    _run(graph, executor, address)
    typer.echo(printing.scores(out))
    if without := printing.without_scores(out):
        raise WinnowError(f"no score of {'; '.join(without)}")


@app.command()
def compare(
    runs: Annotated[list[str], Argument(metavar="RUN...", help="Directories of finished runs.")],
    out: Out,
    baseline: Annotated[str | None, Option("--baseline", help="Subset the others are compared with.")] = None,
    debug: Debug = False,
) -> None:
    """Compare the subsets of one or more runs: table, CSV and HTML report."""
    from winnow.pipeline.steps import compare_steps, run_steps

    steps = compare_steps(runs, baseline, out)
    run_steps(steps, make_executor("serial"), RunLog(out), Budget())
    typer.echo(storage.read_bytes(storage.join(out, "comparison.txt")).decode())
    typer.echo(f"Report: {storage.join(storage.absolute(out), 'report.html')}")


@app.command()
def ls(
    what: Annotated[str, Argument(help="filters, measures, objectives, tasks, protocols, kinds or recipes.")],
    debug: Debug = False,
) -> None:
    """List what is registered."""
    from winnow.pipeline.listing import listing

    typer.echo(listing(what))


@app.command()
def doctor(debug: Debug = False) -> None:
    """Check this machine: versions, devices, space, one copy of winnow. Exit status 1 if something is broken."""
    from winnow.pipeline.doctor import examine

    findings = examine()
    for finding in findings:
        typer.echo(finding.line())
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


@app.command()
def verify(
    run: Annotated[str, Argument(help="Directory of a run or of a single command's output.")], debug: Debug = False
) -> None:
    """Read every file that a run has recorded, and name each that is damaged. Exit status 1 if one is."""
    from winnow.infra.stages.verify import verify as read

    count, faults = read(run)
    for url, fault in faults:
        typer.echo(f"{url}: {fault}")
    typer.echo(f"{count:,} files, {len(faults):,} damaged: {run}")
    if faults:
        raise typer.Exit(1)


STOPPED = "winnow: stopped; what is finished is kept."
INTERRUPTED = 130  # exit status, as shells have it


# Options of earlier versions.
_RENAMED = {"--max-set-aside": "--max-skipped"}


def _refuse_old_options(words: list[str]) -> None:
    for word in words:
        if (name := word.partition("=")[0]) in _RENAMED:
            raise UsageError(f"is now called {_RENAMED[name]}", where=name)


def main() -> None:
    """Entry point: errors become one paragraph on stderr."""
    debug = "--debug" in sys.argv or os.environ.get("WINNOW_DEBUG") == "1"
    try:
        _refuse_old_options(sys.argv)
        app()
    except (StorageError, WinnowError) as error:
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
