"""Steps of a run and how they are brought to their manifests; finished runs and their comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from winnow.evaluate.report.compare import CompareStage, SubsetEntry
from winnow.evaluate.report.merge import MergeScoresStage
from winnow.infra.errors import UsageError
from winnow.infra.io import storage
from winnow.infra.io.storage import join
from winnow.infra.io.yaml_lines import read_value
from winnow.infra.registry import unknown
from winnow.infra.stages.executors import Executor
from winnow.infra.stages.progress import RunLog
from winnow.infra.stages.runner import Budget, execute
from winnow.infra.stages.stage import Manifest, Stage, need_manifest

STEPS = ("demo", "index", "inject", "pretrain", "measure", "curate", "reshard", "embed", "evaluate", "compare")


@dataclass(frozen=True)
class Step:
    """A stage to come. The first word of its name is one of `STEPS`.

    `build` makes the stage; it may read the manifests of earlier steps, so it is called when they are done. `budget` is
    how much may be skipped; None for the recipe's.
    """

    name: str
    build: Callable[[], Stage]
    budget: Budget | None = None


@dataclass(frozen=True)
class StepPlan:
    """How far a step is: units finished and in all; None while it waits for an earlier step. `replaced` units have a
    result of other inputs or parameters, which will be lost."""

    name: str
    done: int | None = None
    units: int | None = None
    replaced: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        if self.units is None or self.done is None:
            return "waits for the steps before"
        if self.done == self.units:
            return "finished"
        more = f" and {len(self.replaced) - 1} more" if self.replaced[1:] else ""
        replaced = f", replacing the earlier {self.replaced[0]}{more}" if self.replaced else ""
        return f"{self.units - self.done} of {self.units} units to do{replaced}"


@dataclass(frozen=True)
class FinishedRun:
    """What a comparison needs to know of a run: its directory, the pool that was curated, the names of the subsets, the
    seeds of the trainings, and the subset the others are compared with."""

    url: str
    pool: str
    subsets: tuple[str, ...]
    seeds: tuple[int, ...]
    reference: str

    @staticmethod
    def read(url: str) -> FinishedRun:
        """From a run's directory; recipes of earlier versions are read, too. Raises WinnowError."""
        need_manifest(join(url, "scores"), "scores")
        recipe = read_value(storage.read_bytes(join(url, "recipe.yaml")).decode())
        subsets = recipe["subsets"]
        reference = recipe.get("baseline") or next((name for name in subsets if not subsets[name]), next(iter(subsets)))
        seeds = tuple(recipe["pretrain"].get("seeds", (0,)))
        pool = join(url, "injected" if recipe.get("inject") else "pool")
        return FinishedRun(url, pool, tuple(subsets), seeds, reference)

    def checkpoints(self) -> list[tuple[str, int, str]]:
        """(subset, seed, name of the checkpoint) of every training; the name is also the path below `checkpoints`."""
        return [(name, seed, f"{name}/seed-{seed}") for name in self.subsets for seed in self.seeds]

    def entries(self, prefix: str = "") -> tuple[SubsetEntry, ...]:
        """The subsets with their checkpoints, as the compare stage takes them; names and checkpoints get the prefix."""
        entries = []
        for subset in self.subsets:
            trained = [(seed, name) for of, seed, name in self.checkpoints() if of == subset]
            drawn = []
            for seed, name in trained:
                folder = join(self.url, "checkpoints", name)
                images = [file for file in storage.list_names(folder) if file.endswith(".png")]
                drawn += [(f"seed {seed}: {file}", join(folder, file)) for file in images]
            checkpoints = tuple((seed, prefix + name) for seed, name in trained)
            url = join(self.url, "subsets", subset)
            entries.append(SubsetEntry(prefix + subset, url, checkpoints, self.pool, tuple(drawn)))
        return tuple(entries)


def run_steps(
    steps: Iterable[Step], executor: Executor, log: RunLog, budget: Budget, after: Callable[[Stage], None] | None = None
) -> dict[str, Manifest]:
    """Bring every step to its manifest, and call `after` with each finished stage. `budget` is that of the steps which
    have none. Raises WinnowError at the first step that fails."""
    steps, manifests = list(steps), {}
    for number, step in enumerate(steps, 1):
        log.steps = (number, len(steps)) if len(steps) > 1 else None
        stage = step.build()
        manifests[step.name] = execute(stage, executor, budget=step.budget or budget, log=log, label=step.name)
        if after is not None:
            after(stage)
    return manifests


def compare_steps(runs: list[str], baseline: str | None, out: str) -> list[Step]:
    """What compares the subsets of finished runs; with several runs, names get the run's in front."""
    if storage.absolute(out) in map(storage.absolute, runs):
        raise UsageError("compare would write into a run", where=out, do="Give another directory.")
    found: dict[str, FinishedRun] = {}
    for url in runs:
        name = storage.name_of(url)
        if name in found:
            raise UsageError(f'two runs are called "{name}"', do="Rename one of the directories.")
        found[name] = FinishedRun.read(url)
    first = next(iter(found.values()))
    if len(found) == 1:
        steps, entries, scores, reference = [], first.entries(), join(first.url, "scores"), first.reference
    else:
        scores = join(storage.absolute(out), "scores")
        parts = tuple((name, join(run.url, "scores")) for name, run in found.items())
        steps = [Step("merge", lambda: MergeScoresStage(parts, scores))]
        entries = tuple(entry for name, run in found.items() for entry in run.entries(f"{name}/"))
        reference = f"{next(iter(found))}/{first.reference}"
    names = [entry.name for entry in entries]
    if baseline is not None and baseline not in names:
        raise unknown("baseline", baseline, names, "--baseline")
    return [*steps, Step("compare", lambda: CompareStage(entries, scores, out, baseline or reference))]
