"""Every stage keeps the contract: a second run does nothing; killed half-way and resumed it gives the same bytes;
changed parameters never reuse stale output; serial equals Ray."""

from __future__ import annotations

import ast
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.drawing import write_pool
from tests.evaluate.sets import write_classification, write_config, write_train
from tests.examples.brightness import Brightness
from tests.pretrain.tiny import config as train_config
from winnow.curation.algebra.nodes import All
from winnow.curation.curate import CurateStage, MeasuredPool
from winnow.curation.filters.basic import Basic
from winnow.curation.filters.clip_score import ClipScore
from winnow.curation.measures.caption import Caption
from winnow.curation.measures.clip import Clip
from winnow.curation.measures.stage import MeasureStage
from winnow.curation.noise.inject import InjectConfig, InjectStage
from winnow.curation.reshard import ReshardStage
from winnow.evaluate.features.stage import EmbedStage
from winnow.evaluate.report.compare import CompareStage, SubsetEntry
from winnow.evaluate.report.merge import MergeScoresStage
from winnow.evaluate.scores import read_scores
from winnow.evaluate.stage import EvaluateStage
from winnow.infra.errors import WinnowError
from winnow.infra.io import content, storage
from winnow.infra.io.storage import digest_file, digest_json
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import load_subset
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import Budget, execute
from winnow.infra.stages.stage import Stage, pending_units, read_manifest
from winnow.infra.stages.verify import verify
from winnow.pipeline.demo.stage import DemoConfig, DemoStage
from winnow.pretrain.data.samples import Samples
from winnow.pretrain.encoder import encoder_digest
from winnow.pretrain.stage import PretrainStage, TrainRun

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class World:
    """Inputs that the stages under test read, each made once."""

    folder: Path
    pool: str
    encoder: str

    @staticmethod
    def make(folder: Path) -> World:
        write_pool(folder / "shards", shards=3, per_shard=8)
        World._run(IndexStage((str(folder / "shards"),), str(folder / "pool")))
        world = World(folder, str(folder / "pool"), write_config(folder))
        World._run(MeasureStage(world.pool, (Caption(), world.clip), world.url("columns")))
        World._run(CurateStage(world.source, (("none", All()), ("half", HALF)), world.url("subsets")))
        write_classification(folder / "eval", n=12)
        write_train(write_classification(folder / "eval", "wds_shades_test", n=10))
        World._run(world.evaluate(world.url("scores")).embedding())
        World._run(world.evaluate(world.url("scores")))
        return world

    @staticmethod
    def _run(stage: Stage) -> None:
        execute(stage, SerialExecutor())

    def url(self, name: str) -> str:
        return str(self.folder / name)

    @property
    def clip(self) -> Clip:
        return Clip(self.encoder, encoder_digest(self.encoder), device="cpu")

    @property
    def source(self) -> MeasuredPool:
        return MeasuredPool(self.pool, self.url("columns"))

    def evaluate(self, out: str, tasks: tuple[str, ...] | str = "all") -> EvaluateStage:
        checkpoints = tuple((name, self.encoder, encoder_digest(self.encoder)) for name in ("a/seed-0", "b/seed-0"))
        return EvaluateStage(
            checkpoints,
            self.url("eval"),
            out,
            tasks=tasks,
            protocols=("zeroshot", "linear_probe", "knn"),
            features=self.url("features"),
            device="cpu",
            threads=1,  # the last bit of a sum depends on it
            part_samples=4,
        )

    def embed(self, out: str, tasks: tuple[str, ...] | str = "all") -> EmbedStage:
        return replace(self.evaluate(out, tasks).embedding(), out=out)


HALF = ClipScore(fraction=0.5)
SPREAD = Basic(min_side=8, language=None) & ~HALF


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World.make(tmp_path_factory.mktemp("world"))


# For each stage: built from (world, directory, whether with changed parameters).
CASES: dict[str, Callable[[World, str, bool], Stage]] = {
    "demo": lambda w, out, changed: DemoStage(
        config=DemoConfig(pool=6, trusted=4, target=3, test=4, train=4, shard_size=3, seed=int(changed)), out=out
    ),
    "index": lambda w, out, changed: IndexStage((w.url("shards"),), out, captions=not changed),
    "inject": lambda w, out, changed: InjectStage(
        w.pool, InjectConfig(mismatched=0.4, watermark=0.3, duplicates=0.2, seed=int(changed)), out
    ),
    "measure": lambda w, out, changed: MeasureStage(
        w.pool, (Brightness(),) if changed else (Caption(), Brightness()), out
    ),
    "curate": lambda w, out, changed: CurateStage(
        w.source, (("a", HALF if changed else SPREAD), ("b", All()), ("c", ~HALF)), out
    ),
    "reshard": lambda w, out, changed: ReshardStage(
        w.pool,
        w.url("subsets/half/subset.npy"),
        digest_file(w.url("subsets/half/subset.npy")),
        out,
        samples_per_shard=3 if changed else 5,
    ),
    "pretrain": lambda w, out, changed: PretrainStage(
        config=train_config(lr=5e-3 if changed else 1e-2, samples_seen=24),
        runs=tuple(TrainRun("all", seed, w.pool, None, digest_json([Pool.open(w.pool).digest])) for seed in (0, 1)),
        out=out,
    ),
    "embed": lambda w, out, changed: w.embed(out, ("shades",) if changed else "all"),
    "evaluate": lambda w, out, changed: w.evaluate(out, ("shades",) if changed else "all"),
    "compare": lambda w, out, changed: CompareStage(
        (
            SubsetEntry("none", w.url("subsets/none"), ((0, "a/seed-0"),), w.pool),
            SubsetEntry("half", w.url("subsets/half"), ((0, "b/seed-0"),), w.pool),
        ),
        w.url("scores"),
        out,
        "half" if changed else "none",
    ),
    "merge": lambda w, out, changed: MergeScoresStage(
        (("one", w.url("scores")), ("two" if changed else "more", w.url("scores"))), out
    ),
}
# Their keys are of their units alone, so that adding a measure or a task redoes no other.
PER_UNIT = {"measure", "embed", "evaluate"}


