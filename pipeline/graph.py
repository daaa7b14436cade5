"""The stage graph of a recipe: which stages there are, in order, and what each reads of those before it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import yaml

from winnow.curation.curate import CurateStage, MeasuredPool, check_trees
from winnow.curation.measures.base import Measure, MeasureSpec, make
from winnow.curation.measures.stage import MeasureStage
from winnow.curation.noise.inject import InjectStage
from winnow.curation.reshard import ReshardStage
from winnow.evaluate.report.compare import CompareStage, SubsetEntry
from winnow.evaluate.stage import EvaluateStage
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.storage import digest_json, join
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.pool import Pool
from winnow.infra.stages.executors import Executor
from winnow.infra.stages.progress import RunLog
from winnow.infra.stages.runner import Budget, execute
from winnow.infra.stages.stage import Manifest, Stage, need_manifest, pending_units, read_manifest
from winnow.pipeline.demo.stage import DemoStage
from winnow.pipeline.recipe.load import DEMO, Recipe
from winnow.pretrain.encoder import encoder_digest
from winnow.pretrain.stage import PretrainStage, TrainRun


@dataclass(frozen=True)
class Step:
    """A stage to come. `build` may read the manifests of earlier steps, so it is called when they are done. `budget` is
    the recipe's where None."""

    name: str
    build: Callable[[], Stage]
    budget: Budget | None = None


@dataclass(frozen=True)
class StepPlan:
    """How far a step is: units finished and in all; None when it waits for an earlier step."""

    name: str
    done: int | None = None
    units: int | None = None

    @property
    def text(self) -> str:
        if self.units is None or self.done is None:
            return "waits for the steps before"
        return "finished" if self.done == self.units else f"{self.units - self.done} of {self.units} units to do"


