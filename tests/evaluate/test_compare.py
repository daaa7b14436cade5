"""The compare stage and its page, from files on disk."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.drawing import write_pool
from winnow.evaluate.report.compare import CompareStage, SubsetEntry
from winnow.evaluate.report.pool_view import funnel_rows, look
from winnow.evaluate.scores import SCHEMA
from winnow.evaluate.tasks.read import datacomp_tasks
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import encode_uids, save_subset
from winnow.infra.pool.views import write_view
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.infra.stages.stage import MANIFEST, Manifest

SCRIPT = '<script>alert("pool")</script>'


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """24 samples in 3 shards; samples 0-5 mismatched, 6-8 duplicate; every caption is an attack."""
    from winnow.infra.pool.index import IndexStage

    write_pool(tmp_path / "shards", shards=3, per_shard=8)
    execute(IndexStage((str(tmp_path / "shards"),), str(tmp_path / "pool")), SerialExecutor())
    opened = Pool.open(str(tmp_path / "pool"))
    number = 0
    for shard in opened.shards:
        table = shard.table()
        kinds = []
        for _ in range(table.num_rows):
            kinds.append("mismatched" if number < 6 else "duplicate" if number < 9 else None)
            number += 1
        table = table.append_column("noise", pa.array(kinds, pa.string()))
        table = table.set_column(table.column_names.index("text"), "text", pa.array([SCRIPT] * len(kinds)))
        write_view(shard.view, table)
    url = str(tmp_path / "pool" / MANIFEST)
    manifest = storage.read_json(url)
    for shard in opened.shards:
        facts = {"bytes": storage.size_of(shard.view), "sha256": storage.digest_file(shard.view)}
        manifest["files"][storage.name_of(shard.view)] = facts
    storage.write_json(url, manifest)
    return Pool.open(str(tmp_path / "pool"))


def write_subset(folder: Path, pool: Pool, keep: np.ndarray, reason: str = "") -> str:
    uids = pool.uids()
    save_subset(str(folder / "subset.npy"), uids[keep])
    node = {"label": f"clip<{reason}>", "kind": "filter", "kept": int(keep.sum()), "dropped": int((~keep).sum())}
    node |= {"alone": int((~keep).sum()), "children": []}
    tree = {"label": "all", "kind": "all", "kept": node["kept"], "dropped": node["dropped"], "alone": 0}
    funnel = {"pool": 24, "kept": int(keep.sum()), "name": folder.name, "filter": "all", "tree": tree}
    funnel["tree"]["children"] = [node]
    storage.write_json(str(folder / "funnel.json"), funnel)
    if reason:
        dropped = encode_uids(uids[~keep])
        pq.write_table(pa.table({"uid": dropped, "reason": [reason] * len(dropped)}), folder / "reasons.parquet")
    return str(folder)


def write_scores(folder: Path, values: dict[str, float]) -> str:
    rows = [
        {"checkpoint": name, "task": "mnist", "protocol": "zeroshot", "metric": metric, "value": value}
        | {"n": 400, "stderr": 0.02, "task_version": 1, "seed": 0}
        for name, value in values.items()
        for metric in ("acc5", "acc1")
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "scores.parquet")
    tasks = {"mnist": datacomp_tasks()["mnist"].model_dump() | {"n": 400}}
    found = {"checkpoints": dict.fromkeys(values, "ab" * 32), "tasks": tasks, "missing": [], "protocols": ["zeroshot"]}
    skipped = {"count": 0, "reasons": {}, "samples": [], "units": {}}
    manifest = asdict(Manifest("evaluate", 1, "k", {}, {}, 1, 1, skipped, {}, found))
    manifest.pop("url")
    storage.write_json(str(folder / MANIFEST), manifest)
    return str(folder)


@pytest.fixture
def stage(tmp_path: Path, pool: Pool) -> CompareStage:
    keep = np.ones(24, dtype=bool)
    clip = keep.copy()
    clip[:4] = clip[6:8] = clip[20:22] = False  # drops 4 mismatched, 2 duplicates, 2 clean
    entries = (
        SubsetEntry("none", write_subset(tmp_path / "s/none", pool, keep), ((0, "none/0"), (1, "none/1")), pool.url),
        SubsetEntry(
            "clip<b>", write_subset(tmp_path / "s/clip", pool, clip, "<i>low</i>"), ((0, "c/0"), (1, "c/1")), pool.url
        ),
    )
    scores = write_scores(tmp_path / "scores", {"none/0": 0.2, "none/1": 0.22, "c/0": 0.3, "c/1": 0.32})
    return CompareStage(entries, scores, str(tmp_path / "out"))


def test_comparison(tmp_path: Path, stage: CompareStage) -> None:
    manifest = execute(stage, SerialExecutor())
    assert set(manifest.files) == {"comparison.txt", "comparison.csv", "comparison.json", "report.html"}
    result = json.loads((tmp_path / "out/comparison.json").read_text())
    best = result["rows"][0]
    assert best["subset"] == "clip<b>" and best["size"] == 16 and best["share"] == pytest.approx(16 / 24)
    assert best["difference"]["value"] == pytest.approx(0.1)
    assert best["difference"]["stderr"] == pytest.approx(0.02 * 2**0.5)  # the seeds' differences are equal
    noise = result["noise"]["clip<b>"]
    removed = {kind["kind"]: (kind["present"], kind["removed"]) for kind in noise["kinds"]}
    assert removed == {"mismatched": (6, 4), "duplicate": (3, 2)}
    assert noise["precision"] == pytest.approx(6 / 8) and noise["recall"] == pytest.approx(6 / 9)
    assert noise["clean_share_pool"] == pytest.approx(15 / 24)
    assert noise["clean_share_kept"] == pytest.approx(13 / 16)
    assert result["noise"]["none"]["precision"] is None
    assert manifest.values["headline"].startswith("clip<b> beat none by 0.100")


class Page(HTMLParser):
    """Collects tags and checks that they nest."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_page_is_self_contained_and_escapes(tmp_path: Path, stage: CompareStage) -> None:
    execute(stage, SerialExecutor())
    text = (tmp_path / "out/report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    assert "script" not in page.tags and "b" not in page.tags and "i" not in page.tags
    assert "&lt;script&gt;alert(&#34;pool&#34;)&lt;/script&gt;" in text
    assert "&lt;i&gt;low&lt;/i&gt;" in text and "clip&lt;b&gt;" in text
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in page.links)
    assert page.tags.count("img") == 12 + 12 + 8  # a dozen kept of each, and the 8 dropped
    assert page.tags.count("svg") == 2
    assert str(tmp_path) not in text
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", text.partition("<style>")[0])


