"""Decontamination: drop images that are also in evaluation sets."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from winnow.curation.columns.pool_columns import collect
from winnow.curation.columns.table import View, embeddings, missing
from winnow.curation.filters.base import Filter, Fraction, Names, State, each
from winnow.curation.filters.near_duplicates import HASH, VECTOR, Radius
from winnow.curation.search.hamming import hamming_pairs
from winnow.curation.search.neighbours import cosine_pairs
from winnow.infra.errors import WinnowError
from winnow.infra.io.arrow import mask_array
from winnow.infra.params import ParameterError, params
from winnow.infra.pool.uids import decode_uids, is_member, sort_uids


@params
class Decontaminate(Filter):
    """Drop samples whose image is near an image of a target set, and count them per task.

    As in `near_duplicates`, two images are near when their perceptual hashes differ in at most `radius` bits, or when
    the cosine of their embeddings is at least `cosine`; with both given, either is enough. Gadre et al. 2023, appendix
    F, use the similarity of copy-detection embeddings (0.604169); this filter uses CLIP embeddings and pHash instead.
    A sample without one of the values is dropped, because it cannot be compared.

    The funnel reports per task how many pool samples are near one of its images, and how many of its images are near
    a pool sample. A task is the folder of a set in DataComp's layout, or a plain folder of shards.

    Args:
        target: folder of evaluation sets in DataComp's layout (only `test` shards are used), folder of shards, or a
            list of such.
        radius: largest number of different bits, 0 to 16.
        cosine: smallest cosine, in (0, 1].
        column: of the embeddings.
    """

    target: Names
    radius: Radius | None = 4
    cosine: Fraction | None = None
    column: str = VECTOR

    added: ClassVar[tuple[str, ...]] = ("column",)
    name: ClassVar[str] = "decontaminate"
    paper: ClassVar[str] = "Gadre et al. 2023 (DataComp), appendix F"
    example: ClassVar[dict[str, Any]] = {"target": "evalsets"}

    def __post_init__(self) -> None:
        if self.radius is None and self.cosine is None:
            raise ParameterError("decontaminate takes a radius, a cosine, or both")

    def columns(self) -> tuple[str, ...]:
        return ("uid", *self.numeric())

    def numeric(self) -> tuple[str, ...]:
        return self.target_columns()

    def targets(self) -> tuple[str, ...]:
        return each(self.target)

    def target_columns(self) -> tuple[str, ...]:
        hashed = (HASH,) if self.radius is not None else ()
        return (*hashed, self.column) if self.cosine is not None else hashed

    def fit(self, view: View) -> State:
        hashes, vectors, task, names = self._images(view)
        if not len(task):
            raise WinnowError("the target sets have no usable image", where=", ".join(self.targets()))
        pool = collect(view, [self.column] if vectors is not None else [], [HASH] if hashes is not None else [])
        pairs = [np.empty((2, 0), np.int64)]
        if hashes is not None:
            assert self.radius is not None
            pairs.append(np.stack(hamming_pairs(pool.numbers[HASH], hashes, self.radius)))
        if vectors is not None:
            assert self.cosine is not None
            pairs.append(np.stack(cosine_pairs(pool.vectors[self.column], vectors, self.cosine)))
        sample, image = np.concatenate(pairs, axis=1)
        kinds = len(names)
        near = np.unique(sample * kinds + task[image]) % kinds
        return {
            "near": sort_uids(pool.uids[np.unique(sample)]),
            "tasks": np.array(names),
            "images": np.bincount(task, minlength=kinds),
            "samples": np.bincount(near, minlength=kinds),
            "leaked": np.bincount(task[np.unique(image)], minlength=kinds),
        }

    def _images(self, view: View) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray, list[str]]:
        """Hashes and embeddings of the target images, the index of each image's task, and the names of the tasks."""
        hashes, vectors, numbers, names = [], [], [], []
        for target in self.targets():
            name = target.rstrip("/").rsplit("/", 1)[-1]
            for shard, batch in view.target(target).shards(self.target_columns()):
                batch = batch.filter(mask_array(~missing(batch, batch.column_names)))
                task = task_name(shard, name)
                if task not in names:
                    names.append(task)
                numbers.append(np.full(batch.num_rows, names.index(task)))
                if self.radius is not None:
                    hashes.append(batch[HASH].to_numpy().astype(np.uint64))
                if self.cosine is not None and batch.num_rows:
                    vectors.append(embeddings(batch, self.column)[0])
        return (
            np.concatenate(hashes) if hashes else None,
            np.concatenate(vectors) if vectors else None,
            np.concatenate(numbers) if numbers else np.empty(0, np.int64),
            names,
        )

    def mask(self, batch: pa.Table, state: State) -> np.ndarray:
        return ~is_member(decode_uids(batch["uid"]), state["near"])

    def report(self, state: State) -> dict[str, Any]:
        rows = zip(*(state[name].tolist() for name in ("tasks", "images", "samples", "leaked")), strict=True)
        keys = ("images", "near_samples", "leaked_images")
        return {"tasks": {task: dict(zip(keys, counts, strict=True)) for task, *counts in rows}}


def task_name(shard: str, folder: str) -> str:
    """The task of a target's shard: imagenet1k for `wds_imagenet1k_test/test/0`, and for `test/0` in that folder."""
    parts = shard.split("/")
    name = parts[-3] if len(parts) > 2 else folder
    return name.removeprefix("wds_").removesuffix("_test")
