"""Counts over the caption's text."""

from __future__ import annotations

from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from winnow.curation.measures.base import Measure, Samples
from winnow.infra.params import params


@params
class Caption(Measure):
    """`caption.words`: whitespace-separated words; `caption.characters`: Unicode code points. int32.

    As DataComp's basic filter counts them: Python's `len(text.split())` and `len(text)` (Gadre et al. 2023, app. E).
    """

    name: ClassVar[str] = "caption"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("text",)
    summary: ClassVar[str] = "words and characters of the caption"

    def schema(self) -> pa.Schema:
        return pa.schema([("words", pa.int32()), ("characters", pa.int32())])

    def compute(self, samples: Samples) -> pa.Table:
        text = samples.table["text"].combine_chunks()
        # str.split() also splits at the separators U+001C to U+001F, which Arrow's Unicode whitespace leaves out.
        pieces = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.replace_substring_regex(text, "[\x1c-\x1f]", " ")))
        words = pc.list_value_length(pieces)
        empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(text)), 0)
        words = pc.if_else(empty, 0, words)
        return pa.table([pc.cast(words, pa.int32()), pc.cast(pc.utf8_length(text), pa.int32())], schema=self.schema())
