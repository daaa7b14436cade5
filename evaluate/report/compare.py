"""The compare stage: scores and subsets in, a ranked comparison out (text, CSV, JSON, HTML)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from winnow.evaluate.report.html import render
from winnow.evaluate.report.pool_view import FUNNEL, REASONS, SUBSET, SubsetView, look, read_funnel
from winnow.evaluate.report.tables import comparison_csv, comparison_text
from winnow.evaluate.scores import read_scores
from winnow.evaluate.statistics.aggregate import Estimate, SubsetScores, compare, headline
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.content import content_digest
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import load_subset
from winnow.infra.registry import unknown
from winnow.infra.stages.kept import check_kept
from winnow.infra.stages.stage import Output, Record, Stage, Unit, need_manifest, read_manifest

TABLE, CSV, JSON, HTML = "comparison.txt", "comparison.csv", "comparison.json", "report.html"


@dataclass(frozen=True)
class SubsetEntry:
    """A subset to compare."""

    name: str
    url: str  # its directory: subset.npy, funnel.json and perhaps reasons.parquet
    checkpoints: tuple[tuple[int, str], ...]  # (seed, name in the scores) of each model trained on it
    pool: str = ""  # directory of the indexed pool it was taken from; "" to show no images and no noise
    drawn: tuple[tuple[str, str], ...] = ()  # (what, URL of a PNG) of each image that such a model has drawn


@dataclass
class CompareStage(Stage):
    """Compare subsets by the scores of the models trained on them."""

    subsets: tuple[SubsetEntry, ...]  # in the order to colour them; the table is ranked
    scores: str  # directory of a finished evaluate stage
    out: str  # directory for comparison.txt, comparison.csv, comparison.json and report.html
    baseline: str = ""  # subset to measure differences against; "none" where there is one, else the first

    name = "compare"
    version = 2
    run_on_driver = True

    def params(self) -> dict[str, Any]:
        return {"baseline": self._baseline()}

    def _baseline(self) -> str:
        names = [entry.name for entry in self.subsets]
        if not names:
            raise UsageError("no subset to compare")
        if len(set(names)) < len(names):
            raise UsageError(f"two subsets have the same name ({', '.join(names)})")
        if self.baseline and self.baseline not in names:
            raise unknown("subset", self.baseline, names)
        return self.baseline or ("none" if "none" in names else names[0])

    def plan(self) -> list[Unit]:
        self._baseline()
        inputs = {"scores": need_manifest(self.scores, "scores").digest}
        pools = {entry.pool: Pool.open(entry.pool).digest for entry in self.subsets if entry.pool}
        args: dict[str, Any] = {"scores": storage.absolute(self.scores), "subsets": {}}
        for entry in self.subsets:
            for file in (SUBSET, FUNNEL, REASONS):
                url = storage.join(entry.url, file)
                if file != REASONS or storage.exists(url):
                    inputs[f"{entry.name}/{file}"] = content_digest(check_kept(url))
            if entry.pool:
                inputs[f"{entry.name}/pool"] = pools[entry.pool]
            for what, url in entry.drawn:
                inputs[f"{entry.name}/{what}"] = content_digest(check_kept(url))
            args["subsets"][entry.name] = {
                "url": storage.absolute(entry.url),
                "pool": storage.absolute(entry.pool) if entry.pool else "",
                "drawn": [(what, storage.absolute(url)) for what, url in entry.drawn],
            }
        checkpoints = [[entry.name, [list(pair) for pair in entry.checkpoints]] for entry in self.subsets]
        return [Unit("comparison", inputs, {"checkpoints": checkpoints}, args)]

    def run(self, unit: Unit) -> Output:
        scores_url, entries = unit.runtime["scores"], unit.runtime["subsets"]
        manifest = need_manifest(scores_url, "scores")
        protocol, by_checkpoint = _main_scores(scores_url, manifest.values)
        scored = {key for scores in by_checkpoint.values() for key in scores}
        tasks = {key: facts for key, facts in manifest.values["tasks"].items() if key in scored}
        funnels = {name: read_funnel(entry["url"]) for name, entry in entries.items()}
        uids = {name: load_subset(storage.join(entry["url"], SUBSET)) for name, entry in entries.items()}
        subsets = []
        for name, pairs in unit.params["checkpoints"]:
            for _, checkpoint in pairs:
                if checkpoint not in manifest.values["checkpoints"]:
                    raise WinnowError(f'holds no scores of checkpoint "{checkpoint}" ({name})', where=scores_url)
            seeds = tuple(seed for seed, _ in pairs)
            scores = tuple(by_checkpoint.get(checkpoint, {}) for _, checkpoint in pairs)
            subsets.append(SubsetScores(name, len(uids[name]), funnels[name]["pool"], seeds, scores))
        result = compare(subsets, tasks, self._baseline())
        result["protocol"] = protocol
        used = {checkpoint for _, pairs in unit.params["checkpoints"] for _, checkpoint in pairs}
        result["missing"] = [entry for entry in manifest.values["missing"] if entry["checkpoint"] in used]
        views: dict[str, SubsetView] = {}
        for pool in sorted({entry["pool"] for entry in entries.values()} - {""}):
            inside = {name: (uids[name], entry["url"]) for name, entry in entries.items() if entry["pool"] == pool}
            views |= look(Pool.open(pool), inside)
        result["noise"] = {name: table for name, view in views.items() if (table := view.noise()) is not None}
        result["headline"] = headline(result)
        images = [(name, *image) for name, entry in entries.items() for image in entry["drawn"]]
        drawn = [(name, what, storage.read_bytes(url)) for name, what, url in images]
        page = render(result, funnels, views, _provenance(unit, manifest, entries), drawn)
        storage.write_bytes(self.url(TABLE), comparison_text(result).encode())
        storage.write_bytes(self.url(CSV), comparison_csv(result).encode())
        storage.write_json(self.url(JSON), result)
        storage.write_bytes(self.url(HTML), page.encode())
        return Output([TABLE, CSV, JSON, HTML], items=len(subsets), values={"headline": result["headline"]})

    def finish(self, records: list[Record]) -> Output:
        return Output(values=dict(records[0].values))


def _main_scores(url: str, values: Mapping[str, Any]) -> tuple[str, dict[str, dict[str, Estimate]]]:
    """The protocol that is compared: the run's first with scores that has the task's main metric. And by it the main
    metric of each checkpoint on each task, the mean over the protocol's seeds."""
    tasks, rows = values["tasks"], read_scores(url).to_pylist()
    given = {row["protocol"] for row in rows} - set(values.get("protocol_metrics", {}))
    protocol = next((name for name in values["protocols"] if name in given), values["protocols"][0])
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["protocol"] == protocol and row["metric"] == tasks[row["task"]]["metric"]:
            found.setdefault((row["checkpoint"], row["task"]), []).append(row)
    scores: dict[str, dict[str, Estimate]] = {}
    for (checkpoint, task), batch in found.items():
        stderr = math.sqrt(mean(row["stderr"] ** 2 for row in batch))
        scores.setdefault(checkpoint, {})[task] = Estimate(mean(row["value"] for row in batch), stderr)
    return protocol, scores


def _provenance(unit: Unit, scores: Any, entries: dict[str, Any]) -> list[tuple[str, str]]:
    """What the page was made from, by digest."""
    lines = [("scores", scores.digest)]
    for name, pairs in unit.params["checkpoints"]:
        split = ((*key.rpartition("/"), digest) for key, digest in unit.inputs.items())
        lines += [(f"{name}: {what}", digest) for subset, _, what, digest in split if subset == name]
        stage = read_manifest(entries[name]["url"])
        if stage is not None:
            lines.append((f"{name}: manifest of {stage.stage}", stage.digest))
        lines += [
            (f"{name}: checkpoint {checkpoint}, seed {seed}", scores.values["checkpoints"][checkpoint])
            for seed, checkpoint in pairs
        ]
    return lines
