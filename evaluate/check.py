"""Which test sets are complete, before any work: `winnow evaluate --check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from winnow.evaluate.protocols.base import EvalSet
from winnow.evaluate.report.tables import text_table
from winnow.evaluate.sets import hub, packed
from winnow.evaluate.sets.files import CLASSNAMES, ignored_tars, open_set, split_tars
from winnow.evaluate.sets.layout import TYPE, FoundTask, find_tasks
from winnow.evaluate.sets.shards import has_split, shard_index
from winnow.evaluate.tasks.read import datacomp_tasks, find_task
from winnow.evaluate.tasks.task import Task, TaskError
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage

# States of a set, best first.
COMPLETE, PARTIAL, INCOMPLETE, MISSING = "complete", "partial", "incomplete", "missing"


@dataclass(frozen=True)
class TaskCheck:
    """The state of a task's test set.

    It is "complete"; "partial", when all files are intact but have fewer samples than the task, so that its scores are
    of those only; "incomplete", when files are missing or broken, so that it cannot be evaluated; or "missing".
    """

    task: Task
    state: str
    samples: int | None = None  # in its test shards; None where they are not counted, as on object stores
    note: str = ""  # the faulty files, or where the set is in another form


def check_tasks(data: str, names: Sequence[str] | str = "all") -> list[TaskCheck]:
    """One row for each of DataComp's 40, in the order of their keys, then one for each other set in the folder.

    Reads the text files and, on a local disk, the headers of the shards; no image. On the hub it requests the list of
    files of each repository. Arguments are those of `find_tasks`. Raises UsageError as it does, and WinnowError where
    the hub cannot be reached.
    """
    found = {entry.task.key: entry for entry in find_tasks(data, "all")}
    known = {key: task for key, task in datacomp_tasks().items() if task.group != "extra"}
    tasks = known | {key: entry.task for key, entry in found.items()}
    if names != "all":
        words = [names] if isinstance(names, str) else names
        keys = {find_task(word, tasks).key for word in words}
        tasks = {key: task for key, task in tasks.items() if key in keys}
    return [_check(found[key]) if key in found else TaskCheck(task, MISSING) for key, task in tasks.items()]


def _check(found: FoundTask) -> TaskCheck:
    task, url = found.task, found.url
    try:
        if not storage.is_dir(url):
            return TaskCheck(task, MISSING, note="" if not url.startswith(hub.SCHEME) else f"not on the hub as {url}")
        kept = packed.files(url) if not storage.exists(storage.join(url, "test", "nshards.txt")) else []
        if kept and url.startswith(hub.SCHEME):
            return TaskCheck(task, COMPLETE, note=f"as {', '.join(kept)}; unpacked when it is evaluated")
        lost = _lost_shards(url)
        if lost:
            return TaskCheck(task, INCOMPLETE, note="no " + ", ".join(lost))
        if found.kind is None:
            return TaskCheck(task, INCOMPLETE, note=f'{TYPE}: no protocol evaluates the kind "{task.kind}"')
        test_set = open_set(task, url)
        if not storage.is_local(test_set.url):
            return TaskCheck(task, COMPLETE, note=_train_fault(found, test_set))
        count = found.kind.count(test_set, _count(test_set.tars))
    except hub.Unreachable:
        raise
    except TaskError as error:
        return TaskCheck(task, INCOMPLETE, note=str(error).replace(url + "/", ""))
    except WinnowError as error:
        return TaskCheck(task, INCOMPLETE, note=str(error))
    if not count:
        return TaskCheck(task, INCOMPLETE, 0, "the shards hold no sample")
    partial = task.size is not None and count < task.size
    notes = [f"unpacked from {storage.name_of(url)}" if test_set.url != url else "", *_oddities(test_set)]
    notes.append(_train_fault(found, test_set))
    return TaskCheck(task, PARTIAL if partial else COMPLETE, count, "; ".join(filter(None, notes)))


def _lost_shards(url: str) -> list[str]:
    """The missing shards of those that `nshards.txt` counts."""
    path = storage.join(url, "test", "nshards.txt")
    if not storage.exists(path):
        return []
    with storage.open_read(path) as file:
        count = file.read(32).strip()
    if not count.isdigit() or int(count) > 100_000:
        return []
    present = set(storage.list_names(storage.join(url, "test")))
    return [f"test/{number}.tar" for number in range(int(count)) if f"{number}.tar" not in present]


def _oddities(test_set: EvalSet) -> list[str]:
    """What is read as the peers read it and may still be a mistake: empty class names, shards that are not counted."""
    empty = [str(label) for label, name in enumerate(test_set.classnames) if not name]
    more = ignored_tars(test_set.url)
    return [
        f"{CLASSNAMES}: no name for class {', '.join(empty[:5])}" if empty else "",
        f"not read, as nshards.txt counts {len(test_set.tars)}: {', '.join(more[:5])}" if more else "",
    ]


def _count(tars: Sequence[str]) -> int:
    """Samples of local shards, by their headers. Raises TaskError when one is broken."""
    return sum(len(shard_index(tar, storage.version_token(tar))) for tar in tars)


def _train_fault(found: FoundTask, test_set: EvalSet) -> str:
    """What is wrong with the train split, which the probes need and zero-shot does not; "" if nothing is."""
    if not has_split(test_set.url, "train"):
        return ""
    try:
        tars = split_tars(found.url, "train")
        count = _count(tars) if storage.is_local(test_set.url) else 1
        return "" if count else "train: the shards hold no sample"
    except TaskError as error:
        return str(error).replace(found.url + "/", "")


def check_table(checks: Sequence[TaskCheck]) -> str:
    """The rows as a text table, with a sentence on how many of the 38 can be evaluated."""
    header = ("task", "group", "state", "samples", "of", "note")
    lines = []
    for check in checks:
        counts = ["" if n is None else f"{n:,}" for n in (check.samples, check.task.size)]
        lines.append((check.task.key, check.task.group, check.state, *counts, check.note))
    scored = [check for check in checks if check.task.scored and check.task.group != "extra"]
    usable = sum(check.state in (COMPLETE, PARTIAL) for check in scored)
    partial = sum(check.state == PARTIAL for check in scored)
    summary = f"{usable} of the {len(scored)} scored tasks can be evaluated"
    summary += f", {partial} of them on part of the test set." if partial else "."
    return text_table(header, lines, left=(0, 1, 2, 5)) + "\n\n" + summary
