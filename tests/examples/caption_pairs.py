"""Images with a wrong caption and then the right one: is the right one nearer to the image?"""

from __future__ import annotations

import numpy as np

from winnow.evaluate import metrics
from winnow.evaluate.protocols.base import EvalSet, Features, Kind, Row, Target, read_captions
from winnow.evaluate.tasks.task import Task, TaskError
from winnow.infra.pool.sample import Sample


class CaptionPairs(Kind):
    embeds_captions = True
    protocols = frozenset({"zeroshot"})

    def members(self, task: Task) -> tuple[str, ...]:
        return ("txt",)

    def read(self, sample: Sample) -> Target:
        captions = read_captions(sample)
        if len(captions) != 2:
            raise TaskError(f"{len(captions)} captions instead of 2")
        return Target(captions=captions)

    def chance(self, task: Task, n: int) -> float:
        return 0.5

    def zeroshot(self, features: Features, test_set: EvalSet) -> list[Row]:
        wrong = features.encode_texts([captions[0] for captions in features.captions])
        right = features.encode_texts([captions[1] for captions in features.captions])
        better = np.sum(features.images * (right - wrong), axis=1) > 0
        value, n = float(better.mean()), len(better)
        return [Row("acc1", value, n, metrics.binomial_stderr(value, n))]
