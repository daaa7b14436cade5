"""A whole recipe, small: through every stage, again, with a subset changed, and with everything on an object store."""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import yaml

import winnow
from tests.drawing import sample, write_pool, write_tar
from tests.examples.caption_length import CaptionLength
from winnow.curation.filters import FILTERS
from winnow.infra.errors import WinnowError
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import encode_uids
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.progress import RunLog
from winnow.infra.stages.runner import Budget, execute
from winnow.pipeline.cli import main
from winnow.pipeline.graph import Graph
from winnow.pipeline.recipe.load import parse_recipe
from winnow.pretrain import config
from winnow.pretrain.objectives.contrastive import clip

RECIPE = """
demo: {pool: 60, trusted: 24, target: 12, test: 16, train: 8, shard_size: 20}
pool: demo:pool
inject: {mismatched: 0.4, duplicates: 0.1}
scorer:
  trusted: {pool: demo:trusted}
  train:
    model: &model
      embed_dim: 16
      vision_cfg: {image_size: 32, patch_size: 16, width: 32, layers: 1, head_width: 16}
      text_cfg: {context_length: 16, width: 16, layers: 1, heads: 1}
    samples_seen: 24
    batch_size: 8
    warmup_steps: 1
measures: {"tests.examples.brightness:Brightness": {}}
subsets:
  none: {}
  half: {clip_score: {fraction: 0.5}}
  both:
    any:
      - all:
          - image_cluster: {target: demo:target, clusters: 4}
          - not: {basic: {max_aspect: 1.0, language: null}}
      - clip_score: {fraction: 0.1}
  own: {"tests.examples.caption_length:CaptionLength": {most: 8}}
reshard: {samples_per_shard: 16}
pretrain: {model: *model, samples_seen: 16, batch_size: 8, warmup_steps: 1, seeds: [0, 1]}
evaluate: {data: demo:eval}
"""


def run(out, *overrides, text=RECIPE):
    graph = Graph(parse_recipe(text, "small.yaml", list(overrides)), str(out))
    return graph, graph.run(SerialExecutor(), RunLog(str(out), stream=None))


@pytest.fixture(scope="module")
def built():
    """How often each class was made during the run of `finished`, in this process."""
    made: dict = Counter()

    def counted(kind):
        init = kind.__init__
        return lambda self, *args, **given: made.update([kind.__name__]) or init(self, *args, **given)

    kinds = [*map(FILTERS.load, FILTERS.names()), CaptionLength]
    with pytest.MonkeyPatch.context() as patch:
        for kind in (*kinds, clip.Config):
            patch.setattr(kind, "__init__", counted(kind))
        check = config.check_engine
        patch.setattr(config, "check_engine", lambda *args: made.update(["PretrainConfig"]) or check(*args))
        yield made


@pytest.fixture(scope="module")
def finished(tmp_path_factory, built):
    out = tmp_path_factory.mktemp("run")
    built.clear()
    _, manifests = run(out)
    built["of the run"] = dict(built)  # later tests of the file make more
    return out, manifests


def test_a_recipe_is_parsed_once(finished, built):
    """Each filter once a use, and each training's config and objective once."""
    filters = {"ClipScore": 2, "ImageCluster": 1, "Basic": 1, "CaptionLength": 1}
    assert built["of the run"] == filters | {"PretrainConfig": 2, "Config": 2}


def times(out, *folders):
    return {
        path: path.stat().st_mtime_ns
        for folder in folders
        for path in (out / folder).rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "locations.json")
    }


