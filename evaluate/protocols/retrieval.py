"""Image–text retrieval with several captions an image: recall@1, @5, @10 in both directions, as CLIP_benchmark
defines it: for text retrieval the fraction of images with any of their captions among the first k, for image retrieval
the fraction of captions with their image among the first k."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from winnow.evaluate import metrics
from winnow.evaluate.protocols.base import SEED, EvalSet, Features, Kind, Row, Target, read_captions
from winnow.evaluate.tasks.task import Task
from winnow.infra.pool.sample import Sample

TEXTS_AT_ONCE = 4096
KS = (1, 5, 10)


class Retrieval(Kind):
    """Images with captions (`KEY.txt`, one a line)."""

    embeds_captions = True
    metric = "mean_recall@1"
    version = 2

    def members(self, task: Task) -> tuple[str, ...]:
        return ("txt",)

    def read(self, sample: Sample) -> Target:
        return Target(captions=read_captions(sample))

    def zeroshot(self, features: Features, test_set: EvalSet) -> list[Row]:
        return retrieval(features)

    def chance(self, task: Task, n: int) -> float | None:
        return 1 / n if task.chance is None else task.chance

    def measured(self, images: int, counts: Sequence[int]) -> int:
        return images


def retrieval(features: Features) -> list[Row]:
    """Recall in both directions, and `mean_recall@1`, the mean of the two at 1."""
    texts = [caption for captions in features.captions for caption in captions]
    owner = np.repeat(np.arange(len(features.captions)), [len(captions) for captions in features.captions])
    captions = np.concatenate(
        [features.encode_texts(texts[low : low + TEXTS_AT_ONCE]) for low in range(0, len(texts), TEXTS_AT_ONCE)]
    )
    text_ranks, image_ranks = metrics.retrieval_ranks(features.images, captions, owner)
    n, m = len(text_ranks), len(image_ranks)
    rows = []
    for k in KS:
        text, image = metrics.accuracy(text_ranks, k), metrics.accuracy(image_ranks, k)
        errors = metrics.recall_stderr(text_ranks < k, image_ranks < k, owner, SEED)
        rows.append(Row(f"image_retrieval_recall@{k}", image, m, errors[1]))
        rows.append(Row(f"text_retrieval_recall@{k}", text, n, errors[0]))
        if k == 1:
            rows.append(Row("mean_recall@1", (text + image) / 2, n, errors[2]))
    return rows
