"""DataComp's basic filter."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from winnow.curation.filters.base import Filter, State, numbers
from winnow.infra.params import params


@params
class Basic(Filter):
    """English, more than 2 words and 5 characters, short side at least 200 px, long/short at most 3.

    Gadre et al. 2023 (DataComp), appendix E "Basic filtering": language by fastText, words split at whitespace,
    size of the original image.

    Args:
        language: ISO 639 code; None for any.
        min_words, min_characters: at least this many (DataComp: more than 2, more than 5).
        min_side: of the short side, in pixels.
        max_aspect: of the long side over the short side, at least 1.
    """

    language: str | None = "en"
    min_words: Annotated[int, Field(ge=0)] = 3
    min_characters: Annotated[int, Field(ge=0)] = 6
    min_side: Annotated[int, Field(ge=0)] = 200
    max_aspect: Annotated[float, Field(ge=1)] = 3.0

    name: ClassVar[str] = "basic"
    paper: ClassVar[str] = "Gadre et al. 2023 (DataComp)"

    def columns(self) -> tuple[str, ...]:
        language = ("language.code",) if self.language is not None else ()
        return ("caption.words", "caption.characters", "original_width", "original_height", *language)

    def mask(self, batch: pa.Table, state: State) -> np.ndarray:
        width, height = numbers(batch["original_width"]), numbers(batch["original_height"])
        short, long = np.minimum(width, height), np.maximum(width, height)
        mask = (numbers(batch["caption.words"]) >= self.min_words) & (short >= self.min_side)
        mask &= numbers(batch["caption.characters"]) >= self.min_characters
        with np.errstate(divide="ignore", invalid="ignore"):
            mask &= long / short <= self.max_aspect
        if self.language is not None:
            same = pa.compute.equal(batch["language.code"], self.language)
            mask &= pa.compute.fill_null(same, False).to_numpy()
        return mask
