"""Splitting sets into parts, and features that are computed once."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

import winnow.evaluate.features.embed
from tests.drawing import COLORS, write_tar
from tests.evaluate.sets import (
    CONFIG,
    classification_samples,
    image_of,
    open_found,
    samples_of,
    write_classification,
    write_config,
    write_retrieval,
    write_train,
)
from winnow.evaluate.features.stage import EmbedStage
from winnow.evaluate.protocols import PROTOCOLS
from winnow.evaluate.protocols.base import IMAGES, load_protocol
from winnow.evaluate.sets.files import split_tars
from winnow.evaluate.sets.layout import find_tasks
from winnow.evaluate.sets.shards import Wanted, read_part, read_samples, split_into_parts
from winnow.evaluate.stage import EvaluateStage, folder_of
from winnow.evaluate.tasks.task import TaskError
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import Budget, execute
from winnow.infra.stages.stage import Manifest, pending_units, read_manifest
from winnow.pretrain.encoder import encoder_digest, load_encoder

WANTED = Wanted(IMAGES, ("cls",))


def run(stage: EvaluateStage, budget: Budget | None = None) -> Manifest:
    execute(stage.embedding(), SerialExecutor(), budget=Budget(math.inf))
    return execute(stage, SerialExecutor(), budget=budget or Budget(0))


def stage_of(specs: dict[str, str], data: Path, out: Path, **more) -> EvaluateStage:
    checkpoints = tuple((name, spec, encoder_digest(spec)) for name, spec in specs.items())
    return EvaluateStage(checkpoints, str(data), str(out), **{"part_samples": 7, **more})


@pytest.fixture(scope="module")
def specs(tmp_path_factory) -> dict[str, str]:
    """Two encoders with the same preprocessing."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "wide.json").write_text(json.dumps(CONFIG | {"embed_dim": 24}))
    return {"tiny": write_config(folder), "wide": f"{folder}/wide.json:random"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_train(write_classification(tmp_path / "data", n=30))
    write_retrieval(tmp_path / "data", n=9)
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Grows by one with each image that is decoded."""
    seen: list[int] = []
    original = winnow.evaluate.features.embed.decode_image
    monkeypatch.setattr(
        winnow.evaluate.features.embed, "decode_image", lambda *a, **k: seen.append(1) or original(*a, **k)
    )
    return seen


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_parts_are_the_whole(tmp_path: Path, size: int) -> None:
    root = write_classification(tmp_path, n=30)
    test_set = open_found(find_tasks(str(tmp_path))[0])
    parts = split_into_parts(str(root), "test", size)
    assert len(parts) == 2 * math.ceil(15 / size) and len({part.name for part in parts}) == len(parts)
    raws = [raw for part in parts for raw in read_part(part, WANTED)]
    whole = list(samples_of(test_set))
    assert [(raw.key, image_of(raw)) for raw in raws] == [(sample.key, image_of(sample)) for sample in whole]
    assert [int(raw.member("cls")) for raw in raws] == [sample.label for sample in whole]
    assert [image_of(one) for one in read_samples(test_set.tars, [29, 3, 3, 17], WANTED)] == [
        image_of(whole[i]) for i in (29, 3, 3, 17)
    ]


def test_parts_of_an_object_store_are_its_shards(tmp_path: Path) -> None:
    root = write_classification(tmp_path, n=30)
    for path in sorted(root.rglob("*.*")):
        storage.write_bytes(f"memory://sets/{path.relative_to(tmp_path)}", path.read_bytes())
    parts = split_into_parts("memory://sets/wds_colors_test", "test", 4)
    assert len(parts) == 2
    here = [image_of(raw) for part in split_into_parts(str(root), "test") for raw in read_part(part, WANTED)]
    assert [image_of(raw) for part in parts for raw in read_part(part, WANTED)] == here
    assert image_of(read_samples(split_tars("memory://sets/wds_colors_test"), [20], WANTED)[0]) == here[20]


def test_a_truncated_tar_is_a_broken_task(tmp_path: Path) -> None:
    root = write_classification(tmp_path, n=30, shards=1)
    tar = root / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:-12000])
    with pytest.raises(TaskError, match=r"0\.tar: truncated tar"):
        [list(read_part(part, WANTED)) for part in split_into_parts(str(root), "test", 4)]


def test_features_are_the_encoders(tmp_path: Path, data: Path, specs: dict[str, str]) -> None:
    """The stored features, read by hand, are those of each image alone."""
    from winnow.infra.io.images import decode_image

    stage = stage_of(specs, data, tmp_path / "out").embedding()
    execute(stage, SerialExecutor())
    encoder = load_encoder(specs["wide"], device="cpu")
    for found in find_tasks(str(data)):
        for part in split_into_parts(found.url, "test", stage.part_samples):
            unit = stage.images_unit(part, encoder.digest, found)
            kept = np.load(stage.url(f"{unit.name}.npy"))
            assert kept.dtype == np.float32
            for row, raw in zip(kept, read_part(part, WANTED), strict=True):
                image = encoder.preprocess(decode_image(image_of(raw)))[None]
                np.testing.assert_allclose(row, encoder.encode_images(image)[0], atol=1e-6)


def test_evaluating_reads_typed_columns_that_a_listing_names(
    tmp_path: Path, data: Path, specs: dict[str, str], monkeypatch
) -> None:
    """Without building the embed stage's units, which alone know how files are named."""
    stage = stage_of(specs, data, tmp_path / "out", protocols=("zeroshot", "knn"))
    embedding = stage.embedding()
    manifest = execute(embedding, SerialExecutor())
    listings = {found.task.key: stage.listing(found) for found in stage.found()}
    read = {key: storage.read_json(embedding.url(file)) for key, file in listings.items()}
    listed = {key: listing["splits"] for key, listing in read.items()}
    assert {key: set(splits) for key, splits in listed.items()} == {
        "colors": {"test", "train"},
        "retrieval-colors": {"test"},
    }
    files = {file for listing in read.values() for unit in listing["units"].values() for file in unit["files"]}
    assert files | set(listings.values()) == set(manifest.files)
    labels, captions = [], []
    for key, found in (("colors", labels), ("retrieval-colors", captions)):
        for part in listed[key]["test"]["parts"]:
            (file,) = read[key]["units"][part["samples"]]["files"]
            table = pq.read_table(embedding.url(file))
            assert [str(table.schema.field(name).type) for name in ("label", "captions", "metadata")] == [
                "int64",
                "list<element: string>",
                "list<element: double>",
            ]
            found += table["label" if found is labels else "captions"].to_pylist()
    assert sorted(labels) == sorted(i * 5 % 6 for i in range(30)) and [len(one) for one in captions] == [1, 2, 3] * 3
    for method in ("plan", "samples_unit", "images_unit", "prompt_units"):
        monkeypatch.setattr(EmbedStage, method, lambda *_: pytest.fail("rebuilt the embed stage"))
    execute(stage, SerialExecutor())


def test_each_image_is_decoded_once_and_nothing_twice(
    tmp_path: Path, data: Path, specs: dict[str, str], decoded: list[int]
) -> None:
    both = ("zeroshot", "knn", "linear_probe")
    run(stage_of(specs, data, tmp_path / "out", protocols=("zeroshot",)))
    assert len(decoded) == 30 + 9
    run(stage_of(specs, data, tmp_path / "out", protocols=both))
    assert len(decoded) == 30 + 9 + 24  # the train split, which zero-shot does not look at
    run(
        stage_of(
            specs, data, tmp_path / "more", protocols=(*both, "linear_1pct"), features=str(tmp_path / "out/features")
        )
    )
    assert len(decoded) == 30 + 9 + 24
    names = data / "wds_colors_test" / "classnames.txt"
    names.write_text("\n".join(reversed(list(COLORS))))
    stage = stage_of(specs, data, tmp_path / "out", protocols=both)
    todo = [unit.name for unit in stage.embedding().plan()]
    _, done = pending_units(stage.embedding())
    assert {name.split("/")[1] for name in todo if name not in done} == {"prompts"}
    run(stage)
    assert len(decoded) == 30 + 9 + 24


def test_evaluations_that_share_features_do_not_disturb_each_other(
    tmp_path: Path, data: Path, specs: dict[str, str]
) -> None:
    """Both embed before either is scored, in either order; neither reads the other's listing."""
    shared = str(tmp_path / "features")
    first = stage_of({"tiny": specs["tiny"]}, data, tmp_path / "a", features=shared, protocols=("knn",))
    second = stage_of({"wide": specs["wide"]}, data, tmp_path / "b", features=shared, tasks=("retrieval-colors",))
    for stage in (first, second):
        execute(stage.embedding(), SerialExecutor())
    for stage in (first, second):
        assert execute(stage, SerialExecutor(), budget=Budget(0)).values["missing"] == []
        alone = replace(stage, out=f"{stage.out}-alone", features="")
        run(alone)
        assert pq.read_table(stage.url("scores.parquet")).equals(pq.read_table(alone.url("scores.parquet")))


def test_a_new_checkpoint_is_embedded_alone(
    tmp_path: Path, data: Path, specs: dict[str, str], decoded: list[int]
) -> None:
    run(stage_of({"tiny": specs["tiny"]}, data, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").rglob("*.npy")}
    # Under a second name, too: an encoder is its content.
    stage = stage_of(specs | {"again": specs["tiny"]}, data, tmp_path / "out")
    run(stage)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(decoded) == 2 * (30 + 9)
    rows = pq.read_table(stage.url("scores.parquet")).to_pylist()
    by_name = {
        name: [(r["task"], r["metric"], r["value"]) for r in rows if r["checkpoint"] == name]
        for name in ("tiny", "again")
    }
    assert by_name["tiny"] == by_name["again"] != []


def test_parts_make_no_difference(tmp_path: Path, data: Path, specs: dict[str, str]) -> None:
    protocols = ("zeroshot", "knn", "linear_probe", "linear_10pct")
    first = stage_of(specs, data, tmp_path / "a", protocols=protocols, part_samples=4)
    second = stage_of(specs, data, tmp_path / "b", protocols=protocols, part_samples=1000, batch_size=5)
    run(first), run(second)
    assert pq.read_table(first.url("scores.parquet")).equals(pq.read_table(second.url("scores.parquet")))


def test_protocols_seeds_and_what_does_not_apply(
    tmp_path: Path, data: Path, specs: dict[str, str], monkeypatch
) -> None:
    write_classification(data, "wds_untrained_test", n=12)
    write_train(data / "wds_colors_test", n=12, split="val")
    monkeypatch.setattr("winnow.evaluate.protocols.fine_tune.MIN_STEPS", 3)
    names = tuple(name for name in PROTOCOLS.table if "sampler" not in load_protocol(name).needs)
    monkeypatch.setattr("winnow.evaluate.protocols.fine_tune.EPOCHS", {0.01: 1, 0.1: 1})
    stage = stage_of({"tiny": specs["tiny"]}, data, tmp_path / "out", protocols=names)
    manifest = run(stage)
    rows = pq.read_table(stage.url("scores.parquet")).to_pylist()
    seeds = {name: {r["seed"] for r in rows if r["protocol"] == name and r["task"] == "colors"} for name in names}
    assert seeds == {name: set(load_protocol(name).seeds or (0,)) for name in names}
    assert {r["protocol"] for r in rows if r["task"] != "colors"} == {"zeroshot"}
    assert {r["n"] for r in rows if r["task"] == "colors"} == {30}
    unfit = {(e["task"], e["protocol"]): e["reason"] for e in manifest.values["not_applicable"]}
    assert unfit["untrained", "knn"] == "the set has no train split"
    assert unfit["retrieval-colors", "knn"] == 'knn does not evaluate tasks of kind "retrieval"'
    assert manifest.values["missing"] == [] and manifest.skipped["count"] == 0
    lines = [json.loads(line) for line in storage.read_bytes(stage.url("eval_results.jsonl")).decode().splitlines()]
    mine = [
        r["value"] for r in rows if (r["protocol"], r["metric"], r["checkpoint"]) == ("linear_1pct", "acc1", "tiny")
    ]
    assert len(mine) == 3 and lines[0]["metrics"]["linear_1pct/acc1"] == pytest.approx(np.mean(mine))
    from winnow.evaluate.report.score_table import scores_text

    text = scores_text(rows, manifest.values)
    assert any("linear_probe" in line and "n/a" in line for line in text.splitlines() if line.startswith("| untrained"))
    assert "Not applicable (n/a): knn of untrained (the set has no train split)." in text


def test_a_broken_train_split_leaves_zero_shot_alone(tmp_path: Path, data: Path, specs: dict[str, str]) -> None:
    tar = data / "wds_colors_test" / "train" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:-12000])
    stage = stage_of(specs, data, tmp_path / "out", protocols=("zeroshot", "knn"))
    manifest = run(stage, Budget(9))
    rows = pq.read_table(stage.url("scores.parquet")).to_pylist()
    assert {(r["task"], r["protocol"]) for r in rows} == {("colors", "zeroshot"), ("retrieval-colors", "zeroshot")}
    reasons = {(e["task"], e["protocol"]): e["reason"] for e in manifest.values["missing"]}
    assert reasons["colors", "knn"].startswith("wds_colors_test/train/0.tar: truncated tar")


def test_a_failing_part_is_retried_and_affects_no_other_set(
    tmp_path: Path, data: Path, specs: dict[str, str], monkeypatch
) -> None:
    write_classification(data, "wds_other_test", n=10)
    original, failures = EmbedStage._images, []

    def flaky(self, ready, samples, first):
        if first.group.startswith("wds_colors_test/test 1.tar"):
            failures.append(first.name)
            raise OSError("the worker's disk is full")
        yield from original(self, ready, samples, first)

    monkeypatch.setattr(EmbedStage, "_images", flaky)
    stage = stage_of(specs, data, tmp_path / "out")
    manifest = run(stage, Budget(9))
    assert max(map(failures.count, failures)) == 3  # tried, and tried again twice
    assert set(manifest.values["tasks"]) == {"other", "retrieval-colors"}
    (reason,) = {e["reason"] for e in manifest.values["missing"] if e["task"] == "colors"}
    assert reason == "wds_colors_test: could not be embedded: the worker's disk is full."
    assert read_manifest(stage.embedding().out).skipped["count"] > 0
    monkeypatch.setattr(EmbedStage, "_images", original)
    assert set(run(stage).values["tasks"]) == {"other", "retrieval-colors", "colors"}


def test_a_checkpoint_that_cannot_be_loaded_affects_no_other(tmp_path: Path, data: Path, specs: dict[str, str]) -> None:
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    config = specs["tiny"].rpartition(":")[0]
    checkpoints = specs | {"bad": f"{config}:{tmp_path}/bad.pt"}
    stage = stage_of(checkpoints, data, tmp_path / "out")
    manifest = run(stage, Budget(2))
    assert {e["checkpoint"] for e in manifest.values["missing"]} == {"bad"}
    assert all("the checkpoint cannot be loaded" in e["reason"] for e in manifest.values["missing"])
    rows = pq.read_table(stage.url("scores.parquet")).to_pylist()
    assert {r["checkpoint"] for r in rows} == set(specs)
    with pytest.raises(WinnowError, match="the checkpoint cannot be loaded"):
        run(replace(stage, checkpoints=stage.checkpoints[-1:], out=str(tmp_path / "alone"), tasks=("colors",)))


def test_an_encoder_without_text_is_probed(tmp_path: Path, data: Path, specs: dict[str, str], monkeypatch) -> None:
    import winnow.pretrain.encoder

    blind = winnow.pretrain.encoder.load_encoder(specs["tiny"])
    monkeypatch.setattr(blind, "reads", frozenset({"image"}))
    monkeypatch.setattr(winnow.pretrain.encoder, "_load", lambda *_: blind)
    stage = stage_of({"blind": specs["tiny"]}, data, tmp_path / "out", protocols=("zeroshot", "knn"))
    manifest = run(stage)
    rows = pq.read_table(stage.url("scores.parquet")).to_pylist()
    assert {(r["task"], r["protocol"]) for r in rows} == {("colors", "knn")}
    reasons = {(e["task"], e["protocol"]): e["reason"] for e in manifest.values["not_applicable"]}
    assert reasons["colors", "zeroshot"] == reasons["retrieval-colors", "zeroshot"] == "the encoder has no text tower"
    assert manifest.values["missing"] == []


def test_reasons_name_tasks_and_checkpoints_once() -> None:
    from winnow.evaluate.report.score_table import _reasons

    pairs = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), ("c", "z"), ("d", "x"), ("d", "y"), ("d", "z")]
    entries = [{"protocol": "knn", "task": task, "checkpoint": who, "reason": "no split"} for task, who in pairs]
    names = {"x": "X", "y": "Y", "z": "Z"}
    assert _reasons(entries, names, "Left out") == ["Left out: knn of a, b for X, Y; c for Z; d (no split)."]


