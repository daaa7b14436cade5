"""The inject stage: add known noise to a pool, drawn from (seed, uid) and recorded for each sample.

The result is another pool; the source is not changed. Its views have the columns `noise` (kind, null when clean) and
`noise_of` (for a copy, the uid of the original). Unaltered images stay in the source's tars, altered ones are in one
more tar a shard. Filters can then be evaluated by how much of each kind of noise they remove.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field, model_validator

from winnow.curation.noise import corrupt
from winnow.infra.io import storage
from winnow.infra.io.images import ImageError, image_extension
from winnow.infra.io.storage import digest_bytes
from winnow.infra.params import Section
from winnow.infra.pool.pool import Pool, Shard
from winnow.infra.pool.uids import decode_uids, derived_uid, hash_unit
from winnow.infra.pool.views import HERE, ROLES
from winnow.infra.pool.writer import PoolWriter, SampleWriter, shard_entries
from winnow.infra.stages.kept import check_kept
from winnow.infra.stages.stage import Output, Record, Stage, Unit, need_manifest, read_locations, read_sources

_COPIES = ("duplicates", "near_duplicates")
_IN_PLACE = ("tiny", "extreme_aspect", "watermark")  # alter the image of the sample itself
KINDS = ("mismatched", *_COPIES, "foreign_language", "file_name", *_IN_PLACE)
# Columns about an image and its caption, or positions in the image: they are wrong after noise was added.
_UNTRUE = ("clip_b32_similarity_score", "clip_l14_similarity_score", "face_bboxes")


class InjectConfig(Section):
    """Fractions of the source pool's samples that get each kind of noise. A sample gets at most one kind.

    Attributes:
        mismatched: the caption of another sample of the shard that was drawn for this kind.
        duplicates: an exact copy with a new uid, appended to the shard.
        near_duplicates: such a copy, slightly cropped, lighter or darker, and re-encoded.
        foreign_language: a sentence in another language for a caption.
        file_name: a file name for a caption.
        tiny: an image of 8 to 14 pixels on the short side.
        extreme_aspect: an image cropped to a ratio of 4 to 8.
        watermark: text laid over the image.
        seed: of the draw.
    """

    mismatched: float = Field(0.0, ge=0, le=1)
    duplicates: float = Field(0.0, ge=0, le=1)
    near_duplicates: float = Field(0.0, ge=0, le=1)
    foreign_language: float = Field(0.0, ge=0, le=1)
    file_name: float = Field(0.0, ge=0, le=1)
    tiny: float = Field(0.0, ge=0, le=1)
    extreme_aspect: float = Field(0.0, ge=0, le=1)
    watermark: float = Field(0.0, ge=0, le=1)
    seed: int = 0

    @model_validator(mode="after")
    def _disjoint(self) -> InjectConfig:
        if (total := sum(self.fractions())) > 1 + 1e-9:
            raise ValueError(f"the fractions sum to {total:g}, more than 1; a sample gets at most one kind of noise")
        return self

    def fractions(self) -> list[float]:
        """In the order of KINDS."""
        return [getattr(self, kind) for kind in KINDS]


@dataclass
class InjectStage(Stage):
    """Derive a noisy pool in the directory `out` from the one at `pool`."""

    pool: str
    config: InjectConfig
    out: str

    name = "inject"
    version = 2
    alone = (".tar", ".parquet")

    def params(self) -> dict[str, Any]:
        return self.config.model_dump()

    def parents(self) -> dict[str, str]:
        return {"pool": Pool.open(self.pool).digest}

    def locations(self) -> dict[str, str]:
        locations = read_locations(self.pool)
        return locations | {_source_location(locations): storage.absolute(self.pool)}

    def read_in_place(self, units: Iterable[Unit], records: Mapping[str, Record]) -> dict[str, list[str]]:
        """Those of the source pool, and its own tars."""
        known, source = read_sources(self.pool), _source_location(read_locations(self.pool))
        found = {reference: list(facts) for reference, facts in known.items()}
        for path, facts in need_manifest(self.pool, "pool").files.items():
            if path.endswith(".tar"):
                tar = check_kept(storage.join(self.pool, path))
                found[f"{source}/{path}"] = [storage.version_token(tar), facts["sha256"]]
        return found

    def plan(self) -> list[Unit]:
        source, units = _source_location(read_locations(self.pool)), []
        entries = need_manifest(self.pool, "pool").values["shards"]
        for shard, entry in zip(Pool.open(self.pool).shards, entries, strict=True):
            tars = [source + tar[len(HERE) :] if tar.startswith(f"{HERE}/") else tar for tar in entry["tars"]]
            units.append(Unit(shard.name, {"shard": shard.digest}, {"tars": tars}, items=shard.rows))
        return units

    def run(self, unit: Unit) -> Output:
        shard = Pool.open(self.pool).shard(unit.name)
        noise = _Noise(shard, shard.table(), self.config)
        # The source's digest covers the content of its tars.
        writer = PoolWriter(self.out, unit.name, ((tar, shard.digest) for tar in unit.params["tars"]))
        if noise.alters:
            with writer.tar(".noise") as tar:
                noise.alter(tar)
        view = pa.Table.from_pylist(noise.rows, schema=noise.schema)
        counts = Counter(kind for kind in view["noise"].to_pylist() if kind is not None)
        return writer.view(view, noise=dict(sorted(counts.items())))

    def finish(self, records: list[Record]) -> Output:
        counts = Counter(dict.fromkeys(KINDS, 0))
        for record in records:
            counts.update(record.values["noise"])
        return Output(values={"shards": shard_entries(records), "noise": dict(counts)})


class _Noise:
    """The noise of one shard: rows of the new view as dictionaries, the source's first and copies after them."""

    def __init__(self, shard: Shard, table: pa.Table, config: InjectConfig) -> None:
        self.shard, self.config = shard, config
        self.uids = decode_uids(table["uid"])
        # The kind of a sample does not depend on other samples; len(KINDS) means none.
        self.kinds = np.searchsorted(np.cumsum(config.fractions()), self._unit("noise"), side="right")
        for name in ("noise", "noise_of"):
            if name not in table.column_names or pa.types.is_null(table[name].type):
                table = table.drop_columns([name]) if name in table.column_names else table
                table = table.append_column(name, pa.nulls(table.num_rows, pa.string()))
        self.schema = table.schema
        self.rows: list[dict[str, Any]] = table.to_pylist()
        self.n_rows = len(self.rows)
        # (row of the source sample, row of the new view that gets the altered image, kind)
        self.alters: list[tuple[int, int, str]] = []
        self._mismatch()
        self._replace_captions()
        self._copies()
        self.alters += [(row, row, kind) for kind in _IN_PLACE for row in self._drawn(kind).tolist()]
        self.alters.sort()

    def _drawn(self, kind: str) -> np.ndarray:
        return np.nonzero(self.kinds == KINDS.index(kind))[0]

    def _unit(self, salt: str) -> np.ndarray:
        return hash_unit(self.uids, self.config.seed, salt)

    def _mismatch(self) -> None:
        """Rotate the captions of the drawn samples, in an order that depends on their uids."""
        rows = self._drawn("mismatched")
        rows = rows[np.argsort(self._unit("mismatched")[rows], kind="stable")]
        texts = [self.rows[row]["text"] for row in rows]
        for row, text in zip(rows, texts[1:] + texts[:1], strict=True):
            if text != self.rows[row]["text"]:
                self._caption(row, text, "mismatched")

    def _replace_captions(self) -> None:
        for kind, write in (("foreign_language", corrupt.foreign_sentence), ("file_name", corrupt.file_name)):
            at = self._unit(kind)
            for row in self._drawn(kind):
                self._caption(row, write(float(at[row])), kind)

    def _caption(self, row: int, text: str, kind: str) -> None:
        # The tar still has the old caption, so only the view's is valid.
        removed = dict.fromkeys(("text_offset", "text_size", "json_offset", "json_size"))
        self._mark(self.rows[row], kind, {"text": text} | removed)

    def _copies(self) -> None:
        for kind in _COPIES:
            for row in self._drawn(kind).tolist():
                source = self.rows[row]
                uid = derived_uid(source["uid"], kind, str(self.config.seed))
                new = {"uid": uid, "key": f"{source['key']}-{uid[:8]}", "noise_of": source["uid"]}
                # The json in the tar has the source's uid.
                copy = dict(source) | new | {"json_offset": None, "json_size": None}
                if kind == "near_duplicates":  # marked once its image is altered
                    self.alters.append((row, len(self.rows), kind))
                self.rows.append(copy if kind == "near_duplicates" else copy | {"noise": kind})

    def _mark(self, row: dict[str, Any], kind: str, changes: dict[str, Any]) -> None:
        row.update({name: None for name in _UNTRUE if name in row} | changes | {"noise": kind})

    def alter(self, tar: SampleWriter) -> None:
        """Write the altered images and point their rows to them. An image that cannot be decoded stays as it is."""
        rows = pa.Table.from_pylist([self.rows[source] for source, _, _ in self.alters], schema=self.schema)
        # The salt is part of the bytes of every altered pool.
        random = [self._unit(f"picture {i}") for i in range(corrupt.DRAWS)]
        failed = []
        for (source, at, kind), sample in zip(self.alters, self.shard.samples(rows), strict=True):
            row = self.rows[at]
            try:
                image = sample.image()
            except ImageError:
                failed.append(at)
                continue
            draws = tuple(float(column[source]) for column in random)
            altered = getattr(corrupt, kind)(image, draws)
            encoded = corrupt.encode(altered, draws)
            replaced = (image_extension(sample.members), *ROLES)
            others = {ext: data for ext, data in sample.members.items() if ext not in replaced}
            location = tar.add(row["key"], {"jpg": encoded} | others)
            self._mark(row, kind, location | _facts(row, kind, image, altered, encoded))
        # A copy without an altered image would be an unmarked exact copy.
        unmade = {at for at in failed if at >= self.n_rows}
        self.rows = [row for at, row in enumerate(self.rows) if at not in unmade]


def _facts(row: dict[str, Any], kind: str, before: Image.Image, after: Image.Image, encoded: bytes) -> dict[str, Any]:
    """The columns that describe the image, recomputed for the altered one."""
    facts: dict[str, Any] = {"width": after.width, "height": after.height, "sha256": digest_bytes(encoded)}
    facts = {name: value for name, value in facts.items() if row.get(name) is not None}
    originals = ("original_width", before.width, after.width), ("original_height", before.height, after.height)
    if kind == "tiny":
        facts |= {name: new for name, _, new in originals}
    if kind == "extreme_aspect":
        facts |= {name: max(1, round(row[name] * new / old)) for name, old, new in originals}
    return facts


def _source_location(locations: dict[str, str]) -> str:
    """A name for the directory of the source pool that is not among its locations."""
    return next(name for name in ("source" + "-source" * n for n in range(len(locations) + 1)) if name not in locations)
