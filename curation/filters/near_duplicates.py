"""Near duplicates: keep one of several images that are almost the same."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from winnow.curation.columns.pool_columns import collect
from winnow.curation.columns.table import View
from winnow.curation.filters.base import Fraction, Scope, SelectionFilter, State, as_state
from winnow.curation.search.hamming import hamming_pairs
from winnow.curation.search.neighbours import cosine_pairs, first_of_groups
from winnow.infra.params import ParameterError, params

HASH, VECTOR = "image_hash.phash", "clip.image"
# Unrelated images differ in about 32 of the 64 bits.
Radius = Annotated[int, Field(ge=0, le=16)]


@params
class NearDuplicates(SelectionFilter):
    """Keep one of several images that are near each other: the best by a score, or the first.

    Two images are near when their perceptual hashes (measure `image_hash`, 64 bits) differ in at most `radius` bits,
    or when the cosine of their embeddings is at least `cosine`. Nearness is not transitive, so there are two ways to
    select. `greedy` goes through the samples from the best to the worst and keeps each that is near no kept sample:
    every dropped sample is near a kept one, and no two kept samples are near. `components` keeps the best sample of
    each connected component, so it may drop a sample that is near no kept one.

    Hash pairs are exact (Manku, Jain & Das Sarma 2007). Embedding pairs are exact up to 200,000 samples; above, they
    come from FAISS's inverted file, which may miss some.

    Args:
        radius: largest number of different bits, 0 to 16; instead of a cosine.
        cosine: smallest cosine, in (0, 1].
        score: column of numbers. Of near samples the one with the highest score is kept; samples without a score come
            last. None keeps the first in the pool.
        join: "greedy" or "components".
        of: `pool` or `survivors`: what is compared.
        column: of the hashes or embeddings; None for `image_hash.phash` with a radius, `clip.image` with a cosine.
    """

    radius: Radius | None = None
    cosine: Fraction | None = None
    score: str | None = None
    join: Literal["greedy", "components"] = "greedy"
    of: Scope = "pool"
    column: str | None = None

    added: ClassVar[tuple[str, ...]] = ("column",)
    name: ClassVar[str] = "near_duplicates"
    paper: ClassVar[str] = "Zauner 2010 (pHash); Manku et al. 2007 (search)"
    example: ClassVar[dict[str, Any]] = {"radius": 4}

    def __post_init__(self) -> None:
        if (self.radius is None) == (self.cosine is None):
            what = "near_duplicates takes either a radius or a cosine"
            raise ParameterError(what, do="Join two of them under `all:`.")

    def columns(self) -> tuple[str, ...]:
        return (*super().columns(), *((self.score,) if self.score else ()))

    def numeric(self) -> tuple[str, ...]:
        return (self.column or (HASH if self.cosine is None else VECTOR),)

    def fit(self, view: View) -> State:
        (column,) = self.numeric()
        vectors, scalars = ((), (column,)) if self.cosine is None else ((column,), ())
        pool = collect(view, vectors, scalars, (self.score,) if self.score else ())
        score = pool.numbers[self.score] if self.score else np.zeros(len(pool))
        rank = _ranks(-np.nan_to_num(score, nan=-np.inf))
        if self.cosine is not None:
            near = cosine_pairs(pool.vectors[column], None, self.cosine)
            return as_state(pool.uids, first_of_groups(*near, rank, self.join))
        assert self.radius is not None
        # Samples with equal hashes are one node, represented by the best of them.
        values, owner = np.unique(pool.numbers[column], return_inverse=True)
        lead = np.full(len(values), len(rank), np.int64)
        np.minimum.at(lead, owner, rank)
        near = hamming_pairs(values, None, self.radius)
        stays = first_of_groups(*near, _ranks(lead), self.join)
        return as_state(pool.uids, stays[owner] & (rank == lead[owner]))


def _ranks(keys: np.ndarray) -> np.ndarray:
    """The rank of each key in ascending order; equal keys in their given order. int64, shape [n]."""
    ranks = np.empty(len(keys), np.int64)
    ranks[np.argsort(keys, kind="stable")] = np.arange(len(keys))
    return ranks
