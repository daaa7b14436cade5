"""The pretrain stage: one unit per training, each in its own directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from winnow.infra.errors import UsageError
from winnow.infra.io import storage
from winnow.infra.io.content import content_digest
from winnow.infra.io.storage import digest_json
from winnow.infra.pool.pool import Pool
from winnow.infra.stages.resources import Resources
from winnow.infra.stages.runner import note_url
from winnow.infra.stages.stage import Output, Stage, Unit, need_manifest
from winnow.pretrain.config import PretrainConfig

if TYPE_CHECKING:
    from winnow.pretrain.loop import Job

FILES = ("model.safetensors", "config.json", "open_clip_config.json")  # the last of open_clip's models only


@dataclass(frozen=True)
class TrainRun:
    """One training.

    Attributes:
        name: of the subset.
        seed: of initialisation, order and augmentation.
        pool: URL of an indexed pool.
        subset: URL of a subset's .npy, or None for the whole pool.
        digest: of the data: pool and subset.
        measured: URL of the pool's measured columns, for objectives that read some; or None.
    """

    name: str
    seed: int
    pool: str
    subset: str | None
    digest: str
    measured: str | None = None


@dataclass
class PretrainStage(Stage):
    """Train a model on each of several subsets, with each of several seeds.

    Args:
        config: how, the same for all.
        runs: on what.
        out: directory; a training's files are in `<name>/seed-<seed>/`.
    """

    config: PretrainConfig
    runs: tuple[TrainRun, ...]
    out: str

    name = "pretrain"
    version = 1
    keep_stale = True
    launches_workers = True

    @property
    def resources(self) -> Resources:
        config = self.config.parallel
        gpus = 0 if config.device == "cpu" else config.num_processes
        return Resources(config.num_processes * config.threads, gpus, gpu_optional=config.device == "auto")

    def params(self) -> dict[str, Any]:
        return self.config.identity()

    def parents(self) -> dict[str, str]:
        return {run.name: run.digest for run in self.runs} | self._sources()

    def plan(self) -> list[Unit]:
        sources = self.config.sources
        weights = {"weights": [source.weight for source in sources]} if sources else {}
        return [
            Unit(
                f"{run.name}/seed-{run.seed}",
                inputs={"data": run.digest} | self._sources() | self._measured(run),
                params={"seed": run.seed} | weights,
                runtime={"pool": run.pool, "subset": run.subset, "measured": run.measured},
                group=str(number // self.config.parallel.runs_per_launch),
                items=self.config.steps * self.config.batch_size,
            )
            for number, run in enumerate(self.runs)
        ]

    def _sources(self) -> dict[str, str]:
        """Digests of the further sources, by their index in the config."""
        return {
            f"source {i}": digest_json(
                [Pool.open(source.pool).digest, None if source.subset is None else content_digest(source.subset)]
            )
            for i, source in enumerate(self.config.sources)
        }

    def _measured(self, run: TrainRun) -> dict[str, Any]:
        """Digests of the measures whose columns the objective reads."""
        measures = self.config.measures
        if run.measured is None or not measures:
            return {}
        values = need_manifest(run.measured, "columns").values
        missing = [name for name in measures if name not in values["columns"]]
        if missing:
            raise UsageError(f'the columns of "{missing[0]}" have not been measured', where=run.measured)
        return {f"measure {name}": values["digests"][values["columns"][name]] for name in measures}

    def run_group(self, units: list[Unit]) -> Iterator[tuple[Unit, Output]]:
        from winnow.pretrain.launch import launch

        launch([self._job(unit) for unit in units])
        for unit in units:
            training = storage.read_json(self.url(unit.name, "config.json"))["training"]
            training.pop("config")
            names = storage.list_names(self.url(unit.name))
            files = [f"{unit.name}/{name}" for name in names if name in FILES or name.endswith(".png")]
            yield unit, Output(files=files, items=training["samples_seen"], values=training)

    @cached_property
    def _absolute(self) -> PretrainConfig:
        return self.config.absolute()

    def _job(self, unit: Unit) -> Job:
        from winnow.pretrain.loop import Job

        subset, measured = unit.runtime["subset"], unit.runtime["measured"]
        return Job(
            config=self._absolute,
            pool=storage.absolute(unit.runtime["pool"]),
            subset=subset and storage.absolute(subset),
            measured=measured and storage.absolute(measured),
            out=storage.absolute(self.url(unit.name)),
            seed=unit.params["seed"],
            key=self.key(unit),
            note=storage.absolute(note_url(self, unit)),
        )
