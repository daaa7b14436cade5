"""A random fraction of the pool."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from winnow.curation.filters.base import Filter, Fraction, State
from winnow.infra.params import params
from winnow.infra.pool.uids import decode_uids, hash_unit


@params
class RandomFraction(Filter):
    """Keep a sample when the hash of its uid and the seed, a number in [0, 1), is below the fraction.

    The draw of a sample does not depend on the pool, the order or the shards. A larger fraction keeps everything that a
    smaller one keeps. The number of kept samples is binomial with mean n * fraction.

    Args:
        fraction: in (0, 1].
        seed: different seeds draw independent samples.
    """

    fraction: Fraction
    seed: int = 0

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "the baseline of Gadre et al. 2023 (DataComp)"
    example: ClassVar[dict[str, Any]] = {"fraction": 0.3}

    def columns(self) -> tuple[str, ...]:
        return ("uid",)

    def mask(self, batch: pa.Table, state: State) -> np.ndarray:
        return hash_unit(decode_uids(batch["uid"]), self.seed, "random") < self.fraction