class Graph:
    """A recipe bound to a directory.

    Args:
        recipe: checked.
        out: directory of the run.
    """

    def __init__(self, recipe: Recipe, out: str) -> None:
        self.recipe, self.out = recipe, storage.absolute(out)

    def url(self, *parts: str) -> str:
        return join(self.out, *parts)

    def resolve(self, url: str) -> str:
        """A source's URL; `demo:NAME` lies in the run's own directory."""
        if url.startswith(DEMO):
            return self.url("demo", url.removeprefix(DEMO))
        return storage.absolute(url)

    @property
    def pool_url(self) -> str:
        """The pool that is measured and curated."""
        return self.url("injected" if self.recipe.inject else "pool")

    def steps(self) -> list[Step]:
        recipe, steps = self.recipe, []
        trusted = recipe.scorer.trusted if recipe.scorer else None
        if recipe.demo is not None:
            steps.append(Step("demo", self._demo))
        steps.append(Step("index", self._index))
        if recipe.inject is not None:
            steps.append(Step("inject", self._inject))
        if trusted is not None:
            steps += [Step("index trusted", self._trusted), Step("pretrain scorer", self._scorer)]
        for target in recipe.targets():
            name = storage.name_of(target)
            steps.append(Step(f"index {name}", lambda target=target: self._target(target)))  # type: ignore[misc]
            steps.append(Step(f"measure {name}", lambda target=target: self._measure_target(target)))  # type: ignore[misc]
        if recipe.measure_kinds():
            steps.append(Step("measure", self._measure))
        steps.append(Step("curate", self._curate))
        if recipe.reshard is not None:
            for name in recipe.subsets:
                steps.append(Step(f"reshard {name}", lambda name=name: self._reshard(name)))  # type: ignore[misc]
        if recipe.pretrain is not None:
            steps.append(Step("pretrain", self._pretrain))
        if recipe.evaluate is not None:
            # A broken set is missing, and the others' figures stand.
            embed = Step("embed", lambda: self._evaluate().embedding(), Budget(math.inf))
            evaluate = Step("evaluate", self._evaluate, Budget(math.inf))
            steps += [embed, evaluate, Step("compare", self.compare_stage)]
        return steps

    def run(self, executor: Executor, log: RunLog, until: str | None = None) -> dict[str, Manifest]:
        """Bring every step to its manifest. Raises WinnowError at the first that fails."""
        manifests = {}
        storage.write_bytes(self.url("recipe.yaml"), dump_recipe(self.recipe).encode())
        for step in self.steps():
            stage = step.build()
            budget = step.budget or Budget(self.recipe.max_skipped)
            manifests[step.name] = execute(stage, executor, budget=budget, log=log, label=step.name)
            if stage.out == self.pool_url:
                check_trees(MeasuredPool(self.pool_url), self.recipe.trees().values())
            if until is not None and step.name.split()[0] == until and step.name == self._last(until):
                break
        return manifests

    def _last(self, until: str) -> str:
        return [step.name for step in self.steps() if step.name.split()[0] == until][-1]

    def plan(self) -> list[StepPlan]:
        """How far each step is, without doing anything."""
        plans = []
        waits = False
        for step in self.steps():
            if waits:
                plans.append(StepPlan(step.name))
                continue
            try:
                stage = step.build()
                units, done = pending_units(stage)
            except WinnowError:
                plans.append(StepPlan(step.name))
                waits = True
                continue
            manifest = read_manifest(stage.out)
            current = manifest is not None and manifest.key == stage.manifest_key(units)
            plans.append(StepPlan(step.name, len(done), len(units)))
            waits = not current
        return plans

    # One method a step.

    def _demo(self) -> Stage:
        assert self.recipe.demo is not None
        return DemoStage(config=self.recipe.demo, out=self.url("demo"))

    def _index(self) -> Stage:
        trusted = self.recipe.scorer.trusted if self.recipe.scorer else None
        sources = tuple(self.resolve(url) for url in self.recipe.pool)
        skip = trusted.shards if trusted else ()
        return IndexStage(sources, self.url("pool"), captions=self.recipe.needs_captions, skip=skip)

    def _inject(self) -> Stage:
        assert self.recipe.inject is not None
        return InjectStage(pool=self.url("pool"), config=self.recipe.inject, out=self.url("injected"))

    def _trusted(self) -> Stage:
        assert self.recipe.scorer is not None and self.recipe.scorer.trusted is not None
        trusted = self.recipe.scorer.trusted
        urls = self.recipe.pool if trusted.pool is None else (trusted.pool,)
        return IndexStage(tuple(self.resolve(url) for url in urls), self.url("trusted"), only=trusted.shards)

    def _scorer(self) -> Stage:
        assert self.recipe.scorer is not None and self.recipe.scorer.train is not None
        pool = self.url("trusted")
        run = TrainRun(
            name="scorer", seed=0, pool=pool, subset=None, digest=digest_json([Pool.open(pool).digest, None])
        )
        return PretrainStage(config=self.recipe.scorer.train, runs=(run,), out=self.url("scorer"))

    def _encoder(self) -> str:
        """What `load_encoder` takes for the scorer."""
        scorer = self.recipe.scorer
        assert scorer is not None
        if scorer.train is not None:
            need_manifest(self.url("scorer"), "scorer")
            return self.url("scorer", "scorer", "seed-0")
        return scorer.spec

    def _made(self, specs: dict[str, MeasureSpec]) -> tuple[Measure, ...]:
        def scorer() -> tuple[str, str]:
            spec = self._encoder()
            return spec, encoder_digest(spec)

        return tuple(make(spec, scorer) for spec in specs.values())

    def _target_name(self, target: str) -> str:
        name = re.sub(r"[^\w.-]", "-", storage.name_of(target))
        return f"{name}-{digest_json(self.resolve(target))[:8]}"

    def _target(self, target: str) -> Stage:
        return IndexStage((self.resolve(target),), self.url("targets", self._target_name(target)), captions=False)

    def _measure_target(self, target: str) -> Stage:
        name = self._target_name(target)
        made = self._made(self.recipe.target_kinds(target))
        return MeasureStage(self.url("targets", name), made, self.url("target-columns", name))

    def _measure(self) -> Stage:
        return MeasureStage(self.pool_url, self._made(self.recipe.measure_kinds()), self.url("columns"))

    def _curate(self) -> Stage:
        columns = self.url("columns") if self.recipe.measure_kinds() else None
        targets = {}
        for target in self.recipe.targets():
            name = self._target_name(target)
            targets[target] = MeasuredPool(self.url("targets", name), self.url("target-columns", name))
        subsets = tuple(self.recipe.trees().items())
        return CurateStage(MeasuredPool(self.pool_url, columns), subsets, self.url("subsets"), targets)

    def _subset(self, name: str) -> tuple[str, str]:
        """URL and digest of a subset's .npy."""
        manifest = need_manifest(self.url("subsets"), "subsets")
        return self.url("subsets", name, "subset.npy"), manifest.files[f"{name}/subset.npy"]["sha256"]

    def _reshard(self, name: str) -> Stage:
        assert self.recipe.reshard is not None
        url, digest = self._subset(name)
        return ReshardStage(self.pool_url, url, digest, self.url("shards", name), self.recipe.reshard.samples_per_shard)

    def _pretrain(self) -> Stage:
        assert self.recipe.pretrain is not None
        source = Pool.open(self.pool_url).digest
        runs = []
        for name in self.recipe.subsets:
            url, digest = self._subset(name)
            # The samples and their order are the same with and without resharding, and so is the digest.
            pool, subset = (self.url("shards", name), None) if self.recipe.reshard else (self.pool_url, url)
            for seed in self.recipe.pretrain.seeds:
                runs.append(
                    TrainRun(name=name, seed=seed, pool=pool, subset=subset, digest=digest_json([source, digest]))
                )
        return PretrainStage(config=self.recipe.pretrain.config(), runs=tuple(runs), out=self.url("checkpoints"))

    def _checkpoints(self) -> list[tuple[str, int, str]]:
        """(subset, seed, checkpoint name) of every training; the name is also the path below `checkpoints`."""
        assert self.recipe.pretrain is not None
        seeds = self.recipe.pretrain.seeds
        return [(name, seed, f"{name}/seed-{seed}") for name in self.recipe.subsets for seed in seeds]

    def _evaluate(self) -> EvaluateStage:
        assert self.recipe.evaluate is not None
        section = self.recipe.evaluate
        need_manifest(self.url("checkpoints"), "checkpoints")
        entries = []
        for _, _, name in self._checkpoints():
            spec = self.url("checkpoints", name)
            entries.append((name, spec, encoder_digest(spec)))
        return EvaluateStage(
            checkpoints=tuple(entries),
            data=self.resolve(section.data),
            tasks=section.tasks,
            protocols=section.protocols,
            out=self.url("scores"),
            precision=section.precision,
            max_skipped=self.recipe.max_skipped,
        )

    def entries(self, prefix: str = "") -> tuple[SubsetEntry, ...]:
        """The subsets with their checkpoints, as the compare stage takes them; names and checkpoints get the prefix."""
        by_name: dict[str, list[tuple[int, str]]] = {}
        for name, seed, checkpoint in self._checkpoints():
            by_name.setdefault(name, []).append((seed, prefix + checkpoint))
        drawn: dict[str, list[tuple[str, str]]] = {name: [] for name in by_name}
        for name, seed, checkpoint in self._checkpoints():
            url = self.url("checkpoints", checkpoint)
            images = [file for file in storage.list_names(url) if file.endswith(".png")]
            drawn[name] += [(f"seed {seed}: {file}", join(url, file)) for file in images]
        return tuple(
            SubsetEntry(prefix + name, self.url("subsets", name), tuple(checkpoints), self.pool_url, tuple(drawn[name]))
            for name, checkpoints in by_name.items()
        )

    def compare_stage(self) -> CompareStage:
        """The last stage."""
        return CompareStage(self.entries(), self.url("scores"), self.url("report"), self.recipe.reference)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, with what was overridden and filled in."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
