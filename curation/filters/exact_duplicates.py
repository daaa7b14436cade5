"""Exact duplicates: keep one of several samples that are equal in given columns."""

from __future__ import annotations

import hashlib
from typing import ClassVar

import numpy as np
import pyarrow as pa

from winnow.curation.columns.table import View, missing
from winnow.curation.filters.base import Names, Scope, SelectionFilter, State, as_state, each, numbers
from winnow.infra.io.arrow import mask_array
from winnow.infra.params import params
from winnow.infra.pool.uids import UID_DTYPE, decode_uids


@params
class ExactDuplicates(SelectionFilter):
    """Keep one of several samples with equal values in all given columns: the best by a score, or the first.

    The default column is the sha256 of the image's file in the shard (measure `content`). DataComp's column `sha256`
    has that of the original image, before it was resized: `by: sha256`. Values are compared by their 128-bit BLAKE2b
    digests. A sample without a value is dropped.

    Args:
        by: column or columns; with `text` among them, captions must agree too.
        score: column of numbers. Of equal samples the one with the highest score is kept, of equal scores the first;
            samples without a score come last. None keeps the first in the pool.
        of: `pool` or `survivors`: what is compared.
    """

    by: Names = "content.sha256"
    score: str | None = None
    of: Scope = "pool"

    name: ClassVar[str] = "exact_duplicates"
    paper: ClassVar[str] = "sha256 of the file"

    def columns(self) -> tuple[str, ...]:
        return (*super().columns(), *((self.score,) if self.score else ()))

    def numeric(self) -> tuple[str, ...]:
        return each(self.by)

    def fit(self, view: View) -> State:
        uids, marks, scores = [np.empty(0, UID_DTYPE)], [np.empty(0, UID_DTYPE)], [np.empty(0)]
        for batch in view.batches(self.columns()):
            batch = batch.filter(mask_array(~missing(batch, self.numeric())))
            uids.append(decode_uids(batch["uid"]))
            marks.append(fingerprints([batch[name] for name in self.numeric()]))
            if self.score:
                scores.append(numbers(batch[self.score]))
        mark = np.concatenate(marks)
        score = np.nan_to_num(np.concatenate(scores), nan=-np.inf) if self.score else np.zeros(len(mark))
        order = np.lexsort((np.arange(len(mark)), -score, mark["f1"], mark["f0"]))
        ordered = mark[order]
        mask = np.zeros(len(mark), dtype=bool)
        mask[order[np.r_[True, ordered[1:] != ordered[:-1]]] if len(order) else order] = True
        return as_state(np.concatenate(uids), mask)


def fingerprints(columns: list[pa.ChunkedArray]) -> np.ndarray:
    """128 bits of the values of each row; dtype u8,u8, shape [n]."""
    rows = zip(*(column.to_pylist() for column in columns), strict=True)
    digests = b"".join(hashlib.blake2b(repr(row).encode(), digest_size=16).digest() for row in rows)
    return np.frombuffer(digests, dtype=UID_DTYPE)
