"""Reading what the embed stage has written, through its listing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from winnow.evaluate.protocols.base import EvalSet, Targets
from winnow.evaluate.sets.files import split_tars
from winnow.evaluate.sets.shards import Wanted, check_targets, read_samples
from winnow.evaluate.tasks.task import TaskError
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.parquet import read_parquet
from winnow.infra.pool.sample import Sample
from winnow.infra.stages.kept import check_kept, check_unit
from winnow.infra.stages.stage import read_manifest


class NotEmbedded(WinnowError):
    """Features that should exist do not; running again may compute them."""


@dataclass(frozen=True)
class LoadedSplit:
    """A split of a set with one encoder's features, without the images that cannot be decoded."""

    targets: Targets
    images: np.ndarray  # float32 [n, dim], L2-normalised
    skipped: list[tuple[str, str]]  # (key, reason) of the images that cannot be decoded
    texts: dict[str, np.ndarray]  # the embedding of each caption, where captions were embedded
    has_text: bool  # whether the encoder reads text
    tars: list[str]
    indices: list[int]  # of the samples among all of the split
    wanted: Wanted

    def samples(self, wanted: Sequence[int]) -> list[Sample]:
        return read_samples(self.tars, [self.indices[i] for i in wanted], self.wanted)


class FeatureFiles:
    """The files of a directory of features that a listing (`SetsStage.listing`) names. Raises NotEmbedded."""

    def __init__(self, url: str, listing: str) -> None:
        self.url, path = url, storage.join(url, listing)
        if not storage.exists(path):
            raise NotEmbedded("the features are missing", where=url, do="Run again to embed what is missing.")
        check_kept(path)
        self._listing = _read_listing(path, storage.version_token(path))

    def reason(self, unit: str) -> str | None:
        """Why a unit failed, where the last run in the directory says so."""
        manifest = read_manifest(self.url)
        return None if manifest is None else manifest.skipped["units"].get(unit)

    def split(self, test_set: EvalSet, split: str, data: str, encoder: str) -> LoadedSplit:
        """Read a split's features and targets. `data` is the digest of its data, `encoder` that of the encoder.

        Raises:
            TaskError: the split is broken.
            NotEmbedded: there are no features of it.
        """
        tars = {storage.name_of(tar): tar for tar in split_tars(test_set.url, split)}
        listed = self._listing["splits"].get(split)
        if listed is None or listed["data"] != data:
            raise NotEmbedded("has not been embedded", where=storage.join(test_set.url, split), do="Run again.")
        targets, images, skipped, indices = [], [], [], []
        texts: dict[str, np.ndarray] = {}
        has_text, count = True, 0
        for entry in listed["parts"]:
            tar = tars[entry["shard"]]
            (file,) = self._unit(entry["samples"], tar)["files"]
            table = read_parquet(check_unit(self.url, entry["samples"], file))
            here, faults = targets_of(table)
            targets.append(check_targets(here, faults, test_set, tar))
            name = entry["images"].get(encoder, "")
            unit = self._unit(name, tar)
            has_text = has_text and unit["text"]
            images.append(self._array(name))
            if f"{name}-texts.npy" in unit["files"]:
                captions = [text for captions in here.captions for text in captions]
                texts |= zip(captions, self._array(name, "-texts"), strict=True)
            for key, reason in zip(here.keys, table["skipped"].to_pylist(), strict=True):
                if reason is None:
                    indices.append(count)
                else:
                    skipped.append((key, reason))
                count += 1
        if not indices:
            reason = "none of its images can be decoded" if skipped else "holds no sample"
            raise TaskError(reason, where=storage.join(test_set.url, split))
        features = np.concatenate(images)
        assert len(features) == len(indices), f"{len(features)} features of {len(indices)} samples"
        kept, wanted = Targets.concatenate(targets, indices), Wanted.by(test_set.kind, test_set.task)
        return LoadedSplit(kept, features, skipped, texts, has_text, [*tars.values()], indices, wanted)

    def class_weights(self, encoder: str) -> np.ndarray | None:
        """float32 [classes, dim]; None where no prompts were embedded. Raises NotEmbedded."""
        names = self._listing["prompts"].get(encoder, [])
        if not names or not all(self._unit(name)["text"] for name in names):
            return None
        return np.concatenate([self._array(name) for name in names])

    def _unit(self, name: str, tar: str | None = None) -> dict[str, Any]:
        unit: dict[str, Any] | None = self._listing["units"].get(name)
        if unit is None:
            raise NotEmbedded("the features are missing", where=name, do="Run again to embed what is missing.")
        if "error" in unit:
            raise TaskError(unit["error"])
        if "broken" in unit:
            what, do = unit["broken"]
            raise TaskError(what, where=tar, do=do)
        return unit

    def _array(self, unit: str, part: str = "") -> np.ndarray:
        with storage.open_read(check_unit(self.url, unit, f"{unit}{part}.npy")) as handle:
            return np.asarray(np.load(handle, allow_pickle=False))


@functools.lru_cache(maxsize=4)
def _read_listing(url: str, token: str) -> dict[str, Any]:
    """Read once for many units; the token distinguishes versions of the file."""
    listing: dict[str, Any] = storage.read_json(url)
    return listing


def targets_of(table: pa.Table) -> tuple[Targets, list[str | None]]:
    """The targets of a part, and what is wrong with each sample, from the table of its samples unit."""
    columns = table.to_pydict()
    labels = np.fromiter((-1 if label is None else label for label in columns["label"]), np.int64, table.num_rows)
    captions = [tuple(texts) for texts in columns["captions"]]
    return Targets(columns["key"], labels, captions, [tuple(row) for row in columns["metadata"]]), columns["fault"]
