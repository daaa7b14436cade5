"""DataComp's text-based filter."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from winnow.curation.filters.base import Filter, State
from winnow.infra.params import params


@params
class TextBased(Filter):
    """English captions that name an ImageNet-21k class.

    Gadre et al. 2023 (DataComp), "Text-based filtering": language by fastText; at least one whitespace-separated
    word whose first WordNet synset is in ImageNet-21k. The measure `entity` documents the details.

    Args:
        language: ISO 639 code; None for any.
    """

    language: str | None = "en"

    name: ClassVar[str] = "text_based"
    paper: ClassVar[str] = "Gadre et al. 2023 (DataComp)"

    def columns(self) -> tuple[str, ...]:
        return ("entity.in21k", *(("language.code",) if self.language is not None else ()))

    def mask(self, batch: pa.Table, state: State) -> np.ndarray:
        mask = pc.fill_null(pc.equal(batch["entity.in21k"], True), False)
        if self.language is not None:
            mask = pc.and_(mask, pc.fill_null(pc.equal(batch["language.code"], self.language), False))
        return mask.to_numpy()