def test_transparency_is_handled_as_in_open_clip(tmp_path: Path, specs: dict[str, str]) -> None:
    """webdataset's decoder and open_clip's transform both convert to RGB, which drops the alpha channel."""
    rng = np.random.default_rng(0)
    root = write_classification(tmp_path / "data", n=2, shards=1)
    pixels = {mode: rng.integers(0, 255, (20, 24, size), dtype=np.uint8) for mode, size in (("RGBA", 4), ("LA", 2))}
    images = [Image.fromarray(array, mode) for mode, array in pixels.items()]
    samples = []
    for i, image in enumerate(images):
        file = io.BytesIO()
        image.save(file, "PNG")
        samples.append({"key": f"s{i}", "members": {"png": file.getvalue(), "cls": str(i).encode()}})
    write_tar(root / "test" / "0.tar", samples)
    loader = wds.WebDataset(str(root / "test" / "0.tar"), shardshuffle=False).decode("pil").to_tuple("png")
    encoder = load_encoder(specs["tiny"], device="cpu")
    expected = [encoder.encode_images(encoder.preprocess(image)[None])[0] for (image,) in loader]
    stage = stage_of({"tiny": specs["tiny"]}, tmp_path / "data", tmp_path / "out").embedding()
    execute(stage, SerialExecutor())
    (found,) = find_tasks(str(tmp_path / "data"))
    (part,) = split_into_parts(found.url, "test", stage.part_samples)
    kept = np.load(stage.url(f"{stage.images_unit(part, encoder.digest, found).name}.npy"))
    np.testing.assert_allclose(kept, expected, atol=1e-6)


