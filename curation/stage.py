"""The curate stage: a tree of filters and a measured pool give a subset file, a funnel and, if asked, reasons."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.filters.base import Filter, Node, State
from curation.tree import Judge, fingerprint, parse, unparse
from curation.view import View
from infra import storage
from infra.pool import Pool
from infra.stage import Output, Record, Stage, Unit
from infra.storage import digest_json
from infra.uids import decode_uids, save_subset


@dataclass(frozen=True)
class Source:
    """Where a pool and its columns are. `columns` is None for a pool without measures."""

    pool: str
    columns: str | None = None

    def view(self) -> View:
        return View(Pool.open(self.pool), self.columns)


@dataclass
class CurateStage(Stage):
    """Curate subsets of one pool.

    Each subset is a unit with the files `NAME/subset.npy`, `NAME/funnel.json` and, with `reasons`,
    `NAME/reasons.parquet`. A subset called "" puts them into the directory itself.

    Args:
        source: the pool and its columns.
        subsets: name and tree (YAML form) of each.
        out: directory.
        targets: target sets by the name that filters give them.
        reasons: whether to write for every dropped sample which node dropped it.
    """

    source: Source
    subsets: tuple[tuple[str, dict[str, Any]], ...]
    out: str
    targets: dict[str, Source] = field(default_factory=dict)
    reasons: bool = True

    name = "curate"
    version = 1
    keep_orphans = True

    def params(self) -> dict[str, Any]:
        return {"reasons": self.reasons}

    def parents(self) -> dict[str, str]:
        return {"pool": Pool.open(self.source.pool).digest}

    def places(self) -> dict[str, str]:
        return {"pool": storage.absolute(self.source.pool)}

    def _view(self) -> View:
        view = self.source.view()
        return View(view.pool, view.columns_url, {name: source.view() for name, source in self.targets.items()})

    def plan(self) -> list[Unit]:
        view = self._view()
        units = []
        for name, tree in self.subsets:
            node = parse(tree)
            view.check(columns_of(node))
            inputs = {"columns": view.digest(columns_of(node))}
            wanted = [(target, item.target_columns()) for item in node.filters() for target in item.targets()]
            for number, (target, columns) in enumerate(wanted):
                view.target(target).check(columns)
                inputs[f"target{number}"] = view.target(target).digest(columns)
            units.append(
                Unit(
                    name or "subset",
                    inputs,
                    {"tree": fingerprint(node)},
                    {"subset": name, "tree": tree},
                    items=len(view),
                )
            )
        return units

    def run(self, unit: Unit) -> Output:
        node, view, prefix = parse(unit.args["tree"]), self._view(), unit.args["subset"]
        judge = Judge(node, [self._fit(item, view) for item in node.filters()])
        columns = ("uid", *columns_of(node))
        kept, dropped = [], []
        for batch in view.batches(columns):
            if self.reasons:
                mask, why = judge.reasons(batch)
                out = pa.array(~mask)
                dropped.append(pa.table({"uid": batch["uid"].filter(out), "reason": why.filter(out)}))
            else:
                mask = judge.keep(batch)
            kept.append(decode_uids(batch["uid"])[mask])
        uids = np.concatenate(kept) if kept else np.empty(0, "u8,u8")
        funnel = {
            "name": prefix,
            "filter": str(node),
            "yaml": unparse(node),
            "pool": len(view),
            "kept": len(uids),
            "tree": judge.tally.as_json(),
        }
        files = [storage.join(prefix, name).lstrip("/") for name in ("subset.npy", "funnel.json")]
        save_subset(self.url(files[0]), uids)
        storage.write_json(self.url(files[1]), funnel)
        if self.reasons:
            files.append(storage.join(prefix, "reasons.parquet").lstrip("/"))
            table = pa.concat_tables(dropped) if dropped else pa.table({"uid": pa.array([], pa.string())})
            with storage.writing(self.url(files[2])) as path:
                pq.write_table(table, path, compression="zstd", use_dictionary=["reason"])
        return Output(files, len(view), values={"kept": len(uids), "subset": files[0]})

    def _fit(self, item: Filter, view: View) -> State:
        """The filter's state, out of the file an earlier subset left if the same was fitted to the same columns."""
        inputs = {"columns": view.digest(item.columns()), "filter": fingerprint(item)}
        for number, target in enumerate(item.targets()):
            inputs[f"target{number}"] = view.target(target).digest(item.target_columns())
        url = self.url("fits", f"{digest_json(inputs)[:32]}.npz")
        if storage.exists(url):
            with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as arrays:
                return dict(arrays)
        state = item.fit(view)
        if state:
            with storage.writing(url) as path, open(path, "wb") as file:
                np.savez(file, **state)  # type: ignore[arg-type]
        return state

    def finish(self, records: list[Record]) -> Output:
        return Output(values={"subsets": {record.unit: record.values["kept"] for record in records}})


def columns_of(node: Node) -> tuple[str, ...]:
    """The columns a tree reads, each once, in order."""
    return tuple(dict.fromkeys(column for item in node.filters() for column in item.columns()))
