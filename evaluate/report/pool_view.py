"""A subset compared with its pool: the noise removed, and examples of images kept and dropped."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.arrow import one_chunk
from winnow.infra.io.images import ImageError, decode_image
from winnow.infra.io.parquet import open_parquet
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import decode_uids, hash_unit, is_member

IMAGES = 12
THUMBNAIL = 96  # px
CAPTION = 300  # characters
SUBSET, FUNNEL, REASONS = "subset.npy", "funnel.json", "reasons.parquet"


@dataclass(frozen=True)
class GalleryImage:
    """A sample to show. `jpeg` is base64; empty when it cannot be decoded."""

    uid: str
    caption: str
    jpeg: str
    noise: str = ""
    reason: str = ""


@dataclass
class SubsetView:
    """A subset against its pool, with a few images of both parts."""

    present: Counter[str] = field(default_factory=Counter)  # samples of each noise kind in the pool; "" is clean
    removed: Counter[str] = field(default_factory=Counter)  # of those, the ones not in the subset
    has_noise: bool = False  # whether the pool says what is noise
    kept: list[GalleryImage] = field(default_factory=list)
    dropped: list[GalleryImage] = field(default_factory=list)

    def noise(self) -> dict[str, Any] | None:
        """Counts by kind, and precision, recall and the clean shares; None for a pool that does not say."""
        if not self.has_noise:
            return None
        kinds = sorted(kind for kind in self.present if kind)
        noisy, total = sum(self.present[kind] for kind in kinds), self.present.total()
        gone, dropped = sum(self.removed[kind] for kind in kinds), self.removed.total()
        kept_clean = self.present[""] - self.removed[""]
        return {
            "kinds": [
                {"kind": kind, "present": n, "removed": self.removed[kind], "share": self.removed[kind] / n}
                for kind, n in ((kind, self.present[kind]) for kind in kinds)
            ],
            "noisy": noisy,
            "dropped": dropped,
            "precision": gone / dropped if dropped else None,
            "recall": gone / noisy if noisy else None,
            "clean_share_pool": self.present[""] / total if total else None,
            "clean_share_kept": kept_clean / (total - dropped) if total > dropped else None,
        }


class _Candidate(NamedTuple):
    order: float
    uid: str
    shard: int
    row: int
    noise: str


def look(pool: Pool, subsets: Mapping[str, tuple[np.ndarray, str]], images: int = IMAGES) -> dict[str, SubsetView]:
    """One pass over a pool's uids for several subsets of it.

    Args:
        pool: where the subsets come from.
        subsets: by name: its sorted uids (dtype u8,u8) and the URL of its directory.
        images: how many kept and how many dropped images to show; those whose uids hash lowest, so that the choice
            is the same in every run and two subsets show the same images where they agree.
    """
    views = {name: SubsetView() for name in subsets}
    selected: dict[tuple[str, bool], list[_Candidate]] = {}
    for number, shard in enumerate(pool.shards):
        named = "noise" in shard.columns()
        table = shard.table(["uid", "noise"] if named else ["uid"])
        uids = decode_uids(table["uid"])
        noise = _noise_kinds(table, named)
        order = hash_unit(uids, 0, "report")
        for name, (subset, _) in subsets.items():
            view, inside = views[name], is_member(uids, subset)
            view.has_noise |= named
            view.present.update(_count(noise))
            view.removed.update(_count(noise.filter(pa.array(~inside))))
            for kept in (True, False):
                rows = np.nonzero(inside == kept)[0]
                rows = rows[np.argsort(order[rows], kind="stable")[:images]]
                found = [
                    _Candidate(float(order[i]), table["uid"][int(i)].as_py(), number, int(i), noise[int(i)].as_py())
                    for i in rows
                ]
                key = (name, kept)
                selected[key] = sorted([*selected.get(key, ()), *found])[:images]
    loaded = _load(pool, [item for items in selected.values() for item in items])
    for name, (_, url) in subsets.items():
        reasons = _reasons(url, [item.uid for item in selected.get((name, False), ())])
        for kept, target in ((True, views[name].kept), (False, views[name].dropped)):
            for item in selected.get((name, kept), ()):
                caption, jpeg = loaded[item.shard, item.row]
                target.append(GalleryImage(item.uid, caption, jpeg, item.noise, reasons.get(item.uid, "")))
    return views


def _noise_kinds(table: pa.Table, named: bool) -> pa.Array:
    if not named or pa.types.is_null(table["noise"].type):
        return pa.array([""] * table.num_rows, pa.string())
    return one_chunk(pc.fill_null(table["noise"].cast(pa.string()), ""))


def _count(column: pa.Array) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}


def _load(pool: Pool, items: list[_Candidate]) -> dict[tuple[int, int], tuple[str, str]]:
    """(caption, base64 JPEG) of the samples, by shard and row."""
    loaded = {}
    for number in sorted({item.shard for item in items}):
        rows = sorted({item.row for item in items if item.shard == number})
        shard = pool.shards[number]
        table = shard.table(["text", "tar", "image_offset", "image_size"]).take(pa.array(rows, pa.int64()))
        captions = table["text"].to_pylist()
        for row, caption, data in zip(rows, captions, shard.image_bytes(table), strict=True):
            text = caption or ""
            loaded[number, row] = (text if len(text) <= CAPTION else text[: CAPTION - 1] + "…", thumbnail(data))
    return loaded


def thumbnail(data: bytes) -> str:
    """At most 96 px, as base64 JPEG; empty when the image cannot be decoded."""
    try:
        image = decode_image(data)
    except ImageError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _reasons(url: str, uids: list[str]) -> dict[str, str]:
    """Why samples were dropped, from `reasons.parquet` if there is one."""
    path = storage.join(url, REASONS)
    if not uids or not storage.exists(path):
        return {}
    wanted = pa.array(uids)
    found: dict[str, str] = {}
    with open_parquet(path) as parquet:
        if missing := {"uid", "reason"} - set(parquet.schema_arrow.names):
            raise WinnowError(f"is not a table of reasons: no column {', '.join(sorted(missing))}", where=path)
        for batch in parquet.iter_batches(columns=["uid", "reason"]):
            rows = batch.filter(pc.is_in(batch["uid"], wanted))
            found |= {row["uid"]: row["reason"] or "" for row in rows.to_pylist()}
    return found


def read_funnel(url: str) -> dict[str, Any]:
    """`funnel.json` of a subset. Raises WinnowError when it lacks what a report needs."""
    path = storage.join(url, FUNNEL)
    funnel = storage.read_json(path)
    if not isinstance(funnel, dict) or not {"pool", "kept", "filter", "tree"} <= funnel.keys():
        raise WinnowError("is not a funnel: it should have pool, kept, filter and tree", where=path)
    return funnel


def funnel_rows(node: Mapping[str, Any], depth: int = 0) -> list[dict[str, Any]]:
    """The nodes of a funnel's tree from the top, each with its depth."""
    row = {name: node.get(name, 0) for name in ("kept", "dropped", "alone", "nan")}
    rows = [{"label": str(node.get("label", "")), "kind": str(node.get("kind", "")), "depth": depth} | row]
    for child in node.get("children", []):
        rows += funnel_rows(child, depth + 1)
    return rows
