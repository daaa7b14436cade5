"""Zero-shot classification with prompt ensembles (Radford et al. 2021, section 3.1.4), and its kinds of task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from winnow.evaluate import metrics
from winnow.evaluate.protocols.base import (
    SEED,
    EvalSet,
    Features,
    Kind,
    Protocol,
    Row,
    SetTexts,
    Target,
    Targets,
    read_label,
    read_metadata,
)
from winnow.evaluate.sets.files import CLASSNAMES, read_classes
from winnow.evaluate.tasks.task import Task, TaskError
from winnow.infra.io import storage
from winnow.infra.io.text import TextError, read_json_text, read_text
from winnow.infra.pool.sample import Sample

TEXTS_AT_ONCE = 4096
MAX_GROUPS = 1_000_000  # values of a field of the metadata


class Prompted(Kind):
    """Classes with prompts."""

    def open(self, task: Task, url: str) -> SetTexts:
        """The classes and prompts; `extra` is the new label of each kept class by its label, where the set has more
        classes than its task, else None."""
        classnames, templates = read_classes(url, task.classes)
        kept = None
        mapping = storage.join(url, task.mapping) if task.mapping else ""
        if mapping and task.classes is not None and len(classnames) > task.classes and storage.exists(mapping):
            classnames, kept = _mapped(classnames, mapping)
        if task.classes is not None and len(classnames) != task.classes:
            what = f"has {len(classnames)} class names, {task.name} has {task.classes} classes"
            raise TaskError(what, where=storage.join(url, CLASSNAMES))
        return SetTexts(classnames, templates, kept)


class Classification(Prompted):
    """One label an image (`KEY.cls`), and prompts for each class."""

    def members(self, task: Task) -> tuple[str, ...]:
        return ("cls", "npy") if task.metadata else ("cls",)

    def read(self, sample: Sample) -> Target:
        return Target(label=read_label(sample), metadata=read_metadata(sample))

    def check(self, targets: Targets, test_set: EvalSet, tar: str) -> Targets:
        labels, kept = targets.labels, test_set.texts.extra
        out_of_range = (labels < 0) | (labels >= len(test_set.classnames) if kept is None else False)
        for i in np.flatnonzero(out_of_range):
            what = f"label {labels[i]} is out of range: {CLASSNAMES} has {len(test_set.classnames)} classes"
            raise TaskError(what, where=f"{tar}, sample {targets.keys[i]}")
        if kept is not None:
            labels = np.array([kept.get(int(label), -1) for label in labels], np.int64)
        task = test_set.task
        required = task.metric in [task.worst_metric(name) for name in task.group_by]
        metadata = metadata_of(targets, len(task.metadata), required, task, tar)
        return replace(targets, labels=labels, metadata=metadata)

    def zeroshot(self, features: Features, test_set: EvalSet) -> list[Row]:
        """`classification_rows` of the inner products with the classes' weights."""
        return classification_rows(features.images @ class_weights(features, test_set).T, features, test_set)


class GroupedClassification(Classification):
    """Classification whose main metric is that of groups of samples."""

    def check_task(self, task: Task) -> None:
        if not task.group_by:
            raise ValueError("a grouped_classification task needs group_by")


def metadata_of(targets: Targets, size: int, required: bool, task: Task, tar: str) -> list[tuple[float, ...]]:
    """The first `size` values of each sample's metadata; NaN where a sample has none and none is required.

    Raises:
        TaskError: a sample has too few values, or one that is not the number of a group.
    """
    if not size:
        return [()] * len(targets.keys)
    rows = []
    fields = [(name, task.metadata.index(name)) for name in task.group_by or task.metadata]
    for key, values in zip(targets.keys, targets.metadata, strict=True):
        where = f"{tar}, sample {key}"
        if not values:
            if required:
                raise TaskError("no metadata (.npy)", where=where)
            rows.append((math.nan,) * size)
            continue
        if len(values) < size:
            raise TaskError(f"the metadata (.npy) holds {len(values)} values instead of {size}", where=where)
        for name, value in ((name, values[column]) for name, column in fields):
            if not 0 <= value < MAX_GROUPS:
                raise TaskError(f"the metadata (.npy) gives {name} as {value:g}, which is not a group", where=where)
        rows.append(tuple(values[:size]))
    return rows