def test_each_precision_has_separate_features(tmp_path: Path, data: Path, specs: dict[str, str]) -> None:
    """bfloat16 keeps 8 bits: near float32's features, and not equal to them."""
    made = {}
    for precision in ("float32", "bfloat16"):
        stage = stage_of({"tiny": specs["tiny"]}, data, tmp_path / "out", precision=precision)
        run(stage)
        embedding = stage.embedding()
        (found,) = find_tasks(str(data), "colors")
        digest = stage.checkpoints[0][2]
        files = [
            embedding.images_unit(part, digest, found).name
            for part in split_into_parts(found.url, "test", embedding.part_samples)
        ]
        made[precision] = np.concatenate([np.load(embedding.url(f"{file}.npy")) for file in files])
    difference = np.abs(made["float32"] - made["bfloat16"]).max()
    assert 1e-5 < difference < 0.05


def test_a_thin_image_is_left_out(tmp_path: Path, specs: dict[str, str]) -> None:
    """Resizing the shorter side of one of 100,000 x 1 pixels would take gigabytes."""
    root = write_classification(tmp_path / "data", n=30, shards=1)
    file = io.BytesIO()
    Image.new("L", (100_000, 1)).save(file, "PNG")
    samples = classification_samples(29)
    write_tar(root / "test" / "0.tar", [{"key": "z", "members": {"png": file.getvalue(), "cls": b"0"}}, *samples])
    manifest = run(stage_of({"tiny": specs["tiny"]}, tmp_path / "data", tmp_path / "out"), Budget(1))
    assert manifest.values["left_out"] == {"colors": {"test": {"image too thin": 1}}}
    assert manifest.values["tasks"]["colors"]["n"] == 29


