"""The evaluate stage: many checkpoints on many tasks by many protocols, from the features that the embed stage kept."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from winnow.evaluate.features.reading import LoadedSplit, NotEmbedded, load_class_weights, load_split
from winnow.evaluate.features.stage import EmbedStage, SetsStage, encoders_of
from winnow.evaluate.protocols.base import (
    NEED_TEXT,
    NEED_TRAIN,
    PROTOCOLS,
    SEED,
    SEEDS,
    Features,
    Split,
    applies,
    kind_of,
)
from winnow.evaluate.scores import measured, result_line
from winnow.evaluate.sets.layout import EvalSet, FoundTask, TaskError, data_digest
from winnow.evaluate.sets.shards import has_split
from winnow.evaluate.tasks.task import NotApplicable, Task
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.stages.runner import Budget
from winnow.infra.stages.stage import Output, Record, Skipped, Unit, read_manifest

if TYPE_CHECKING:
    from winnow.pretrain.encoder import Encoder

SCORES = "scores.parquet"
RESULTS = "eval_results.jsonl"
DATACOMP_RESULTS = "datacomp"  # folder of the same for each checkpoint, of DataComp's tasks alone
MAX_FOLDER = 160
SCHEMA = pa.schema(
    [
        ("checkpoint", pa.string()),
        ("task", pa.string()),
        ("protocol", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("n", pa.int64()),
        ("stderr", pa.float64()),
        ("task_version", pa.int32()),
        ("seed", pa.int64()),
    ]
)


@dataclass
class EvaluateStage(SetsStage):
    """Score checkpoints on tasks.

    A unit is one checkpoint on one task by one protocol, and by one seed where the protocol draws something. It embeds
    nothing: `embedding()` is the stage that has to come first. A set that is broken leaves no row and is listed in the
    manifest's `missing`; what does not apply (a task without a train split and a probe, an encoder without a text tower
    and zero-shot) is listed in `not_applicable`.

    A set of which more than `max_skipped` of the images cannot be decoded is missing, too. So is what a checkpoint
    that cannot be loaded would have scored; the next run tries it again.

    Args:
        features: directory of the features; `out`/features if not given. May be shared with other evaluations.
        max_skipped: of a split's images, how many may be undecodable: a share of them when below 1, else a number.
        others: see `SetsStage`; in `out` are scores.parquet and eval_results.jsonl.
    """

    features: str = ""
    max_skipped: float = 0.05

    name = "evaluate"
    version = 3

    def embedding(self) -> EmbedStage:
        """The stage that must have run before this one."""
        same = {field.name: getattr(self, field.name) for field in fields(SetsStage)}
        return EmbedStage(**same | {"out": self.features or self.url("features")})

    def plan(self) -> list[Unit]:
        if not self.checkpoints:
            raise UsageError("no checkpoint to evaluate")
        if not self.protocols:
            raise UsageError("no protocol to evaluate by")
        units = []
        for found in self.found():
            for protocol in self.protocols:
                if self._unfit(found, protocol) is None:
                    units += self._units(found, protocol)
        if not units:
            reasons = [self._unfit(found, protocol) for found in self.found() for protocol in self.protocols]
            raise UsageError(
                f"no task here can be evaluated by {', '.join(self.protocols)}",
                where=storage.absolute(self.data),
                do=f"The first: {reasons[0]}." if reasons else None,
            )
        return units

    def _unfit(self, found: FoundTask, protocol: str) -> str | None:
        """Why a protocol does not apply to a set, whatever the encoder; None if it does."""
        if not applies(protocol, found.task.kind):
            return f'{protocol} does not evaluate tasks of kind "{found.task.kind}"'
        if protocol in NEED_TRAIN and not has_split(found.url, "train"):
            return "the set has no train split"
        return None

    def _units(self, found: FoundTask, protocol: str) -> list[Unit]:
        splits = ("train", "val") if protocol in NEED_TRAIN else ()
        inputs = {"data": data_digest(found.url)}
        inputs |= {split: data_digest(found.url, split) for split in splits if has_split(found.url, split)}
        units = []
        for name, spec, checkpoint in self.checkpoints:
            for seed in SEEDS.get(protocol, (SEED,)):
                units.append(
                    Unit(
                        unit_name(name, found.task, protocol, seed if protocol in SEEDS else None),
                        inputs=inputs | {"checkpoint": checkpoint},
                        params={
                            "task": found.task.model_dump(),
                            "protocol": protocol,
                            "seed": seed,
                            "precision": self.precision,
                            "max_skipped": self.max_skipped,
                        },
                        runtime={"checkpoint": name, "spec": spec, "url": found.url},
                    )
                )
        return units

    def run(self, unit: Unit) -> Output:
        task = Task.model_validate(dict(unit.params["task"]))
        protocol, seed = unit.params["protocol"], unit.params["seed"]
        values = {"checkpoint": unit.runtime["checkpoint"], "task": task.key, "protocol": protocol, "rows": []}
        found = FoundTask(task, unit.runtime["url"])
        try:
            test_set = EvalSet.open(found)
            splits = self._load(unit, found, test_set)
            test = splits["test"]
            if protocol in NEED_TEXT and not test.has_text:
                return Output(values=values | {"not_applicable": "the encoder has no text tower"})
            kind = kind_of(protocol, task.kind)
            assert kind is not None
            scored = kind(self._features(unit, found, splits, seed), test_set)
        except NotApplicable as error:
            return Output(values=values | {"not_applicable": error.what})
        except UsageError:
            raise
        except WinnowError as error:
            reason = self._without_root(str(error))
            retry = not isinstance(error, TaskError)
            return Output(skipped=[Skipped(unit.name, reason)], values=values | {"missing": reason}, retry=retry)
        rows = [{"protocol": protocol, "seed": seed, **asdict(row)} for row in scored]
        skipped = [
            Skipped(f"{task.key}/{key}" if split == "test" else f"{task.key}/{split}/{key}", reason)
            for split, loaded in splits.items()
            for key, reason in loaded.skipped
        ]
        n = measured(task, len(test.samples), rows)
        chance = 1 / n if task.kind == "retrieval" and task.chance is None else task.chance
        left_out = {
            split: dict(sorted(Counter(reason for _, reason in loaded.skipped).items()))
            for split, loaded in splits.items()
            if loaded.skipped
        }
        facts = {"rows": rows, "chance": chance, "n": n, "left_out": left_out}
        return Output(items=n, skipped=skipped, values=values | facts)

    def _load(self, unit: Unit, found: FoundTask, test_set: EvalSet) -> dict[str, LoadedSplit]:
        """The splits the unit's protocol looks at. Raises TaskError for a broken one, WinnowError where one is not
        embedded."""
        embedding, checkpoint = self.embedding(), unit.inputs["checkpoint"]
        names = ["test", *(split for split in ("train", "val") if split in unit.inputs)]
        try:
            splits = {name: load_split(embedding, found, test_set, name, checkpoint) for name in names}
        except NotEmbedded as error:
            # Why is more use than that it was not.
            self._encoder(unit)
            manifest = read_manifest(embedding.out)
            reason = manifest.skipped["units"].get(error.where) if manifest else None
            if reason is None:
                raise
            raise WinnowError(f"could not be embedded: {reason}", where=storage.name_of(found.url)) from None
        budget = Budget(self.max_skipped)
        for name, split in splits.items():
            reasons = Counter(reason for _, reason in split.skipped)
            try:
                budget.check(reasons, len(split.samples), storage.join(found.url, name))
            except WinnowError as error:
                raise TaskError(error.what, where=error.where, do=error.do) from None
        return splits

    def _encoder(self, unit: Unit) -> Encoder:
        """Raises WinnowError when it cannot be loaded."""
        wanted = [(unit.runtime["spec"], unit.inputs["checkpoint"])]
        (loaded,) = encoders_of(wanted, self.device, self.threads, self.precision)
        if isinstance(loaded, str):
            raise WinnowError(loaded)
        return loaded

    def _features(self, unit: Unit, found: FoundTask, splits: dict[str, LoadedSplit], seed: int) -> Features:
        def encoder() -> Encoder:
            return self._encoder(unit)

        test = splits["test"]
        weights = None
        if unit.params["protocol"] in NEED_TEXT:
            weights = load_class_weights(self.embedding(), found, unit.inputs["checkpoint"])
        return Features(
            images=test.images,
            labels=test.labels(),
            encode_texts=_known_texts(test.texts, encoder),
            captions=[sample.captions for sample in test.samples],
            class_weights=weights,
            splits={name: _split(split, labelled=name != "test") for name, split in splits.items()},
            encoder=encoder,
            seed=seed,
            device=self.device,
            keys=[sample.key for sample in test.samples],
            metadata=np.array([sample.metadata for sample in test.samples], np.float64),
        )

    def _without_root(self, text: str) -> str:
        """Records hold no absolute paths: a set is named from the data folder on."""
        return text.replace(storage.absolute(self.data) + "/", "")

    def finish(self, records: list[Record]) -> Output:
        results: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for record in records:
            got = record.values
            results.setdefault((got["checkpoint"], got["task"], got["protocol"]), []).append(got)
        rows, lines, missing, unfit = [], [], [], []
        tasks: dict[str, Any] = {}
        left_out: dict[str, dict[str, dict[str, int]]] = {}
        found_tasks = self.found()
        for name, _, _ in self.checkpoints:
            for found in found_tasks:
                task = found.task
                stamp = {"checkpoint": name, "task": task.key}
                if not any(applies(protocol, task.kind) for protocol in PROTOCOLS):
                    reason = f'no protocol evaluates tasks of kind "{task.kind}"'
                    missing.append(stamp | {"reason": reason})
                    continue
                mine: list[dict[str, Any]] = []
                for protocol in self.protocols:
                    stamp["protocol"] = protocol
                    if (why := self._unfit(found, protocol)) is not None:
                        unfit.append(stamp | {"reason": why})
                        continue
                    batch = results.get((name, task.key, protocol), [])
                    mine += [row for got in batch for row in got["rows"]]
                    unfit += [stamp | {"reason": got["not_applicable"]} for got in batch if "not_applicable" in got]
                    faults = [got["missing"] for got in batch if "missing" in got]
                    if len(batch) < len(SEEDS.get(protocol, (SEED,))):
                        faults.append("failed; see skipped in the manifest")
                    missing += [stamp | {"reason": fault} for fault in faults[:1]]
                    for got in batch:
                        if got["rows"]:
                            if got["left_out"]:
                                left_out.setdefault(task.key, {}).update(got["left_out"])
                            tasks[task.key] = _facts(task) | {"chance": got["chance"], "n": got["n"]}
                rows += [row | {"checkpoint": name, "task": task.key, "task_version": task.version} for row in mine]
                lines += [result_line(name, task, mine)] if mine else []
        if not rows:
            first = (missing or unfit)[0]
            raise WinnowError(f"no task could be evaluated; the first, {first['task']}: {first['reason']}")
        with storage.writing(self.url(SCORES)) as path:
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
        files = [SCORES, RESULTS]
        _write_lines(self.url(RESULTS), lines)
        official = {found.task.key for found in found_tasks if found.task.group != "extra"}
        for name, _, _ in self.checkpoints:
            if mine := [line for line in lines if line["checkpoint"] == name and line["key"] in official]:
                files.append(f"{DATACOMP_RESULTS}/{folder_of(name)}.jsonl")
                _write_lines(self.url(files[-1]), mine)
        values = {
            "checkpoints": {name: digest for name, _, digest in self.checkpoints},
            "protocols": list(self.protocols),
            "tasks": {found.task.key: tasks[found.task.key] for found in found_tasks if found.task.key in tasks},
            "missing": missing,
            "not_applicable": unfit,
            "left_out": left_out,
        }
        return Output(files, values=values)


def _write_lines(url: str, lines: list[dict[str, Any]]) -> None:
    storage.write_bytes(url, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def _facts(task: Task) -> dict[str, Any]:
    """What readers of the scores need to know of a task."""
    return task.model_dump(include={"name", "kind", "metric", "group", "scored", "size", "version"})


def _split(loaded: LoadedSplit, labelled: bool) -> Split:
    """What a protocol learns from or tests on; to learn from, the samples with a label alone."""
    labels = loaded.labels()
    indices = np.flatnonzero(labels >= 0) if labelled else np.arange(len(labels))
    return Split(
        loaded.images[indices], labels[indices], lambda wanted: loaded.image_bytes([int(indices[i]) for i in wanted])
    )


def _known_texts(known: dict[str, np.ndarray], encoder: Callable[[], Any]) -> Callable[[list[str]], np.ndarray]:
    """Embeds texts, taking those embedded before from `known`."""

    def encode(texts: list[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if len(new) == len(texts):
            return np.asarray(encoder().encode_texts(texts))
        rows = known | dict(zip(new, encoder().encode_texts(new), strict=True)) if new else known
        return np.stack([rows[text] for text in texts])

    return encode


def folder_of(checkpoint: str) -> str:
    """A name for files, of a checkpoint's name: readable, distinct for distinct ones, no longer than files' may be."""
    folder = quote(checkpoint, safe="")
    if len(folder) > MAX_FOLDER:
        end = re.sub(r"[^A-Za-z0-9]+", "-", checkpoint)[-MAX_FOLDER // 2 :]
        return f"{storage.digest_json(checkpoint)[:24]}-{end}"
    return "%2E" + folder[1:] if folder.startswith(".") else folder


def unit_name(checkpoint: str, task: Task, protocol: str, seed: int | None = None) -> str:
    """Distinct for distinct arguments, and safe as a path whatever the checkpoint is called."""
    name = f"{folder_of(checkpoint)}/{task.data_folder.removeprefix('wds_').removesuffix('_test')}/{protocol}"
    return name if seed is None else f"{name}/seed-{seed}"
