"""Statistics of the characters of a caption."""

from __future__ import annotations

from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from winnow.curation.measures.base import Measure, Samples
from winnow.infra.params import params

_FILE = r"(?i)^\S+\.(jpe?g|png|gif|webp|bmp|tiff?|svg|heic)$"
_CAMERA = r"(?i)^(img|dsc|dscn|dscf|dcim|pict|p|image|photo|screenshot|wp)[ _-]?\d{2,}[\d _-]*$"


@params
class CaptionStats(Measure):
    """Fractions of a caption's characters, and whether it is a file name.

    `digits`, `punctuation` and `upper` are the fractions of decimal digits, punctuation and upper-case letters (Unicode
    categories Nd, P, Lu) among all characters, float32, 0 for an empty caption. `word_length` is the number of
    characters that are not white space per whitespace-separated word, float32, 0 without words. `file_name` is whether
    the trimmed caption is a single word with the extension of an image, or a numbered name as cameras give it, bool.
    """

    name: ClassVar[str] = "caption_stats"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("text",)
    summary: ClassVar[str] = "fractions of digits, punctuation, upper case; word length; whether it is a file name"

    def schema(self) -> pa.Schema:
        fractions = [(name, pa.float32()) for name in ("digits", "punctuation", "upper", "word_length")]
        return pa.schema([*fractions, ("file_name", pa.bool_())])

    def compute(self, samples: Samples) -> pa.Table:
        text = samples.table["text"].combine_chunks().cast(pa.string())
        length = pc.max_element_wise(pc.utf8_length(text), 1, skip_nulls=False)
        fractions = [
            pc.divide(pc.count_substring_regex(text, pattern).cast(pa.float32()), length.cast(pa.float32()))
            for pattern in (r"\p{Nd}", r"\p{P}", r"\p{Lu}")
        ]
        # White space as Python's str.split has it, with the separators U+001C to U+001F.
        spaces = r"[\s\x0b\x1c-\x1f\x{85}\p{Z}]"
        words = pc.count_substring_regex(text, f"[^{spaces[1:-1]}]+")
        letters = pc.subtract(pc.utf8_length(text), pc.count_substring_regex(text, spaces))
        word_length = pc.divide(
            letters.cast(pa.float32()), pc.max_element_wise(words, 1, skip_nulls=False).cast(pa.float32())
        )
        trimmed = pc.utf8_trim_whitespace(text)
        file = pc.or_(pc.match_substring_regex(trimmed, _FILE), pc.match_substring_regex(trimmed, _CAMERA))
        columns = [column.cast(pa.float32()) for column in (*fractions, word_length)]
        return pa.table([*columns, file], schema=self.schema())
