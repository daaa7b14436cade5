"""The one builder of stages: what a recipe or a single command runs, in which order, and where it writes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import yaml

from winnow.curation.curate import CurateStage, MeasuredPool, check_trees
from winnow.curation.measures.base import Measure, MeasureSpec, make
from winnow.curation.measures.stage import MeasureStage
from winnow.curation.noise.inject import InjectStage
from winnow.curation.reshard import ReshardStage
from winnow.evaluate.report.compare import CompareStage
from winnow.evaluate.stage import EvaluateStage
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.content import content_digest
from winnow.infra.io.storage import digest_json, join
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.metadata import is_metadata
from winnow.infra.pool.pool import Pool
from winnow.infra.stages.executors import Executor
from winnow.infra.stages.kept import RECORDS, check_kept
from winnow.infra.stages.progress import RunLog
from winnow.infra.stages.runner import Budget
from winnow.infra.stages.stage import LOCATIONS, Manifest, Stage, need_manifest, pending_units, read_manifest
from winnow.pipeline.demo.stage import DemoStage
from winnow.pipeline.recipe.check import check_images
from winnow.pipeline.recipe.schema import DEMO, Recipe
from winnow.pipeline.steps import FinishedRun, Step, StepPlan, run_steps
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.encoder import encoder_digest
from winnow.pretrain.stage import PretrainStage, TrainRun


@dataclass(frozen=True)
class Layout:
    """Where the steps write, below the directory of the run. `{name}` is that of a subset or target set, `{digest}` is
    one of the target set's URL.

    `recipe` is the file that keeps the recipe; "" for none.
    """

    recipe: str = "recipe.yaml"
    pool: str = "pool"
    columns: str = "columns"
    targets: str = "targets/{name}-{digest}"
    target_columns: str = "target-columns/{name}-{digest}"
    subsets: str = "subsets"
    shards: str = "shards/{name}"
    checkpoints: str = "checkpoints"
    scores: str = "scores"


@dataclass(frozen=True)
class Given:
    """What a single command has from its arguments, in place of an earlier step or of a recipe's key.

    Attributes:
        pool: an indexed pool or a folder of metadata.
        columns: measured columns of the pool.
        subset: a subset file to reshard or to train on.
        checkpoints: encoders to evaluate, as `load_encoder` takes them.
        features: where embeddings are kept; next to the scores if "".
        keep_columns: whether columns measured before stay in the manifest of the measure step.
        reasons: whether the curate step writes why each sample was dropped.
    """

    pool: str | None = None
    columns: str | None = None
    subset: str | None = None
    checkpoints: tuple[str, ...] = ()
    features: str = ""
    keep_columns: bool = False
    reasons: bool = True


def ready_pool(url: str) -> str | None:
    """The absolute URL of a pool that needs no index: it is one, or a folder of metadata.

    Raises:
        WinnowError: the directory of an index that is not finished.
    """
    try:
        manifest = read_manifest(url)
    except WinnowError:  # a file of that name by another program
        manifest = None
    if (manifest is not None and "shards" in manifest.values) or is_metadata(url):
        return storage.absolute(url)
    if manifest is None and storage.exists(join(url, LOCATIONS)) and storage.is_dir(join(url, RECORDS)):
        raise WinnowError("is not finished", where=url, do="Run again what makes it.")
    return None


class Graph:
    """A checked recipe bound to the directory of its run."""

    def __init__(self, recipe: Recipe, out: str, layout: Layout = Layout(), given: Given = Given()) -> None:
        self.recipe, self.out, self.layout, self.given = recipe, storage.absolute(out), layout, given

    def url(self, *parts: str) -> str:
        return join(self.out, *parts)

    def resolve(self, url: str) -> str:
        """A source's URL; `demo:NAME` is below the directory of the run."""
        if url.startswith(DEMO):
            return self.url("demo", url.removeprefix(DEMO))
        return storage.absolute(url)

    @property
    def pool_url(self) -> str:
        """The pool that is measured and curated."""
        if self.given.pool is not None:
            return self.given.pool
        return self.url("injected") if self.recipe.inject else self.url(self.layout.pool)

    @property
    def columns_url(self) -> str | None:
        """The measured columns of that pool; None where there are none."""
        made = self.url(self.layout.columns) if self.recipe.pool_measures() else None
        return self.given.columns or made

    @property
    def subsets(self) -> tuple[str, ...]:
        """Names of the subsets to reshard and to train on. A single command has one, which has no name."""
        return tuple(self.recipe.subsets) or ("",)

    def steps(self) -> list[Step]:
        """All steps, in order."""
        recipe, given, steps = self.recipe, self.given, self._sources()
        if recipe.pool_measures() and given.columns is None:
            steps.append(Step("measure", self._measure))
        if recipe.subsets:
            steps.append(Step("curate", self.curate_stage))
        if recipe.reshard is not None:
            size = recipe.reshard.samples_per_shard
            steps += [Step(f"reshard {name}".strip(), partial(self._reshard, name, size)) for name in self.subsets]
        if recipe.pretrain is not None:
            steps.append(Step("pretrain", partial(self._pretrain, recipe.pretrain)))
        if recipe.evaluate is not None:
            # A broken set is missing, and the other scores stay; how many images a set may lack the stage knows.
            budget = Budget(math.inf)
            steps += [Step("embed", lambda: self._evaluate().embedding(), budget)]
            steps += [Step("evaluate", self._evaluate, budget)]
            if not given.checkpoints:
                steps.append(Step("compare", self._compare))
        return steps

    def _sources(self) -> list[Step]:
        """The steps that make the pool, the scorer and the target sets ready."""
        recipe, steps = self.recipe, []
        if recipe.demo is not None:
            steps.append(Step("demo", partial(DemoStage, config=recipe.demo, out=self.url("demo"))))
        if recipe.pool and self.given.pool is None:
            steps.append(Step("index", self._index))
        if recipe.inject is not None:
            pool, out = self.url(self.layout.pool), self.url("injected")
            steps.append(Step("inject", partial(InjectStage, pool=pool, config=recipe.inject, out=out)))
        if recipe.scorer is not None and recipe.scorer.trusted is not None:
            steps += [Step("index trusted", self._trusted), Step("pretrain scorer", self._scorer)]
        for target in recipe.targets():
            if self._is_ready(target):
                continue
            name = storage.name_of(target)
            steps.append(Step(f"index {name}", partial(self._target, target)))
            steps.append(Step(f"measure {name}", partial(self._measure_target, target)))
        return steps

    def run(self, executor: Executor, log: RunLog, until: str | None = None) -> dict[str, Manifest]:
        """Bring every step, or those to `until` (one of `STEPS`), to its manifest. Raises WinnowError at the first step
        that fails."""
        steps = self.steps()
        if until is not None:
            last = [i for i, step in enumerate(steps) if step.name.split()[0] == until]
            steps = steps[: last[-1] + 1] if last else steps
        if self.layout.recipe:
            text = yaml.safe_dump(self.recipe.text, sort_keys=False, allow_unicode=True)
            storage.write_bytes(self.url(self.layout.recipe), text.encode())
        if self.given.pool is not None:
            self._check_pool()
        return run_steps(steps, executor, log, Budget(self.recipe.max_skipped), self._finished)

    def _finished(self, stage: Stage) -> None:
        if stage.out == self.pool_url:
            self._check_pool()

    def _check_pool(self) -> None:
        """Refuse, before anything is measured, trees that cannot be applied to this pool."""
        ready = {target: MeasuredPool(target) for target in self.recipe.targets() if self._is_ready(target)}
        check_trees(MeasuredPool(self.pool_url), self.recipe.subsets.values(), ready)
        if self.given.columns is None:
            check_images(self.pool_url, self.recipe.pool_measures().values())

    def plan(self) -> list[StepPlan]:
        """How far each step is, without doing anything."""
        plans: list[StepPlan] = []
        steps = self.steps()
        for step in steps:
            try:
                stage = step.build()
                units, done = pending_units(stage)
            except WinnowError:
                break
            plans.append(StepPlan(step.name, len(done), len(units)))
            manifest = read_manifest(stage.out)
            if manifest is None or manifest.key != stage.manifest_key(units):
                break
        return plans + [StepPlan(step.name) for step in steps[len(plans) :]]

    # One method a step.

    def _index(self) -> Stage:
        trusted = self.recipe.scorer.trusted if self.recipe.scorer else None
        sources = tuple(self.resolve(url) for url in self.recipe.pool)
        skip = trusted.shards if trusted else ()
        return IndexStage(sources, self.url(self.layout.pool), captions=self._captions(), skip=skip)

    def _captions(self) -> bool:
        """Whether a sample must have a caption: as `captions` says, else unless nothing here could read it."""
        recipe = self.recipe
        if recipe.captions is not None or recipe.pretrain is None:
            return recipe.captions is not False
        columns = {column for item in recipe.filters() for column in item.columns()}
        others = recipe.scorer or recipe.inject or recipe.pool_measures() or "text" in columns
        return recipe.pretrain.reads_text or bool(others)

    def _trusted(self) -> Stage:
        assert self.recipe.scorer is not None and self.recipe.scorer.trusted is not None
        trusted = self.recipe.scorer.trusted
        urls = self.recipe.pool if trusted.pool is None else (trusted.pool,)
        return IndexStage(tuple(self.resolve(url) for url in urls), self.url("trusted"), only=trusted.shards)

    def _scorer(self) -> Stage:
        assert self.recipe.scorer is not None and self.recipe.scorer.train is not None
        pool = self.url("trusted")
        digest = digest_json([Pool.open(pool).digest, None])
        run = TrainRun(name="scorer", seed=0, pool=pool, subset=None, digest=digest)
        return PretrainStage(config=self.recipe.scorer.train, runs=(run,), out=self.url("scorer"))

    def _encoder(self) -> tuple[str, str]:
        """The scorer, as `load_encoder` takes it, and the digest of its content."""
        scorer = self.recipe.scorer
        assert scorer is not None
        spec = scorer.spec
        if scorer.train is not None:
            need_manifest(self.url("scorer"), "scorer")
            spec = self.url("scorer", "scorer", "seed-0")
        return spec, encoder_digest(spec)

    def _made(self, specs: Mapping[str, MeasureSpec]) -> tuple[Measure, ...]:
        return tuple(make(spec, self._encoder) for spec in specs.values())

    def _is_ready(self, target: str) -> bool:
        """Whether a target set needs no index: DataComp's metadata."""
        return not target.startswith(DEMO) and is_metadata(target)

    def _target_urls(self, target: str) -> tuple[str, str]:
        """The pool of a target set and its columns."""
        name = re.sub(r"[^\w.-]", "-", storage.name_of(target))
        facts = {"name": name, "digest": digest_json(self.resolve(target))[:8]}
        layout = self.layout
        return self.url(layout.targets.format(**facts)), self.url(layout.target_columns.format(**facts))

    def _target(self, target: str) -> Stage:
        return IndexStage((self.resolve(target),), self._target_urls(target)[0], captions=False)

    def _measure_target(self, target: str) -> Stage:
        pool, columns = self._target_urls(target)
        return MeasureStage(pool, self._made(self.recipe.target_measures(target)), columns)

    def _measure(self) -> Stage:
        made = self._made(self.recipe.pool_measures())
        stage = MeasureStage(self.pool_url, made, self.url(self.layout.columns))
        return stage.with_existing() if self.given.keep_columns else stage

    def curate_stage(self) -> CurateStage:
        """The stage that writes the subsets."""
        targets = {
            target: MeasuredPool(self.resolve(target))
            if self._is_ready(target)
            else MeasuredPool(*self._target_urls(target))
            for target in self.recipe.targets()
        }
        source = MeasuredPool(self.pool_url, self.columns_url)
        subsets = tuple(self.recipe.subsets.items())
        return CurateStage(source, subsets, self.url(self.layout.subsets), targets, self.given.reasons)

    def _subset(self, name: str) -> tuple[str | None, str | None]:
        """URL and digest of a subset's .npy; None for the whole pool."""
        if not self.recipe.subsets:
            url = self.given.subset
            return url, content_digest(check_kept(url)) if url is not None else None
        manifest = need_manifest(self.url(self.layout.subsets), "subsets")
        file = join(name, "subset.npy")
        return self.url(self.layout.subsets, file), manifest.files[file]["sha256"]

    def _reshard(self, name: str, size: int) -> Stage:
        url, digest = self._subset(name)
        return ReshardStage(self.pool_url, url, digest or "", self.url(self.layout.shards.format(name=name)), size)

    def _pretrain(self, config: PretrainConfig) -> Stage:
        self._check_captions(config)
        source = Pool.open(self.pool_url).digest
        runs = []
        for name in self.subsets:
            url, digest = self._subset(name)
            # The samples and their order are the same with and without resharding, and so is the digest. Measured
            # columns are of the pool's shards.
            resharded = self.recipe.reshard is not None and not config.measures
            pool, subset = (self.url(self.layout.shards.format(name=name)), None) if resharded else (self.pool_url, url)
            measured = None if resharded else self.columns_url
            for seed in config.seeds:
                digests = digest_json([source, digest])
                runs.append(TrainRun(name or "model", seed, pool, subset, digests, measured))
        return PretrainStage(config=config, runs=tuple(runs), out=self.url(self.layout.checkpoints))

    def _check_captions(self, config: PretrainConfig) -> None:
        """Raises UsageError when the training reads captions and the given pool was indexed without."""
        manifest = read_manifest(self.given.pool) if self.given.pool else None
        params = manifest.params if manifest is not None else {}
        without = params.get("captions") is False or "text" not in params.get("require", ["text"])
        if config.reads_text and without:
            what = f"was indexed without asking for captions, from which {config.objective_name} learns"
            raise UsageError(what, where=self.given.pool, do="Index it again, without --no-captions.")

    def _finished_run(self) -> FinishedRun:
        recipe = self.recipe
        assert recipe.pretrain is not None
        return FinishedRun(self.out, self.pool_url, tuple(recipe.subsets), recipe.pretrain.seeds, recipe.reference)

    def _evaluate(self) -> EvaluateStage:
        assert self.recipe.evaluate is not None
        section = self.recipe.evaluate
        entries = [(spec, spec) for spec in self.given.checkpoints]
        if not entries:
            need_manifest(self.url(self.layout.checkpoints), "checkpoints")
            names = [name for _, _, name in self._finished_run().checkpoints()]
            entries = [(name, self.url(self.layout.checkpoints, name)) for name in names]
        return EvaluateStage(
            checkpoints=tuple((name, spec, encoder_digest(spec)) for name, spec in entries),
            data=self.resolve(section.data),
            tasks=section.tasks,
            protocols=section.protocols,
            features=self.given.features,
            out=self.url(self.layout.scores),
            precision=section.precision,
            max_skipped=self.recipe.max_skipped,
        )

    def _compare(self) -> Stage:
        run = self._finished_run()
        return CompareStage(run.entries(), self.url(self.layout.scores), self.url("report"), run.reference)
