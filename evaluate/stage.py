"""The evaluate stage: many checkpoints on many tasks by many protocols, from the features of the embed stage."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from winnow.evaluate.features.reading import FeatureFiles, LoadedSplit, NotEmbedded
from winnow.evaluate.features.stage import EmbedStage, SetsStage
from winnow.evaluate.protocols.base import SEED, EvalSet, Features, Protocol, Split, load_protocol
from winnow.evaluate.scores import DATACOMP_RESULTS, RESULTS, result_line, write_results, write_scores
from winnow.evaluate.sets.files import data_digest, open_set
from winnow.evaluate.sets.layout import FoundTask
from winnow.evaluate.sets.shards import has_split
from winnow.evaluate.tasks.task import NotApplicable, Task, TaskError
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.params import build
from winnow.infra.stages.runner import Budget
from winnow.infra.stages.stage import Output, Record, Skipped, Unit

if TYPE_CHECKING:
    from winnow.pretrain.encoder import Encoder

MAX_FOLDER = 160
ByUnit = dict[tuple[str, str, str], list[dict[str, Any]]]  # values of records by checkpoint, task and protocol


@dataclass
class EvaluateStage(SetsStage):
    """Score checkpoints on tasks.

    A unit is one checkpoint on one task by one protocol, and by one seed where the protocol draws something. It embeds
    nothing: `embedding()` is the stage that has to run first, and what that has written is read through its listing.
    A set that is broken leaves no row and is listed in the manifest's `missing`. What does not apply (a task without a
    train split and a probe, an encoder without a text tower and zero-shot) is listed in `not_applicable`.

    A set of which more than `max_skipped` of the images cannot be decoded is missing, too. So is what a checkpoint
    that cannot be loaded would have scored; the next run tries it again.
    """

    features: str = ""  # directory of the features, `out`/features if not given; several evaluations may share it
    max_skipped: float = 0.05  # of a split's images that may be undecodable: a fraction when below 1, else a number

    name = "evaluate"
    version = 4

    def embedding(self) -> EmbedStage:
        """The stage that must have run before this one."""
        same = {field.name: getattr(self, field.name) for field in fields(SetsStage)}
        return EmbedStage(**same | {"out": self.features or self.url("features")})

    def plan(self) -> list[Unit]:
        if not self.checkpoints:
            raise UsageError("no checkpoint to evaluate")
        if not self.protocols:
            raise UsageError("no protocol to evaluate by")
        units: list[Unit] = []
        reasons = []
        for found, (spec, protocol) in itertools.product(self.found(), self._by_name().items()):
            if (reason := _unfit(found, protocol)) is None:
                units += self._units(found, spec, protocol)
            else:
                reasons.append(f"The first: {reason}.")
        if not units:
            what = f"no task here can be evaluated by {', '.join(self.protocols)}"
            raise UsageError(what, where=storage.absolute(self.data), do=next(iter(reasons), None))
        return units

    def _by_name(self) -> dict[str, Protocol]:
        """The protocols by what the recipe calls them. Raises UsageError when two have the same name in scores."""
        found = {spec: load_protocol(spec) for spec in self.protocols}
        for name, count in Counter(protocol.name for protocol in found.values()).items():
            if count > 1:
                raise UsageError(f'two protocols have the name "{name}"')
        return found

    def _units(self, found: FoundTask, spec: str, protocol: Protocol) -> list[Unit]:
        splits = ("train", "val") if "train" in protocol.needs else ()
        inputs = {"data": data_digest(found.url)}
        inputs |= {split: data_digest(found.url, split) for split in splits if has_split(found.url, split)}
        params: dict[str, Any] = {"task": found.task.model_dump(mode="json"), "protocol": spec}
        params |= {"precision": self.precision, "max_skipped": self.max_skipped}
        if protocol.version > 1:
            params["protocol_version"] = protocol.version
        listing = self.listing(found)
        return [
            Unit(
                unit_name(name, found.task, protocol.name, seed if protocol.seeds else None),
                inputs=inputs | {"checkpoint": checkpoint},
                params=params | {"seed": seed},
                runtime={"checkpoint": name, "spec": encoder, "url": found.url, "listing": listing},
            )
            for name, encoder, checkpoint in self.checkpoints
            for seed in protocol.seeds or (SEED,)
        ]

    def run(self, unit: Unit) -> Output:
        task = build(Task, unit.params["task"], "task")
        protocol, seed = load_protocol(unit.params["protocol"]), unit.params["seed"]
        values = {"checkpoint": unit.runtime["checkpoint"], "task": task.key, "protocol": protocol.name, "rows": []}
        try:
            test_set = open_set(task, unit.runtime["url"])
            files, splits = self._load(unit, test_set)
            test = splits["test"]
            if "text" in protocol.needs and not test.has_text:
                return Output(values=values | {"not_applicable": "the encoder has no text tower"})
            scored = protocol.run(self._features(unit, test_set, protocol, files, splits), test_set)
        except NotApplicable as error:
            return Output(values=values | {"not_applicable": error.what})
        except UsageError:
            raise
        except WinnowError as error:
            # Records hold no absolute paths: a set is named relative to the data folder.
            reason = str(error).replace(storage.absolute(self.data) + "/", "")
            retry = not isinstance(error, TaskError)
            return Output(skipped=[Skipped(unit.name, reason)], values=values | {"missing": reason}, retry=retry)
        rows = [{"protocol": protocol.name, "seed": seed, **asdict(row)} for row in scored]
        n = test_set.kind.measured(len(test.images), [row.n for row in scored])
        prefixes = {name: task.key if name == "test" else f"{task.key}/{name}" for name in splits}
        skipped = [Skipped(f"{prefixes[name]}/{k}", why) for name, split in splits.items() for k, why in split.skipped]
        facts = {"rows": rows, "chance": test_set.kind.chance(task, n), "n": n, "left_out": _left_out(splits)}
        return Output(items=n, skipped=skipped, values=values | facts)

    def _load(self, unit: Unit, test_set: EvalSet) -> tuple[FeatureFiles, dict[str, LoadedSplit]]:
        """The splits that the unit's protocol needs. Raises TaskError for a broken one, WinnowError where one has not
        been embedded."""
        data = {"test": unit.inputs["data"]}
        data |= {split: unit.inputs[split] for split in ("train", "val") if split in unit.inputs}
        files = FeatureFiles(self.features or self.url("features"), unit.runtime["listing"])
        try:
            encoder = unit.inputs["checkpoint"]
            splits = {name: files.split(test_set, name, digest, encoder) for name, digest in data.items()}
        except NotEmbedded as error:
            # The reason is more useful than the fact.
            self._encoder(unit)
            reason = files.reason(error.where or "")
            if reason is None:
                raise
            raise WinnowError(f"could not be embedded: {reason}", where=storage.name_of(unit.runtime["url"])) from None
        budget = Budget(self.max_skipped)
        for name, split in splits.items():
            reasons = Counter(reason for _, reason in split.skipped)
            try:
                budget.check(reasons, len(split.images), storage.join(unit.runtime["url"], name))
            except WinnowError as error:
                raise TaskError(error.what, where=error.where, do=error.do) from None
        return files, splits

    def _encoder(self, unit: Unit) -> Encoder:
        """Raises WinnowError when it cannot be loaded."""
        from winnow.pretrain.encoder import load_encoders

        wanted = [(unit.runtime["spec"], unit.inputs["checkpoint"])]
        (loaded,) = load_encoders(wanted, self.device, self.threads, self.precision)
        if isinstance(loaded, WinnowError):
            raise WinnowError(f"the checkpoint {loaded.what}")
        return loaded

    def _features(
        self, unit: Unit, test_set: EvalSet, protocol: Protocol, files: FeatureFiles, splits: dict[str, LoadedSplit]
    ) -> Features:
        test, encoder = splits["test"], partial(self._encoder, unit)
        text = "text" in protocol.needs
        return Features(
            images=test.images,
            labels=test.targets.labels,
            encode_texts=_known_texts(test.texts, encoder),
            captions=test.targets.captions,
            class_weights=files.class_weights(unit.inputs["checkpoint"]) if text else None,
            splits={name: _split(split, labelled=name != "test") for name, split in splits.items()},
            encoder=encoder,
            seed=unit.params["seed"],
            device=self.device,
            keys=test.targets.keys,
            metadata=np.array(test.targets.metadata, np.float64),
        )

    def finish(self, records: list[Record]) -> Output:
        by_unit: ByUnit = {}
        for record in records:
            got = record.values
            by_unit.setdefault((got["checkpoint"], got["task"], got["protocol"]), []).append(got)
        found_tasks, protocols = self.found(), list(self._by_name().values())
        results = Results()
        for (name, _, _), found in itertools.product(self.checkpoints, found_tasks):
            results.add(name, found, protocols, by_unit)
        if not results.rows:
            first = (results.missing or results.unfit)[0]
            raise WinnowError(f"no task could be evaluated; the first, {first['task']}: {first['reason']}")
        keys = [found.task.key for found in found_tasks if found.task.key in results.tasks]
        values = {
            "checkpoints": {name: digest for name, _, digest in self.checkpoints},
            "protocols": [protocol.name for protocol in protocols],
            "tasks": {key: results.tasks[key] for key in keys},
            "missing": results.missing,
            "not_applicable": results.unfit,
            "left_out": results.left_out,
        }
        if metrics := {protocol.name: protocol.metric for protocol in protocols if protocol.metric is not None}:
            values["protocol_metrics"] = metrics
        official = {found.task.key for found in found_tasks if found.task.group != "extra"}
        files = [write_scores(self.out, results.rows), RESULTS]
        write_results(self.url(RESULTS), results.lines)
        for name, _, _ in self.checkpoints:
            if lines := [line for line in results.lines if line["checkpoint"] == name and line["key"] in official]:
                files.append(f"{DATACOMP_RESULTS}/{folder_of(name)}.jsonl")
                write_results(self.url(files[-1]), lines)
        return Output(files, values=values)


@dataclass
class Results:
    """The combined results of the units of an evaluation.

    `missing` and `unfit` have the checkpoint, task, protocol and reason of what has no score though it should, and of
    what does not apply.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)  # of scores.parquet
    lines: list[dict[str, Any]] = field(default_factory=list)  # of eval_results.jsonl
    missing: list[dict[str, str]] = field(default_factory=list)
    unfit: list[dict[str, str]] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)  # facts on each task with a score, by key
    left_out: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)  # images by task, split and reason

    def add(self, checkpoint: str, found: FoundTask, protocols: list[Protocol], by_unit: ByUnit) -> None:
        """Add the scores of a checkpoint on a task."""
        task, rows = found.task, []
        stamp = {"checkpoint": checkpoint, "task": task.key}
        if found.kind is None:
            self.missing.append(stamp | {"reason": f'no protocol evaluates tasks of kind "{task.kind}"'})
            return
        for protocol in protocols:
            stamp["protocol"] = protocol.name
            if (why := _unfit(found, protocol)) is not None:
                self.unfit.append(stamp | {"reason": why})
                continue
            batch = by_unit.get((checkpoint, task.key, protocol.name), [])
            rows += [row for got in batch for row in got["rows"]]
            self.unfit += [stamp | {"reason": got["not_applicable"]} for got in batch if "not_applicable" in got]
            faults = [got["missing"] for got in batch if "missing" in got]
            if len(batch) < len(protocol.seeds or (SEED,)):
                faults.append("failed; see skipped in the manifest")
            self.missing += [stamp | {"reason": fault} for fault in faults[:1]]
            for got in (got for got in batch if got["rows"]):
                if got["left_out"]:
                    self.left_out.setdefault(task.key, {}).update(got["left_out"])
                facts = task.model_dump(include={"name", "kind", "metric", "group", "scored", "size", "version"})
                self.tasks[task.key] = facts | {"chance": got["chance"], "n": got["n"]}
        self.rows += [row | {"checkpoint": checkpoint, "task": task.key, "task_version": task.version} for row in rows]
        self.lines += [result_line(checkpoint, task, rows)] if rows else []