def _mapped(classnames: Sequence[str], mapping: str) -> tuple[tuple[str, ...], Mapping[int, int]]:
    """The class names that are keys of a JSON object (ignoring case), in their order, and the new labels by the old
    ones; every other class has -1."""
    try:
        names = read_json_text(read_text(mapping))
    except (ValueError, TextError) as error:
        raise TaskError(f"is not valid JSON ({error})", where=mapping) from None
    if not isinstance(names, dict):
        raise TaskError("should be an object with class names for keys", where=mapping)
    wanted = {str(name).lower() for name in names}
    labels = [label for label, name in enumerate(classnames) if name.lower() in wanted]
    return tuple(classnames[label] for label in labels), {label: index for index, label in enumerate(labels)}


def class_weights(features: Features, test_set: EvalSet) -> np.ndarray:
    """A class's weight: the mean of its normalised prompt embeddings, normalised again. float32 [classes, dim]."""
    if features.class_weights is not None:
        return features.class_weights
    return prompt_weights(features.encode_texts, [test_set.prompts(name) for name in test_set.classnames])


def prompt_weights(encode_texts: Callable[[list[str]], np.ndarray], prompts: Sequence[Sequence[str]]) -> np.ndarray:
    """`class_weights` of the classes with these prompts, at least one each."""
    step = max(1, TEXTS_AT_ONCE // max(len(texts) for texts in prompts))
    weights = []
    for low in range(0, len(prompts), step):
        batch = prompts[low : low + step]
        embeddings = encode_texts([prompt for texts in batch for prompt in texts])
        counts = np.array([len(texts) for texts in batch])
        sums = np.add.reduceat(embeddings, np.cumsum(counts) - counts, axis=0)
        weights.append(sums / counts[:, None].astype(sums.dtype))
    mean = np.concatenate(weights)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def classification_rows(scores: np.ndarray, features: Features, test_set: EvalSet) -> list[Row]:
    """acc1, acc5 (from five classes up) and mean per-class recall; macro F1 where it is the task's main metric;
    accuracy by group where the task has groups. Images whose label is -1 do not count.

    `scores` are float [n, classes], the higher the likelier; `features` those of the test set, for its labels.
    """
    counted = features.labels >= 0
    scores, labels = scores[counted], features.labels[counted]
    n = len(labels)
    ranks, predicted = metrics.label_ranks(scores, labels), metrics.predictions(scores)
    rows = []
    for k in (1, 5):
        if k == 1 or len(test_set.classnames) >= 5:
            fraction = metrics.accuracy(ranks, k)
            rows.append(Row(f"acc{k}", fraction, n, metrics.binomial_stderr(fraction, n)))
    recall = metrics.mean_per_class_recall(labels, predicted)
    error = metrics.mean_per_class_recall_stderr(labels, predicted, SEED)
    rows.append(Row("mean_per_class_recall", recall, n, error))
    if test_set.task.metric == "F1-macro_all":
        f1 = metrics.macro_f1(labels, predicted)
        rows.append(Row("F1-macro_all", f1, n, metrics.macro_f1_stderr(labels, predicted, SEED)))
    task = test_set.task
    if task.group_by and not np.isnan(features.metadata).any():
        metadata = features.metadata[counted].astype(np.int64)
        for field in task.group_by:
            groups = metadata[:, task.metadata.index(field)]
            rows += group_rows(task.group_metric, field, ranks < task.top, groups, task.worst_metric(field))
    return rows


def group_rows(metric: str, field: str, correct: np.ndarray, groups: np.ndarray, worst: str) -> list[Row]:
    """Accuracy in each group that has samples, "METRIC_FIELD:3", and the lowest of them, as WILDS names them, of bool
    [n] and int [n], at least 0."""
    rows = [
        Row(f"{metric}_{field}:{group}", fraction, size, metrics.binomial_stderr(fraction, size))
        for group, (fraction, size) in metrics.group_accuracies(correct, groups).items()
    ]
    lowest = metrics.worst_group_accuracy(correct, groups)
    return [*rows, Row(worst, lowest, len(groups), metrics.worst_group_stderr(correct, groups, SEED))]


ZEROSHOT = Protocol(
    "zeroshot",
    kinds=frozenset({"zeroshot_classification", "multilabel", "face_attributes", "winogavil", "retrieval"}),
    run=lambda features, test_set: test_set.kind.zeroshot(features, test_set),
    needs=frozenset({"text"}),
)
