"""Zero-shot classification of images with several labels, CLIP_benchmark's `dataset_type.txt` = "multilabel": a
sample's `KEY.npy` holds a 1 for each class that it has, else 0."""

from __future__ import annotations

from dataclasses import replace

from winnow.evaluate import metrics
from winnow.evaluate.protocols.base import SEED, EvalSet, Features, Row, Target, Targets, read_metadata
from winnow.evaluate.protocols.zeroshot import Prompted, class_weights, metadata_of
from winnow.evaluate.tasks.task import Task
from winnow.infra.pool.sample import Sample


class Multilabel(Prompted):
    """Several classes an image."""

    metric = "mean_average_precision"

    def members(self, task: Task) -> tuple[str, ...]:
        return ("npy",)

    def read(self, sample: Sample) -> Target:
        return Target(metadata=read_metadata(sample))

    def check(self, targets: Targets, test_set: EvalSet, tar: str) -> Targets:
        metadata = metadata_of(targets, len(test_set.classnames), True, test_set.task, tar)
        return replace(targets, metadata=metadata)

    def zeroshot(self, features: Features, test_set: EvalSet) -> list[Row]:
        """`mean_average_precision` over the classes."""
        scores, targets = features.images @ class_weights(features, test_set).T, features.metadata > 0
        value = metrics.average_precision(scores, targets)
        error = metrics.average_precision_stderr(scores, targets, SEED)
        return [Row("mean_average_precision", value, len(scores), error)]
