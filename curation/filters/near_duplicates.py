"""Near duplicates: of images that are almost the same, one stays."""

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
    """Keep of images near each other one, the best by a score or the first.

    Two images are near when their perceptual hashes (measure `image_hash`, 64 bits) differ in at most `radius` bits,
    or when the cosine of their embeddings is at least `cosine`. Nearness does not carry on from image to image, so
    there are two ways to thin out: `greedy` goes through the samples from the best, and keeps one when it is near none
    kept before, so every sample dropped has a near one kept, and no two kept are near; `components` keeps the best of
    each connected component, and may drop what is like its neighbour's neighbour alone.

    Hash pairs are exact (Manku, Jain & Das Sarma 2007). Embedding pairs are exact up to 200,000 samples, beyond from
    FAISS's inverted file, which may miss some.

    Args:
        radius: most bits that differ, 0 to 16; instead of a cosine.
        cosine: least cosine, in (0, 1].
        score: column of numbers; of near samples the one with the most stays, without a score last. None for the
            first in the pool.
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
            raise ParameterError(
                "near_duplicates takes either a radius or a cosine", do="Join two of them under `all:`."
            )

    def columns(self) -> tuple[str, ...]:
        return ("uid", *self.numeric(), *((self.score,) if self.score else ()))

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
        # Equal hashes are as one: what is near one of them is near all, and the best of them speaks for them.
        values, owner = np.unique(pool.numbers[column], return_inverse=True)
        lead = np.full(len(values), len(rank), np.int64)
        np.minimum.at(lead, owner, rank)
        near = hamming_pairs(values, None, self.radius)
        stays = first_of_groups(*near, _ranks(lead), self.join)
        return as_state(pool.uids, stays[owner] & (rank == lead[owner]))


def _ranks(keys: np.ndarray) -> np.ndarray:
    """The place of each key in rising order, equal ones as they stand. int64, shape [n]."""
    ranks = np.empty(len(keys), np.int64)
    ranks[np.argsort(keys, kind="stable")] = np.arange(len(keys))
    return ranks
