"""The evaluate stage: many checkpoints on many tasks, each picture decoded once for all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from evaluate.data import EvalSet, FoundTask, TaskError, data_digest, find_tasks
from evaluate.embed import embed
from evaluate.kinds import NEED_TEXT, SEED, Features, kind_of
from evaluate.tasks import Task
from infra import storage
from infra.errors import UsageError, WinnowError
from infra.execute import note_url
from infra.progress import write_note
from infra.stage import Output, Record, SetAside, Stage, Unit

if TYPE_CHECKING:
    from pretrain.encoder import Encoder

SCORES = "scores.parquet"
RESULTS = "eval_results.jsonl"
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
class EvaluateStage(Stage):
    """Score checkpoints on tasks.

    A unit is one checkpoint on one task; the units of one task run together, so that its pictures are decoded once.
    A set that is broken, or does not apply to an encoder, leaves no row and is listed in the manifest's `missing`.

    Args:
        checkpoints: (name, encoder spec, digest) of each.
        data: folder of test sets in DataComp's layout.
        out: directory for scores.parquet and eval_results.jsonl.
        tasks: "all" for every set in the folder, or keys or names.
        protocols: which of `evaluate.kinds.PROTOCOLS`.
        device: for the encoders; "auto" takes a GPU where there is one.
        batch_size: pictures an encoder sees at once.
        threads: CPU threads of an encoder; None leaves it to torch.
        unit_cpus, unit_gpus: what a unit asks of the cluster; -1: a GPU where there is one.
    """

    checkpoints: tuple[tuple[str, str, str], ...]
    data: str
    out: str
    tasks: tuple[str, ...] | str = "all"
    protocols: tuple[str, ...] = ("zeroshot",)
    device: str = "auto"
    batch_size: int = 256
    threads: int | None = None
    unit_cpus: float = 1
    unit_gpus: float = -1

    name = "evaluate"
    version = 1
    keep_orphans = True
    tolerates = True

    @property
    def cpus(self) -> float:
        return self.unit_cpus

    @property
    def gpus(self) -> float:
        return self.unit_gpus

    def params(self) -> dict[str, Any]:
        return {"protocols": list(self.protocols)}

    def parents(self) -> dict[str, str]:
        return {f"checkpoint/{name}": digest for name, _, digest in self.checkpoints}

    def found(self) -> list[FoundTask]:
        return find_tasks(storage.absolute(self.data), self.tasks)

    def plan(self) -> list[Unit]:
        if not self.checkpoints:
            raise UsageError("no checkpoint to evaluate")
        units = []
        for entry in self.found():
            task = entry.task
            if not self._applies(task):
                continue
            digest = data_digest(entry.url)
            for name, spec, checkpoint in self.checkpoints:
                units.append(
                    Unit(
                        unit_name(name, task),
                        inputs={"checkpoint": checkpoint, "data": digest},
                        params={"task": task.model_dump()},
                        args={"checkpoint": name, "spec": spec, "url": entry.url},
                        group=task.key,
                    )
                )
        if not units:
            raise UsageError(
                f"no task here can be evaluated by {', '.join(self.protocols)}", where=storage.absolute(self.data)
            )
        return units

    def _applies(self, task: Task) -> bool:
        return any(kind_of(protocol, task.kind) is not None for protocol in self.protocols)

    def run_group(self, units: list[Unit]) -> Iterator[tuple[Unit, Output]]:
        task = Task.model_validate(dict(units[0].params["task"]))
        ready: list[tuple[Unit, Encoder]] = []
        for unit in units:
            encoder = self._encoder(unit, units)
            if isinstance(encoder, str):
                yield unit, self._missing(unit, task, encoder, aside=True)
            elif not encoder.has_text and NEED_TEXT.issuperset(self.protocols):
                yield unit, self._missing(unit, task, "the encoder has no text tower, zero-shot does not apply")
            else:
                ready.append((unit, encoder))
        if not ready:
            return
        try:
            test_set = EvalSet.open(FoundTask(task, units[0].args["url"]))
            embedded = embed(
                test_set.samples(), [encoder for _, encoder in ready], self.batch_size, self._notes(units[0])
            )
            if len(embedded.labels) == 0:
                raise TaskError("none of its pictures can be decoded", where=test_set.url)
        except TaskError as error:
            reason = self._without_root(str(error))
            for unit, _ in ready:
                yield unit, self._missing(unit, task, reason, aside=True)
            return
        aside = [SetAside(f"{task.key}/{key}", reason) for key, reason in embedded.set_aside]
        n = len(embedded.labels)
        chance = 1 / n if task.kind == "retrieval" and task.chance is None else task.chance
        for (unit, encoder), images in zip(ready, embedded.images, strict=True):
            features = Features(images, embedded.labels, encoder.encode_texts, embedded.captions)
            rows = []
            for protocol in self.protocols:
                kind = kind_of(protocol, task.kind)
                if kind is not None and (encoder.has_text or protocol not in NEED_TEXT):
                    rows += [{"protocol": protocol, **asdict(row)} for row in kind(features, test_set)]
            values = {"checkpoint": unit.args["checkpoint"], "task": task.key, "rows": rows, "chance": chance, "n": n}
            yield unit, Output(items=n, set_aside=aside, values=values)

    def _missing(self, unit: Unit, task: Task, reason: str, aside: bool = False) -> Output:
        values = {"checkpoint": unit.args["checkpoint"], "task": task.key, "rows": [], "missing": reason}
        return Output(set_aside=[SetAside(unit.name, reason)] if aside else [], values=values)

    def _without_root(self, text: str) -> str:
        """Records hold no absolute paths: a set is named from the data folder on."""
        return text.replace(storage.absolute(self.data) + "/", "")

    def _encoder(self, unit: Unit, units: list[Unit]) -> Encoder | str:
        """The unit's encoder, or the sentence saying why it cannot be loaded."""
        wanted = {(other.args["spec"], other.inputs["checkpoint"], self.device) for other in units}
        for key in set(_ENCODERS) - wanted:
            del _ENCODERS[key]
        key = (unit.args["spec"], unit.inputs["checkpoint"], self.device)
        if key not in _ENCODERS:
            from pretrain.encoder import load_encoder

            try:
                _ENCODERS[key] = load_encoder(unit.args["spec"], device=self.device, threads=self.threads)
            except UsageError:
                raise
            except WinnowError as error:
                return f"the checkpoint cannot be loaded: {error.what}"
        return _ENCODERS[key]

    def _notes(self, unit: Unit) -> Any:
        started = last = time.monotonic()

        def note(done: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > 2:
                last = now
                write_note(note_url(self, unit), f"{unit.group}: {done:,} pictures {done / (now - started):,.0f}/s")

        return note

    def finish(self, records: list[Record]) -> Output:
        values = {(record.values["checkpoint"], record.values["task"]): record.values for record in records}
        rows, lines, missing, tasks = [], [], [], {}
        for entry in self.found():
            task = entry.task
            if not self._applies(task):
                reason = f'no protocol of this run evaluates tasks of kind "{task.kind}"'
                missing += [{"checkpoint": name, "task": task.key, "reason": reason} for name, _, _ in self.checkpoints]
                continue
            for name, _, _ in self.checkpoints:
                got = values.get((name, task.key), {"rows": [], "missing": "failed; see set_aside in the manifest"})
                if not got["rows"]:
                    missing.append({"checkpoint": name, "task": task.key, "reason": got["missing"]})
                    continue
                facts = task.model_dump(include={"name", "kind", "metric", "group", "scored", "size", "version"})
                tasks[task.key] = facts | {"chance": got["chance"], "n": got["n"]}
                stamp = {"checkpoint": name, "task": task.key, "task_version": task.version, "seed": SEED}
                rows += [row | stamp for row in got["rows"]]
                lines.append(_result_line(name, task, got["rows"]))
        if not rows:
            raise WinnowError(f"no task could be evaluated; the first, {missing[0]['task']}: {missing[0]['reason']}")
        order = {name: number for number, (name, _, _) in enumerate(self.checkpoints)}
        rows.sort(key=lambda row: order[row["checkpoint"]])
        lines.sort(key=lambda line: order[line["checkpoint"]])
        with storage.writing(self.url(SCORES)) as path:
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        storage.write_bytes(self.url(RESULTS), text.encode())
        checkpoints = {name: digest for name, _, digest in self.checkpoints}
        return Output([SCORES, RESULTS], values={"checkpoints": checkpoints, "tasks": tasks, "missing": missing})


# The encoders of the last group in this process: the next task mostly wants the same.
_ENCODERS: dict[tuple[str, str, str], Any] = {}


def unit_name(checkpoint: str, task: Task) -> str:
    """Distinct for distinct checkpoints and tasks, and safe as a path whatever the checkpoint is called."""
    folder = quote(checkpoint, safe="")
    if folder.startswith("."):
        folder = "%2E" + folder[1:]
    return f"{folder}/{task.data_folder.removeprefix('wds_').removesuffix('_test')}"


def _result_line(checkpoint: str, task: Task, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A line as DataComp's evaluation writes it, with the checkpoint's name beside."""
    figures = {row["metric"]: row["value"] for row in rows if row["protocol"] == "zeroshot"}
    if "acc1" in figures:
        figures.setdefault("acc5", None)
    figures["main_metric"] = figures.get(task.metric) if task.metric else None
    return {"key": task.key, "dataset": task.name, "metrics": figures, "checkpoint": checkpoint}