def test_every_stage_left_what_it_should(finished):
    out, manifests = finished
    pool = Pool.open(str(out / "injected"))
    assert manifests["curate"].values["subsets"]["none"] == len(pool) > 60
    n = len(pool)
    assert manifests["curate"].values["subsets"]["half"] == int(n * 0.5) + 1
    short = [
        uid for uid, text in zip(pool.column("uid"), pool.column("text"), strict=True) if len(str(text).split()) <= 8
    ]
    assert encode_uids(np.load(out / "subsets" / "own" / "subset.npy")) == sorted(map(str, short))
    for name in ("none", "half", "both", "own"):
        kept = np.load(out / "subsets" / name / "subset.npy")
        shards = Pool.open(str(out / "shards" / name))
        assert np.array_equal(np.sort(shards.uids()), kept)
        assert all(shard.rows <= 16 for shard in shards.shards)
        for seed in (0, 1):
            folder = out / "checkpoints" / name / f"seed-{seed}"
            model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
            assert model.visual.output_dim == 16
            assert json.loads((folder / "config.json").read_text())["training"]["samples_seen"] == 16
    scores = pq.read_table(out / "scores" / "scores.parquet").to_pylist()
    assert {row["checkpoint"] for row in scores} == {
        f"{n}/seed-{s}" for n in ("none", "half", "both", "own") for s in (0, 1)
    }
    assert {"acc1", "mean_recall@1"} <= {row["metric"] for row in scores}
    page = (out / "report" / "report.html").read_text()
    assert "mismatched" in page and "caption_length(most=8)" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page  # self-contained
    table = (out / "report" / "comparison.txt").read_text()
    assert all(name in table for name in ("none", "half", "both", "own", "vs none"))


def test_manifests_lead_back_to_the_pool(finished):
    out, manifests = finished
    pool = Pool.open(str(out / "injected")).digest
    for name in ("measure", "curate", "reshard half"):
        assert manifests[name].parents["pool"] == pool
    assert manifests["reshard half"].parents["subset"] == manifests["curate"].files["half/subset.npy"]["sha256"]
    assert manifests["inject"].parents
    text = (out / "report" / "manifest.json").read_text() + (out / "scores" / "manifest.json").read_text()
    assert str(out) not in text


def test_running_again_does_nothing(finished, monkeypatch):
    out, manifests = finished
    before = times(out, ".")
    monkeypatch.setattr("winnow.infra.stages.stage.write_record", None)
    _, again = run(out)
    assert again == manifests
    after = times(out, ".")
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed == {"log.jsonl", "recipe.yaml"}


def test_a_changed_threshold_recomputes_one_subset(finished, tmp_path):
    out, manifests = finished
    first = json.loads((out / "report" / "comparison.json").read_text())
    kept = ("columns", "scorer", "pool", "injected", "subsets/none", "subsets/both", "shards/both", "checkpoints/both")
    before = times(out, *kept)
    old = times(out, "subsets/half", "checkpoints/half")
    _, again = run(out, "subsets.half.clip_score.fraction=0.25")
    assert times(out, *kept) == before
    new = times(out, "subsets/half", "checkpoints/half")
    assert all(new[path] != old[path] for path in old if path.name in ("subset.npy", "model.safetensors"))
    pool = len(Pool.open(str(out / "injected")))
    assert again["curate"].values["subsets"]["half"] == int(pool * 0.25) + 1
    # and back: the scores are what they were
    _, back = run(out)
    assert back["evaluate"].digest == manifests["evaluate"].digest
    compared = json.loads((out / "report" / "comparison.json").read_text())
    assert {entry["subset"] for entry in compared.pop("earlier")} == {"half"}
    assert compared == first


def test_plan_says_what_is_left(finished, tmp_path):
    out, _ = finished
    recipe = parse_recipe(RECIPE, "small.yaml", [])
    assert {plan.text for plan in Graph(recipe, str(out)).plan()} == {"finished"}
    fresh = Graph(recipe, str(tmp_path / "new")).plan()
    assert fresh[0].name == "demo" and "units to do" in fresh[0].text
    assert fresh[-1].text == "waits for the steps before"
    more = Graph(parse_recipe(RECIPE, "small.yaml", ["subsets.new={clip_score: {fraction: 0.3}}"]), str(out)).plan()
    texts = {plan.name: plan.text for plan in more}
    assert texts["curate"] == "1 of 5 units to do" and texts["measure"] == "finished"


def test_comparing_runs(finished, tmp_path, monkeypatch, capsys):
    out, _ = finished
    monkeypatch.setattr(
        sys, "argv", ["winnow", "compare", str(out), "--out", str(tmp_path / "c"), "--baseline", "half"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert "vs half" in capsys.readouterr().out


def test_comparing_a_run_of_an_earlier_version(finished, tmp_path):
    """Its recipe has keys that a recipe is refused for today, and its files the former names of fields."""
    out, _ = finished
    old = tmp_path / "old"
    shutil.copytree(out, old, ignore=shutil.ignore_patterns("*.safetensors", "*.tar"))
    recipe = yaml.safe_load((old / "recipe.yaml").read_text())
    recipe["pretrain"] |= {"warmup": recipe["pretrain"].pop("warmup_steps"), "workers": 1, "accumulate": 1}
    (old / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"max_set_aside": 0.05}, sort_keys=False))
    for path in old.rglob("manifest.json"):
        path.write_text(path.read_text().replace('"skipped":', '"set_aside":'))
    for path in old.rglob("locations.json"):
        path.rename(path.with_name("places.json"))
    new, before = (winnow.compare([run], tmp_path / f"to-{run.name}") for run in (out, old))
    assert before == new


