"""The filter of LAION-2B, as DataComp reproduces it."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from winnow.curation.columns.threshold import scores_of
from winnow.curation.filters.base import Filter, State
from winnow.infra.params import params


@params
class Laion2b(Filter):
    """English captions whose CLIP ViT-B/32 score is at least 0.28.

    Schuhmann et al. 2022 (LAION-5B), section 3; reproduced in Gadre et al. 2023 (DataComp), "LAION-2B filtering".
    Deviation: both detect the language with CLD3, while `language.code` is fastText's by default, as in DataComp's
    other filters. `measures: {language: {identifier: gcld3}}` gives exactly their subset.

    Args:
        threshold: of `clip_b32_similarity_score`, compared in the column's own precision.
        language: ISO 639 code.
    """

    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.28
    language: str = "en"

    name: ClassVar[str] = "laion2b"
    paper: ClassVar[str] = "Schuhmann et al. 2022 (LAION-5B); Gadre et al. 2023 (DataComp)"

    def columns(self) -> tuple[str, ...]:
        return ("clip_b32_similarity_score", "language.code")

    def mask(self, batch: pa.Table, state: State) -> np.ndarray:
        same = pc.fill_null(pc.equal(batch["language.code"], self.language), False).to_numpy()
        with np.errstate(invalid="ignore"):
            return (scores_of(batch, "clip_b32_similarity_score") >= self.threshold) & same