def _unfit(found: FoundTask, protocol: Protocol) -> str | None:
    """Why a protocol does not apply to a set, whatever the encoder; None if it does."""
    if not protocol.applies(found.kind):
        return f'{protocol.name} does not evaluate tasks of kind "{found.task.kind}"'
    if "train" in protocol.needs and not has_split(found.url, "train"):
        return "the set has no train split"
    return None


def _left_out(splits: Mapping[str, LoadedSplit]) -> dict[str, dict[str, int]]:
    """Number of undecodable images by split and reason."""
    counts = {name: Counter(reason for _, reason in split.skipped) for name, split in splits.items()}
    return {name: dict(sorted(reasons.items())) for name, reasons in counts.items() if reasons}


def _split(loaded: LoadedSplit, labelled: bool) -> Split:
    """A split for a protocol; one to learn from has the labelled samples alone."""
    labels = loaded.targets.labels
    kept = np.flatnonzero(labels >= 0) if labelled else np.arange(len(labels))
    return Split(loaded.images[kept], labels[kept], lambda wanted: loaded.samples([int(kept[i]) for i in wanted]))


def _known_texts(known: dict[str, np.ndarray], encoder: Callable[[], Any]) -> Callable[[list[str]], np.ndarray]:
    """A function that embeds texts, taking those embedded before from `known`."""

    def encode(texts: list[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if len(new) == len(texts):
            return np.asarray(encoder().encode_texts(texts))
        rows = known | dict(zip(new, encoder().encode_texts(new), strict=True)) if new else known
        return np.stack([rows[text] for text in texts])

    return encode


def folder_of(checkpoint: str) -> str:
    """A file name for a checkpoint's name: readable, distinct for distinct names, not too long for a file."""
    folder = quote(checkpoint, safe="")
    if len(folder) > MAX_FOLDER:
        end = re.sub(r"[^A-Za-z0-9]+", "-", checkpoint)[-MAX_FOLDER // 2 :]
        return f"{storage.digest_json(checkpoint)[:24]}-{end}"
    return "%2E" + folder[1:] if folder.startswith(".") else folder


def unit_name(checkpoint: str, task: Task, protocol: str, seed: int | None = None) -> str:
    """Distinct for distinct arguments, and safe as a path whatever the checkpoint's name is."""
    name = f"{folder_of(checkpoint)}/{task.data_folder.removeprefix('wds_').removesuffix('_test')}/{protocol}"
    return name if seed is None else f"{name}/seed-{seed}"
