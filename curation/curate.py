"""The curate stage: applies trees of filters to a measured pool, and writes subsets, funnels and reasons."""

from __future__ import annotations

import contextlib
import io
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from winnow.curation.algebra.fit import columns_of, fit_tree
from winnow.curation.algebra.funnel import NodeDecision, TreeEvaluator
from winnow.curation.algebra.nodes import Node
from winnow.curation.algebra.parse import fingerprint, unparse
from winnow.curation.columns.damaged import lost_samples, without_damaged
from winnow.curation.columns.table import State, View
from winnow.curation.filters.base import Filter
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.arrow import mask_array
from winnow.infra.io.storage import digest_json
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import UID_DTYPE, decode_uids, encode_uids, save_subset, split_repeated
from winnow.infra.stages.stage import Output, Record, Skipped, Stage, Unit


@dataclass(frozen=True)
class MeasuredPool:
    """The URLs of a pool and of its columns. `columns` is None for a pool without measures."""

    pool: str
    columns: str | None = None

    def view(self) -> View:
        return View(Pool.open(self.pool), self.columns)


@dataclass
class CurateStage(Stage):
    """Curate subsets of one pool.

    Each subset is a unit with the files `NAME/subset.npy`, `NAME/funnel.json` and, with `reasons`,
    `NAME/reasons.parquet`. The files of a subset called "" are in the directory itself. `NAME/timings.json`, the
    seconds that fitting each filter took, is not part of the output, so equal work gives equal output. Of kept rows
    with one uid, one is in the subset; the funnel has the number of the others as `repeated`. They are skipped, except
    in a pool of tars, where they are the repeats of a resharded subset.

    Args:
        source: the pool and its columns.
        subsets: name and tree of each.
        out: directory.
        targets: target sets by the names that filters give them.
        reasons: whether to write, for every dropped sample, which node dropped it.
    """

    source: MeasuredPool
    subsets: tuple[tuple[str, Node], ...]
    out: str
    targets: dict[str, MeasuredPool] = field(default_factory=dict)
    reasons: bool = True

    name = "curate"
    version = 4  # 4: samples without a value do not pass `not`, embeddings of zeros no filter, repeated uids once
    keep_stale = True
    run_on_driver = True

    def params(self) -> dict[str, Any]:
        return {"reasons": self.reasons}

    def parents(self) -> dict[str, str]:
        return {"pool": Pool.open(self.source.pool).digest}

    def locations(self) -> dict[str, str]:
        return {"pool": storage.absolute(self.source.pool)}

    def _view(self) -> View:
        view = self.source.view()
        return View(view.pool, view.columns_url, {name: source.view() for name, source in self.targets.items()})

    def plan(self) -> list[Unit]:
        view = self._view()
        units = []
        for name, node in self.subsets:
            without_damaged(view, columns_of(node), partial(_check, node, columns_of(node)), read=False)
            inputs = {"columns": view.digest(columns_of(node))}
            wanted = [(view.target(name), item.target_columns()) for item in node.filters() for name in item.targets()]
            for number, (target, columns) in enumerate(wanted):
                target.check(columns)
                inputs[f"target{number}"] = target.digest(columns)
            params, items = {"tree": fingerprint(node)}, len(view) if view.pool.counted else 0
            units.append(Unit(name or "subset", inputs, params, {"subset": name}, items=items))
        return units

    def reads(self, unit: Unit) -> str:
        return "pool"

    def run(self, unit: Unit) -> Output:
        view, subset = self._view(), unit.runtime["subset"]
        columns = ("uid", *columns_of(dict(self.subsets)[subset]))
        output, faults = without_damaged(view, columns, partial(self._curate, subset))
        output.skipped += lost_samples(view, faults)
        return output

    def _curate(self, prefix: str, view: View) -> Output:
        node = dict(self.subsets)[prefix]
        names = [storage.join(prefix, name).lstrip("/") for name in ("subset.npy", "funnel.json", "reasons.parquet")]
        files = names if self.reasons else names[:2]
        timings: dict[str, float] = {}
        evaluator = TreeEvaluator(node, self.states(node, view, timings))
        kept, dropped, seen = bytearray(), [], 0
        for batch in view.batches(tuple(dict.fromkeys(("uid", *columns_of(node))))):
            seen += batch.num_rows
            if self.reasons:
                mask, why = evaluator.reasons(batch)
                out = mask_array(~mask)
                dropped.append(pa.table({"uid": batch["uid"].filter(out), "reason": why.filter(out)}))
            else:
                mask = evaluator.mask(batch)
            kept += decode_uids(batch["uid"].filter(mask_array(mask))).view(np.uint8).data
        uids, repeated = split_repeated(np.frombuffer(kept, UID_DTYPE))
        funnel = {
            "name": prefix,
            "filter": str(node),
            "yaml": unparse(node),
            "pool": seen,
            "kept": len(uids),
            "tree": evaluator.counts.as_json(),
        }
        if len(repeated):
            funnel["repeated"] = len(repeated)
        storage.write_json(self.url(storage.join(prefix, "timings.json").lstrip("/")), timings)
        save_subset(self.url(files[0]), uids)
        storage.write_json(self.url(files[1]), funnel)
        if self.reasons:
            table = pa.concat_tables(dropped) if dropped else pa.table({"uid": pa.array([], pa.string())})
            with storage.writing(self.url(files[2])) as path:
                pq.write_table(table, path, compression="zstd", use_dictionary=["reason"])
        facts = {counts.label: counts.facts for counts in evaluator.counts.leaves() if counts.facts}
        # A pool of tars has only the repeats that a subset asked `reshard` for.
        skipped = [Skipped(uid, "duplicated uid") for uid in encode_uids(repeated)] if not view.pool.images else []
        return Output(
            files, seen - len(skipped), skipped, values={"kept": len(uids), "subset": files[0], "fits": facts}
        )

    def states(self, node: Node, view: View | None = None, timings: dict[str, float] | None = None) -> list[State]:
        """The fitted states of a tree's filters, read from the files of an earlier subset where there are any. Puts the
        seconds of each filter into `timings`, by label."""

        def fit(item: Filter, seen: View) -> State:
            start = time.perf_counter()
            state = self._fit(item, seen)
            if timings is not None:
                timings[str(item)] = round(time.perf_counter() - start, 3)
            return state

        return fit_tree(node, self._view() if view is None else view, fit)

    def _fit(self, item: Filter, view: View) -> State:
        """The state of a filter, from the file of an earlier subset if it was fitted to the same columns there."""
        inputs = {"columns": view.digest(item.columns()), "filter": fingerprint(item), "version": self.version}
        for number, target in enumerate(item.targets()):
            inputs[f"target{number}"] = view.target(target).digest(item.target_columns())
        url = self.url("fits", f"{digest_json(inputs)[:32]}.npz")
        if storage.exists(url):
            # A damaged file is replaced.
            with (
                contextlib.suppress(ValueError, EOFError, zipfile.BadZipFile),
                np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as arrays,
            ):
                return dict(arrays)
        state = item.fit(view)
        if state:
            with storage.writing(url) as path, open(path, "wb") as file:
                np.savez(file, **state)  # type: ignore[arg-type]
        return state

    def finish(self, records: list[Record]) -> Output:
        values: dict[str, Any] = {"subsets": {record.unit: record.values["kept"] for record in records}}
        if fits := {record.unit: record.values["fits"] for record in records if record.values.get("fits")}:
            values["fits"] = fits
        return Output(values=values)

    def why(self, subset: str, uid: str) -> tuple[str | None, list[NodeDecision]]:
        """Why a sample is or is not in a subset: the label of the first node that dropped it (None if it was kept), and
        each node's decision.

        Raises:
            UsageError: the uid is malformed.
            WinnowError: the pool has no such sample.
        """
        wanted = check_uid(uid)
        node, view = dict(self.subsets)[subset], self._view()
        for shard, table in zip(view.pool.shards, view.batches(("uid",)), strict=True):
            found = np.flatnonzero(decode_uids(table["uid"]) == wanted)
            if len(found):
                columns = tuple(dict.fromkeys(("uid", *columns_of(node))))
                sample = view.table(shard, columns).slice(int(found[0]), 1)
                return TreeEvaluator(node, self.states(node, view)).decisions(sample)
        raise WinnowError(f"no sample has the uid {uid}", where=self.source.pool)


def check_trees(source: MeasuredPool, nodes: Iterable[Node], targets: Mapping[str, MeasuredPool] | None = None) -> None:
    """Refuse trees that cannot be applied to a pool, before anything is measured. `targets` are the sets ready by now.

    Raises:
        WinnowError: the pool lacks a column, has too few samples, or holds arrays of another dimension.
    """
    pool = Pool.open(source.pool)
    view = View(pool, None, {name: source.view() for name, source in (targets or {}).items()})
    for node in nodes:
        columns = [column for column in columns_of(node) if view.knows(column)]
        without_damaged(view, columns, partial(_check, node, columns), read=False)


def _check(node: Node, columns: Sequence[str], view: View) -> None:
    view.check(columns)
    for item in node.filters():
        item.check(view)


def check_uid(uid: str) -> np.void:
    """A uid as a `u8,u8` pair. Raises UsageError when it is malformed."""
    try:
        return decode_uids(pa.array([uid], pa.string()))[0]
    except WinnowError as error:
        raise UsageError(error.what, do="A uid has 32 hexadecimal digits.") from None