BROKEN = """
pool: {folder}
subsets:
  none: {{}}
  long: {{"tests.examples.caption_length:CaptionLength": {{most: 99, least: 5}}}}
max_skipped: {budget}
"""


def test_broken_samples_are_skipped_within_the_recipes_budget(tmp_path):
    samples = [sample(i) for i in range(20)]
    samples[3]["members"]["jpg"] = b"nothing"
    samples[4]["members"]["txt"] = b"\xff\xfe"
    samples[5]["members"]["json"] = samples[6]["members"]["json"]
    write_tar(tmp_path / "shards" / "00000.tar", samples[:10])
    write_tar(tmp_path / "shards" / "00001.tar", samples[10:])
    whole = (tmp_path / "shards" / "00001.tar").read_bytes()
    (tmp_path / "shards" / "00001.tar").write_bytes(whole[:-11000])
    text = BROKEN.format(folder=tmp_path / "shards", budget=0.3)
    _, manifests = run(tmp_path / "run", text=text)
    index = manifests["index"]
    assert set(index.skipped["reasons"]) == {
        "undecodable image", "caption is not UTF-8", "duplicated uid", "truncated tar"
    }  # fmt: skip
    assert index.state.startswith("complete with ")
    kept = np.load(tmp_path / "run" / "subsets" / "none" / "subset.npy")
    assert len(kept) == manifests["curate"].values["subsets"]["none"] == len(Pool.open(str(tmp_path / "run" / "pool")))
    assert 14 <= len(kept) <= 17
    with pytest.raises(WinnowError, match=r"index: \d of \d+ skipped, the budget is 1 .*raise max_skipped"):
        run(tmp_path / "strict", text=BROKEN.format(folder=tmp_path / "shards", budget=1))


@pytest.fixture(scope="module")
def bucket():
    """An S3 of moto's, as s3fs reaches it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    old = dict(os.environ)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
    }
    import fsspec
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    fsspec.filesystem("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).mkdir("winnow-run")
    yield "s3://winnow-run"
    server.stop()
    os.environ.clear()
    os.environ.update(old)


def test_a_run_on_an_object_store_gives_the_same(bucket, tmp_path):
    import fsspec

    from winnow.curation.curate import CurateStage, MeasuredPool
    from winnow.curation.filters.basic import Basic
    from winnow.curation.measures.caption import Caption
    from winnow.curation.measures.stage import MeasureStage
    from winnow.curation.reshard import ReshardStage
    from winnow.infra.io.storage import digest_file

    write_pool(tmp_path / "shards", shards=2, per_shard=6)
    fsspec.filesystem("s3").put(str(tmp_path / "shards"), f"{bucket}/shards", recursive=True)
    tree = Basic(language=None, min_side=8, min_words=1, max_aspect=1.02)

    def chain(source, out):
        def go(stage):
            return execute(stage, SerialExecutor(), budget=Budget(0))

        go(IndexStage((source,), f"{out}/pool"))
        go(MeasureStage(f"{out}/pool", (Caption(),), f"{out}/columns"))
        curated = go(CurateStage(MeasuredPool(f"{out}/pool", f"{out}/columns"), (("a", tree),), f"{out}/subsets"))
        url = f"{out}/subsets/a/subset.npy"
        shards = go(ReshardStage(f"{out}/pool", url, digest_file(url), f"{out}/a", samples_per_shard=4))
        again = go(ReshardStage(f"{out}/pool", url, digest_file(url), f"{out}/a", samples_per_shard=4))
        assert again == shards
        pool = Pool.open(f"{out}/a")
        return curated, shards, [data for shard in pool.shards for data in shard.image_bytes(shard.table())]

    here = chain(str(tmp_path / "shards"), str(tmp_path / "run"))
    there = chain(f"{bucket}/shards", f"{bucket}/run")
    assert there == here
    assert Path(tmp_path / "run").exists()