def contents(stage: Stage) -> dict[str, bytes]:
    """Every file that the stage answers for: outputs, records, manifest."""
    manifest = read_manifest(stage.out)
    assert manifest is not None
    names = [*manifest.files, "manifest.json", *(f"units/{unit.name}.json" for unit in stage.plan())]
    return {name: (Path(stage.out) / name).read_bytes() for name in names}


def made(name: str, world: World, out: Path, changed: bool = False) -> Stage:
    stage = CASES[name](world, str(out), changed)
    execute(stage, SerialExecutor())
    return stage


def is_stage(node: ast.stmt) -> bool:
    """Whether it defines a stage: a subclass of one with a name; without, it is what several have in common."""
    return (
        isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith("Stage") for base in node.bases)
        and any(ast.unparse(line).startswith("name = ") for line in node.body)
    )


def test_every_stage_has_a_case():
    found = set()
    for room in ("infra", "pretrain", "curation", "evaluate", "pipeline"):
        for path in (ROOT / room).rglob("*.py"):
            found |= {node.name for node in ast.parse(path.read_text()).body if is_stage(node)}
    assert found == {name.capitalize() + "Stage" for name in CASES if name != "merge"} | {"MergeScoresStage"}


@pytest.mark.parametrize("name", CASES)
def test_a_second_run_does_nothing(name, world, tmp_path, monkeypatch):
    stage = made(name, world, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    def refuse(*_):
        raise AssertionError("ran again")

    monkeypatch.setattr(type(stage), "run_group", refuse)
    monkeypatch.setattr(type(stage), "finish", refuse)
    again = CASES[name](world, str(tmp_path), False)
    assert execute(again, SerialExecutor()) == read_manifest(str(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


KILL = """
import os, pickle, signal, sys
import winnow.infra.stages.stage, winnow.infra.stages.runner
from winnow.infra.stages.executors import SerialExecutor
stage, after = pickle.loads(open(sys.argv[1], "rb").read())
write = winnow.infra.stages.stage.write_record
count = 0
def dying(*args):
    global count
    if count == after:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    return write(*args)
winnow.infra.stages.stage.write_record = dying
winnow.infra.stages.runner.execute(stage, SerialExecutor())
"""


@pytest.mark.parametrize("name", CASES)
def test_killed_half_way_and_resumed_gives_the_same_bytes(name, world, tmp_path):
    clean = made(name, world, tmp_path / "clean")
    stage = CASES[name](world, str(tmp_path / "killed"), False)
    units = len(stage.plan())
    (tmp_path / "stage").write_bytes(pickle.dumps((stage, units // 2)))
    child = subprocess.run([sys.executable, "-c", KILL, str(tmp_path / "stage")], cwd=ROOT, capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert read_manifest(stage.out) is None
    _, done = pending_units(stage)
    assert len(done) == units // 2
    execute(stage, SerialExecutor())
    assert contents(stage) == contents(clean)


@pytest.mark.parametrize("name", CASES)
def test_changed_parameters_never_reuse_stale_output(name, world, tmp_path):
    fresh = made(name, world, tmp_path / "fresh", changed=True)
    made(name, world, tmp_path / "used")
    over = made(name, world, tmp_path / "used", changed=True)
    assert contents(over) == contents(fresh)
    if name not in PER_UNIT:
        first = json.loads((tmp_path / "used" / "manifest.json").read_text())
        before = made(name, world, tmp_path / "first")
        assert first["key"] != json.loads(contents(before)["manifest.json"])["key"]


@pytest.mark.parametrize("name", CASES)
def test_serial_equals_ray(name, world, tmp_path, ray_executor):
    serial = CASES[name](world, str(tmp_path / "serial"), False)
    ray = CASES[name](world, str(tmp_path / "ray"), False)
    if name == "pretrain":  # starting Ray Train takes ten seconds
        serial, ray = replace(serial, runs=serial.runs[:1]), replace(ray, runs=ray.runs[:1])
    execute(serial, SerialExecutor())
    execute(ray, ray_executor)
    assert [unit.name for unit in ray.plan()] == [unit.name for unit in serial.plan()]
    assert contents(ray) == contents(serial)


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file, and give the file its earlier time again."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", CASES)
def test_a_flipped_bit_in_any_kept_file_is_named_and_mended_by_the_next_run(name, world, tmp_path):
    stage = made(name, world, tmp_path)
    before = contents(stage)
    manifest = read_manifest(stage.out)
    assert manifest is not None
    kinds = {(Path(file).suffix, file in before): file for file in sorted(manifest.files)}
    for file in kinds.values():
        damage(tmp_path / file)
    _, faults = verify(stage.out)
    assert {Path(url) for url, _ in faults} == {tmp_path / file for file in kinds.values()}
    execute(CASES[name](world, str(tmp_path), False), SerialExecutor())
    assert contents(stage) == before and verify(stage.out)[1] == []


def read_features(world: World) -> None:
    stage = world.evaluate(world.url("again"), ("shades",))
    storage.remove(stage.out)
    manifest = execute(stage, SerialExecutor(), budget=Budget(math.inf))
    raise WinnowError(" ".join(entry["reason"] for entry in manifest.values["missing"]))


# What reads a kind of kept file, and which one.
READERS: dict[str, tuple[str, Callable[[World], object]]] = {
    "view": ("pool/00001.parquet", lambda w: Pool.open(w.pool).uids()),
    "columns": ("columns/clip-*/00001.parquet", lambda w: list(w.source.view().batches(["clip.score"]))),
    "columns of a training": (
        "columns/clip-*/00001.parquet",
        lambda w: Samples(w.pool, columns=("clip.score",), measured=w.url("columns")),
    ),
    "subset": ("subsets/half/subset.npy", lambda w: load_subset(w.url("subsets/half/subset.npy"))),
    "funnel": ("subsets/half/funnel.json", lambda w: CASES["compare"](w, w.url("compared"), False).plan()),
    "image features": ("features/*/*/0-of-*[0-9].npy", read_features),
    "prompts": ("features/*/prompts/*.npy", read_features),
    "labels": ("features/samples/*/0-of-*.parquet", read_features),
    "scores": ("scores/scores.parquet", lambda w: read_scores(w.url("scores"))),
}


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files_are_refused_by_those_who_read_them(kind, world):
    pattern, read = READERS[kind]
    files = sorted(world.folder.glob(pattern))
    whole = [file.read_bytes() for file in files]
    try:
        for file in files:
            damage(file)
        with pytest.raises(WinnowError, match="is damaged"):
            read(world)
    finally:
        for file, data in zip(files, whole, strict=True):
            file.write_bytes(data)


def test_a_damaged_checkpoint_is_refused(world, tmp_path):
    made("pretrain", world, tmp_path)
    copied = shutil.copytree(tmp_path / "all", tmp_path / "alone")  # without the manifest that lists it
    encoder_digest(str(tmp_path / "all" / "seed-0"))
    damage(tmp_path / "all" / "seed-0" / "model.safetensors")
    with pytest.raises(WinnowError, match=r"model\.safetensors: is damaged"):
        encoder_digest(str(tmp_path / "all" / "seed-0"))
    encoder_digest(str(copied / "seed-0"))


def test_a_copy_with_other_times_is_as_good_and_nothing_is_hashed_twice(world, tmp_path, monkeypatch):
    hashed: list[str] = []
    digest_file = content.digest_file
    monkeypatch.setattr(content, "digest_file", lambda url: hashed.append(url) or digest_file(url))
    made("index", world, tmp_path / "index")
    made("reshard", world, tmp_path / "reshard")
    assert len(hashed) == len(set(hashed))
    hashed.clear()
    for name in ("index", "reshard"):
        for shard in Pool.open(str(tmp_path / name)).shards:
            shard.image_bytes(shard.table())
    assert not hashed  # size and times say enough
    for name in ("pool", "columns", "shards"):
        copied = shutil.copytree(world.url(name), tmp_path / name, copy_function=shutil.copy)
        for path in copied.rglob("*.tar"):
            os.utime(path, (1, 1))
        for path in copied.rglob("*.json"):  # older than what they describe
            os.utime(path, (1, 1))
    locations = tmp_path / "pool" / "locations.json"
    locations.write_text(json.dumps({"pool0": str(tmp_path / "shards")}))
    for _ in range(2):
        source = MeasuredPool(str(tmp_path / "pool"), str(tmp_path / "columns"))
        assert len(list(source.view().batches(["uid", "clip.score"]))) == 3
        for shard in source.view().pool.shards:
            shard.image_bytes(shard.table())
    assert len(hashed) == len(set(hashed)) and {Path(url).suffix for url in hashed} == {".parquet", ".tar"}
