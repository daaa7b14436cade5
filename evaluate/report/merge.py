"""Scores of several runs as those of one, so that their subsets can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from winnow.evaluate.scores import SCORES, read_scores, write_scores
from winnow.infra.errors import UsageError
from winnow.infra.stages.stage import Output, Stage, Unit, need_manifest


@dataclass
class MergeScoresStage(Stage):
    """Put the scores of several runs into one directory; checkpoints get the run's name in front."""

    runs: tuple[tuple[str, str], ...]  # (name, URL of the run's scores) of each
    out: str

    name = "merge"
    version = 1
    run_on_driver = True

    def params(self) -> dict[str, Any]:
        return {"runs": [name for name, _ in self.runs]}

    def plan(self) -> list[Unit]:
        return [Unit("scores", {name: need_manifest(url, "scores").digest for name, url in self.runs})]

    def run(self, unit: Unit) -> Output:
        tables = []
        tasks: dict[str, Any] = {}
        checkpoints: dict[str, str] = {}
        lists: dict[str, list[dict[str, str]]] = {"missing": [], "not_applicable": []}
        protocols: dict[str, None] = {}
        metrics: dict[str, str] = {}
        for name, url in self.runs:
            values = need_manifest(url, "scores").values
            table = read_scores(url)
            renamed = [f"{name}/{checkpoint}" for checkpoint in table["checkpoint"].to_pylist()]
            tables.append(table.set_column(0, "checkpoint", pa.array(renamed, pa.string())))
            for key, facts in values["tasks"].items():
                if tasks.setdefault(key, facts) != facts:
                    raise UsageError(f'task "{key}" differs between the runs (version or size of the set)', where=url)
            checkpoints |= {f"{name}/{checkpoint}": digest for checkpoint, digest in values["checkpoints"].items()}
            for key, found in lists.items():
                found += [entry | {"checkpoint": f"{name}/{entry['checkpoint']}"} for entry in values[key]]
            protocols |= dict.fromkeys(values["protocols"])
            metrics |= values.get("protocol_metrics", {})
        write_scores(self.out, pa.concat_tables(tables))
        values = {"tasks": tasks, "checkpoints": checkpoints, "protocols": list(protocols), **lists}
        values |= {"protocol_metrics": metrics} if metrics else {}
        return Output([SCORES], values=values)

    def finish(self, records: list[Any]) -> Output:
        return Output(values=dict(records[0].values))