def test_equal_broken_shards_are_each_reported(tmp_path: Path, data: Path, specs: dict[str, str]) -> None:
    for name in ("wds_a_test", "wds_b_test"):
        root = write_classification(data, name)
        (root / "test" / "1.tar").write_bytes(b"")
    manifest = run(stage_of({"tiny": specs["tiny"]}, data, tmp_path / "out"), Budget(9))
    reasons = {entry["task"]: entry["reason"] for entry in manifest.values["missing"]}
    assert reasons == {name: f"wds_{name}_test/test/1.tar: empty file." for name in ("a", "b")}


def test_long_names_of_checkpoints_are_shortened_for_files() -> None:
    names = [f"/some/where/{'far/' * 80}{end}" for end in ("a.pt", "b.pt")]
    folders = [folder_of(name) for name in names]
    assert len(set(folders)) == 2 and all(len(folder) < 200 and "/" not in folder for folder in folders)


def test_nothing_to_tune_does_not_apply(tmp_path: Path, data: Path) -> None:
    stage = stage_of({"raw": "pixels:8"}, data, tmp_path / "out", protocols=("knn", "finetune_10pct"))
    manifest = run(stage, Budget(9))
    unfit = {(e["task"], e["protocol"]): e["reason"] for e in manifest.values["not_applicable"]}
    assert unfit.pop(("colors", "finetune_10pct")) == "the encoder has nothing to tune"
    assert set(unfit) == {("retrieval-colors", "knn"), ("retrieval-colors", "finetune_10pct")}
    assert manifest.values["missing"] == []


def test_each_checkpoint_has_results_that_datacomp_can_aggregate(tmp_path: Path, specs: dict[str, str]) -> None:
    """One line a task of DataComp's, without the sets that are none of them."""
    ten = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    write_classification(tmp_path / "data", "wds_cifar10_test", names=ten)
    write_classification(tmp_path / "data", "wds_mine_test")
    stage = stage_of(specs, tmp_path / "data", tmp_path / "out")
    manifest = run(stage)
    files = [name for name in manifest.files if name.startswith("datacomp/")]
    assert files == [f"datacomp/{name}.jsonl" for name in sorted(specs)]
    for file in files:
        (line,) = [json.loads(line) for line in storage.read_bytes(stage.url(file)).decode().splitlines()]
        assert line["key"] == "cifar10" and f"datacomp/{line['checkpoint']}.jsonl" == file
