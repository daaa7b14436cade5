"""What the embed stage kept, as the evaluate stage wants it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from winnow.evaluate.features.stage import EmbedStage, captions_in
from winnow.evaluate.sets.layout import EvalSet, FoundTask, Sample, TaskError
from winnow.evaluate.sets.shards import Part, read_images
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.parquet import read_parquet
from winnow.infra.stages.stage import Record, Unit, read_record


class NotEmbedded(WinnowError):
    """Features that should be there are not; running again may bring them."""


@dataclass(frozen=True)
class LoadedSplit:
    """A split of a set with one encoder's features, without the images that cannot be decoded.

    Attributes:
        samples: without their images.
        images: float32 [n, dim], L2-normalised.
        aside: (key, reason) of the images that cannot be decoded.
        texts: for a retrieval set, the embedding of each caption.
        has_text: whether the encoder reads text.
        parts: of the split.
        places: int64 [n], of the samples among all of the split.
    """

    samples: list[Sample]
    images: np.ndarray
    skipped: list[tuple[str, str]]
    texts: dict[str, np.ndarray]
    has_text: bool
    parts: list[Part]
    indices: np.ndarray

    def labels(self) -> np.ndarray:
        """int64 [n], -1 where there is none."""
        return np.array([sample.label for sample in self.samples], np.int64)

    def image_bytes(self, wanted: Sequence[int]) -> list[bytes]:
        """The encoded images of some samples, read now."""
        return read_images(self.parts, [int(self.indices[i]) for i in wanted])


def load_split(stage: EmbedStage, found: FoundTask, test_set: EvalSet, split: str, encoder: str) -> LoadedSplit:
    """Read a split's features.

    Args:
        stage: that embedded it.
        found: the set.
        test_set: the same, opened.
        split: "test", "train" or "val".
        encoder: its digest.

    Raises:
        TaskError: the split is broken.
        NotEmbedded: its features are not there.
    """
    parts = stage.parts(found, split)
    samples, images, skipped, indices = [], [], [], []
    texts: dict[str, np.ndarray] = {}
    has_text, counter = True, itertools.count()
    for part in parts:
        unit = stage.samples_unit(part)
        table = _table(stage, unit, _record(stage, unit, part.tar))
        unit = stage.images_unit(part, encoder, found)
        record = _record(stage, unit, part.tar)
        has_text = has_text and record.values["text"]
        captions: list[str] = []
        for row in table:
            members = dict(row["members"])
            sample = test_set.sample(part.tar, row["key"], members)
            here = next(counter)
            captions += captions_in(members)
            if row["skipped"] is not None:
                skipped.append((row["key"], row["skipped"]))
                continue
            samples.append(sample)
            indices.append(here)
        images.append(_array(stage, f"{unit.name}.npy"))
        if f"{unit.name}-texts.npy" in record.files:
            texts |= zip(captions, _array(stage, f"{unit.name}-texts.npy"), strict=True)
    if not samples:
        reason = "none of its images can be decoded" if skipped else "holds no sample"
        raise TaskError(reason, where=storage.join(found.url, split))
    everything = np.concatenate(images)
    assert len(everything) == len(samples), f"{len(everything)} features of {len(samples)} samples"
    return LoadedSplit(samples, everything, skipped, texts, has_text, parts, np.array(indices, np.int64))


def load_class_weights(stage: EmbedStage, found: FoundTask, encoder: str) -> np.ndarray | None:
    """float32 [classes, dim]; None where no prompts were embedded. Raises NotEmbedded."""
    units = [unit for unit in stage.prompt_units(found) if unit.inputs["encoder"] == encoder]
    if not units or not all(_record(stage, unit).values["text"] for unit in units):
        return None
    return np.concatenate([_array(stage, f"{unit.name}.npy") for unit in units])


def _record(stage: EmbedStage, unit: Unit, tar: str | None = None) -> Record:
    record = read_record(stage, unit)
    if record is None:
        raise NotEmbedded("the features are not there", where=unit.name, do="Run again to embed what is missing.")
    if "error" in record.values:
        raise TaskError(record.values["error"])
    if "broken" in record.values:
        what, do = record.values["broken"]
        raise TaskError(what, where=tar, do=do)
    return record


def _table(stage: EmbedStage, unit: Unit, record: Record) -> list[dict]:
    (file,) = record.files
    rows: list[dict] = read_parquet(stage.url(file)).to_pylist()
    return rows


def _array(stage: EmbedStage, file: str) -> np.ndarray:
    with storage.open_read(stage.url(file)) as handle:
        array: np.ndarray = np.load(handle, allow_pickle=False)
    return array
