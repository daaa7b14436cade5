"""Keep captions of a typical length."""

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from winnow.curation.filters.base import Filter, numbers
from winnow.infra.params import params

Quantile = Annotated[float, Field(ge=0, le=1)]


@params
class TypicalLength(Filter):
    """Keep captions whose number of characters is between two quantiles of the pool."""

    low: Quantile = 0.05
    high: Quantile = 0.95

    name: ClassVar[str] = "typical_length"
    paper: ClassVar[str] = "an example"

    def __post_init__(self):
        if self.low >= self.high:
            raise ValueError("low must be less than high")

    def columns(self):
        return ("caption.characters",)  # so the measure `caption` runs

    def fit(self, view):
        length = np.concatenate([numbers(batch["caption.characters"]) for batch in view.batches(self.columns())])
        low, high = np.nanquantile(length, [self.low, self.high])
        return {"low": low, "high": high}

    def mask(self, batch, state):
        length = numbers(batch["caption.characters"])
        return (length >= state["low"]) & (length <= state["high"])