def test_same_input_same_bytes(tmp_path: Path, stage: CompareStage) -> None:
    execute(stage, SerialExecutor())
    again = CompareStage(stage.subsets, stage.scores, str(tmp_path / "again"))
    execute(again, SerialExecutor())
    for name in ("comparison.txt", "comparison.csv", "comparison.json", "report.html", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_runs_again_when_an_input_changes(tmp_path: Path, pool: Pool, stage: CompareStage) -> None:
    first = execute(stage, SerialExecutor())
    assert execute(stage, SerialExecutor()) == first
    write_subset(tmp_path / "s/clip", pool, np.arange(24) < 20, "other")
    assert execute(stage, SerialExecutor()).key != first.key
    assert "20" in (tmp_path / "out/comparison.csv").read_text().splitlines()[1].split(",")


def test_wrong_inputs(tmp_path: Path, stage: CompareStage) -> None:
    with pytest.raises(UsageError, match=r'unknown subset "nome".*Did you mean "none"'):
        CompareStage(stage.subsets, stage.scores, stage.out, "nome").plan()
    entry = SubsetEntry("none", stage.subsets[0].url, ((7, "none/7"),))
    with pytest.raises(WinnowError, match=r'holds no scores of checkpoint "none/7"'):
        execute(CompareStage((entry,), stage.scores, str(tmp_path / "x")), SerialExecutor())
    (tmp_path / "s/none/funnel.json").write_text("[]")
    with pytest.raises(WinnowError, match=r"funnel\.json: is not a funnel"):
        execute(CompareStage(stage.subsets, stage.scores, str(tmp_path / "y")), SerialExecutor())


def test_choice_of_images(pool: Pool, tmp_path: Path) -> None:
    """The same samples whatever else is compared, each with its own caption's uid and reason."""
    uids = np.sort(pool.uids(), order=["f0", "f1"])
    url = write_subset(tmp_path / "half", pool, np.arange(24) % 2 == 0, "odd")
    half = pool.uids()[::2]
    half = half[np.lexsort((half["f1"], half["f0"]))]
    alone = look(pool, {"half": (half, url)}, images=5)["half"]
    both = look(pool, {"half": (half, url), "all": (uids, str(tmp_path))}, images=5)
    assert alone.kept == both["half"].kept and len(alone.kept) == 5
    kept, dropped = set(encode_uids(half)), set(encode_uids(pool.uids()[1::2]))
    assert {image.uid for image in alone.kept} <= kept
    assert {image.uid for image in alone.dropped} <= dropped
    assert {image.reason for image in alone.dropped} == {"odd"}
    assert both["all"].dropped == []


def test_funnel_rows() -> None:
    leaf = {"label": "f", "kind": "filter", "kept": 1, "dropped": 2, "alone": 1}
    rows = funnel_rows(leaf | {"label": "all", "children": [leaf, leaf | {"children": [leaf]}]})
    assert [(row["label"], row["depth"]) for row in rows] == [("all", 0), ("f", 1), ("f", 1), ("f", 2)]
    assert rows[0]["nan"] == 0
