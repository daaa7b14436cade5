"""The evaluate stage: its scores against a plain loop, broken sets next to intact ones, and the contract of a stage."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.drawing import COLORS, draw_image, write_tar
from tests.evaluate.sets import (
    CONFIG,
    TEMPLATES,
    image_of,
    open_found,
    samples_of,
    write_classification,
    write_config,
    write_retrieval,
)
from winnow.evaluate.protocols import KINDS
from winnow.evaluate.protocols.base import Kind, Row, Target, read_captions
from winnow.evaluate.report.score_table import scores_text
from winnow.evaluate.sets.layout import find_tasks
from winnow.evaluate.stage import EvaluateStage
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.stages.executors import Executor, SerialExecutor
from winnow.infra.stages.runner import Budget, execute
from winnow.infra.stages.stage import Manifest
from winnow.pretrain.encoder import encoder_digest
from winnow.pretrain.models.open_clip import build_model

WHOLE = Budget(0)


def run(stage: EvaluateStage, budget: Budget = WHOLE, executor: Executor | None = None) -> Manifest:
    execute(stage.embedding(), executor or SerialExecutor(), budget=Budget(math.inf))
    return execute(stage, executor or SerialExecutor(), budget=budget)


def rows_of(stage: EvaluateStage) -> list[dict]:
    return pq.read_table(stage.url("scores.parquet")).to_pylist()


def metrics(stage: EvaluateStage, task: str, checkpoint: str = "tiny") -> dict[str, float]:
    return {r["metric"]: r["value"] for r in rows_of(stage) if r["task"] == task and r["checkpoint"] == checkpoint}


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_config(tmp_path_factory.mktemp("model"))


def stage_of(spec: str, data: Path, out: Path, **more) -> EvaluateStage:
    return EvaluateStage((("tiny", spec, encoder_digest(spec)),), str(data), str(out), **more)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_classification(tmp_path / "data", n=60)
    write_retrieval(tmp_path / "data", n=9)
    return tmp_path / "data"


def test_against_a_plain_open_clip_loop(tmp_path: Path, data: Path) -> None:
    """open_clip's own model, transform and tokenizer, one image and one class at a time."""
    import open_clip
    import torch

    config = tmp_path / "tiny-plain.json"
    config.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(config)
    torch.manual_seed(3)
    model, _, transform = open_clip.create_model_and_transforms("tiny-plain")
    tokenizer = open_clip.get_tokenizer("tiny-plain")
    model.eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    spec = f"{config}:{tmp_path / 'weights.pt'}"
    stage = stage_of(spec, data, tmp_path / "out", batch_size=7)
    run(stage)

    unit = torch.nn.functional.normalize
    found = {entry.task.key: open_found(entry) for entry in find_tasks(str(data))}
    with torch.no_grad():
        weights = []
        for name in COLORS:
            prompts = unit(model.encode_text(tokenizer([t.format(c=name) for t in TEMPLATES])), dim=-1)
            weights.append(unit(prompts.mean(dim=0), dim=0))
        right, right5, per_class = [], [], {}
        for sample in samples_of(found["colors"]):
            image = transform(Image.open(io.BytesIO(image_of(sample))))[None]
            logits = 100 * unit(model.encode_image(image), dim=-1)[0] @ torch.stack(weights).T
            order = logits.argsort(descending=True).tolist()
            right.append(order[0] == sample.label)
            right5.append(sample.label in order[:5])
            per_class.setdefault(sample.label, []).append(right[-1])
        got = metrics(stage, "colors")
        assert got["acc1"] == pytest.approx(np.mean(right))
        assert got["acc5"] == pytest.approx(np.mean(right5))
        assert got["mean_per_class_recall"] == pytest.approx(np.mean([np.mean(v) for v in per_class.values()]))

        samples = list(samples_of(found["retrieval-colors"]))
        images = torch.cat(
            [unit(model.encode_image(transform(Image.open(io.BytesIO(image_of(s))))[None]), dim=-1) for s in samples]
        )
        captions = [(i, text) for i, s in enumerate(samples) for text in s.texts]
        texts = torch.cat([unit(model.encode_text(tokenizer([text])), dim=-1) for _, text in captions])
        scores = texts @ images.T
        got = metrics(stage, "retrieval-colors")
        for k in (1, 5):
            image_hits = [i in scores[j].topk(k).indices for j, (i, _) in enumerate(captions)]
            text_hits = [
                any(captions[j][0] == i for j in scores[:, i].topk(k).indices.tolist()) for i in range(len(samples))
            ]
            assert got[f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(image_hits))
            assert got[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(text_hits))
        both = got["image_retrieval_recall@1"] + got["text_retrieval_recall@1"]
        assert got["mean_recall@1"] == pytest.approx(both / 2)


def test_rows_and_results_file(tmp_path: Path, data: Path, spec: str) -> None:
    stage = stage_of(spec, data, tmp_path / "out")
    manifest = run(stage)
    schema = pq.read_schema(stage.url("scores.parquet"))
    names = ["checkpoint", "task", "protocol", "metric", "value", "n", "stderr", "task_version", "seed"]
    assert schema.names == names
    (acc1,) = (row for row in rows_of(stage) if row["metric"] == "acc1")
    assert acc1["n"] == 60 and acc1["protocol"] == "zeroshot"
    assert acc1["stderr"] == pytest.approx((acc1["value"] * (1 - acc1["value"]) / 60) ** 0.5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "eval_results.jsonl").read_text().splitlines()]
    assert [(line["key"], line["dataset"]) for line in lines] == [
        ("colors", "colors"),
        ("retrieval-colors", "retrieval-colors"),
    ]
    assert lines[0]["metrics"]["main_metric"] == lines[0]["metrics"]["acc1"] == acc1["value"]
    assert lines[1]["metrics"]["main_metric"] == lines[1]["metrics"]["mean_recall@1"]
    assert manifest.values["tasks"]["retrieval-colors"]["chance"] == pytest.approx(1 / 9)


def test_second_run_does_nothing_and_bytes_are_equal(tmp_path: Path, data: Path, spec: str, monkeypatch) -> None:
    first, second = stage_of(spec, data, tmp_path / "a"), stage_of(spec, data, tmp_path / "b", batch_size=13)
    manifest = run(first)
    assert run(second) == manifest
    for name in ("scores.parquet", "eval_results.jsonl", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    monkeypatch.setattr(EvaluateStage, "run_group", lambda *_: pytest.fail("a finished unit ran again"))
    assert run(stage_of(spec, data, tmp_path / "a")) == manifest


def test_new_task_or_checkpoint_runs_alone(tmp_path: Path, data: Path, spec: str, monkeypatch) -> None:
    run(stage_of(spec, data, tmp_path / "out", tasks=("colors",)))
    seen = []
    original = EvaluateStage.run_group

    def watched(self, units):
        seen.extend(unit.name for unit in units)
        return original(self, units)

    monkeypatch.setattr(EvaluateStage, "run_group", watched)
    run(stage_of(spec, data, tmp_path / "out"))
    assert seen == ["tiny/retrieval-colors/zeroshot"]
    names = data / "wds_colors_test" / "classnames.txt"
    names.write_text("\n".join(reversed(list(COLORS))))
    seen.clear()
    run(stage_of(spec, data, tmp_path / "out"))
    assert seen == ["tiny/colors/zeroshot"]


def test_many_checkpoints_decode_once(tmp_path: Path, data: Path, spec: str, monkeypatch) -> None:
    import winnow.evaluate.features.embed

    decoded = []
    original = winnow.evaluate.features.embed.decode_image
    monkeypatch.setattr(
        winnow.evaluate.features.embed, "decode_image", lambda *a, **k: decoded.append(1) or original(*a, **k)
    )
    digest = encoder_digest(spec)
    names = ("clip-30/seed0", "../clip 30%", ".hidden")
    stage = EvaluateStage(tuple((name, spec, digest) for name in names), str(data), str(tmp_path / "out"))
    run(stage)
    assert len(decoded) == 60 + 9
    assert {row["checkpoint"] for row in rows_of(stage)} == set(names)
    assert len({json.dumps(metrics(stage, "colors", name)) for name in names}) == 1
    assert (tmp_path / "out" / "units" / quote(names[0], safe="") / "colors" / "zeroshot.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_broken_sets_do_not_hide_the_others(tmp_path: Path, data: Path, spec: str) -> None:
    broken = write_classification(data, "wds_broken_test")
    cut = (broken / "test" / "0.tar").read_bytes()
    (broken / "test" / "0.tar").write_bytes(cut[: len(cut) // 2 - 100])
    write_classification(data, "wds_mnist_test")  # six class names instead of ten
    (write_classification(data, "wds_odd_test") / "dataset_type.txt").write_text("captioning")
    stage = stage_of(spec, data, tmp_path / "out")
    with pytest.raises(WinnowError, match=r"2 of .* skipped"):
        run(stage)
    manifest = run(stage, Budget(2))
    assert set(manifest.values["tasks"]) == {"colors", "retrieval-colors"}
    reasons = {entry["task"]: entry["reason"] for entry in manifest.values["missing"]}
    assert reasons["broken"].startswith("wds_broken_test/test/0.tar: truncated tar")
    assert "wds_mnist_test/classnames.txt: has 6 class names, MNIST has 10 classes" in reasons["mnist"]
    assert 'evaluates tasks of kind "captioning"' in reasons["odd"]
    assert str(data) not in storage.read_bytes(stage.url("manifest.json")).decode()


def test_undecodable_image_is_skipped(tmp_path: Path, spec: str) -> None:
    root = write_classification(tmp_path / "data", n=10, shards=1)
    good = [{"key": f"g{i}", "members": {"jpg": draw_image((i, 90, 3), i), "cls": b"1"}} for i in range(4)]
    bad = {"key": "bad", "members": {"jpg": b"\xff\xd8 no image", "cls": b"1"}}
    write_tar(root / "test" / "0.tar", [*good[:2], bad, *good[2:]])
    write_classification(tmp_path / "data", "wds_whole_test", n=10)
    stage = stage_of(spec, tmp_path / "data", tmp_path / "out", max_skipped=1)
    manifest = run(stage, Budget(1))
    assert manifest.skipped["reasons"] == {"undecodable image": 1}
    assert manifest.skipped["samples"][0]["id"] == "colors/bad"
    assert {(row["task"], row["n"]) for row in rows_of(stage)} == {("colors", 4), ("whole", 10)}
    text = scores_text(rows_of(stage), manifest.values)
    assert "Images left out: colors, 1 for undecodable image." in text
    # With more than a set may lack, its figures are missing and the others' stand.
    manifest = run(replace(stage, max_skipped=0.1), Budget(1))
    assert {row["task"] for row in rows_of(stage)} == {"whole"}
    (missing,) = manifest.values["missing"]
    assert missing["task"] == "colors" and "1 of 5 skipped, the budget is 10.0%" in missing["reason"]


def test_features_that_are_not_finite_give_no_score(data: Path, tmp_path: Path) -> None:
    """NaN is neither above nor below another score, so no label would seem to rank before the right one."""
    config = write_config(tmp_path).rpartition(":")[0]
    state = build_model(CONFIG).state_dict()
    specs = {"whole": f"{config}:random"}
    for name, tensor in (("images", "visual.proj"), ("texts", "text_projection")):
        torch.save(state | {tensor: torch.full_like(state[tensor], math.nan)}, tmp_path / f"{name}.pt")
        specs[name] = f"{config}:{tmp_path}/{name}.pt"
    checkpoints = tuple((name, one, encoder_digest(one)) for name, one in specs.items())
    stage = EvaluateStage(checkpoints, str(data), str(tmp_path / "out"))
    manifest = run(stage, Budget(9))
    assert {row["checkpoint"] for row in rows_of(stage)} == {"whole"}
    for name, words in (("images", "images"), ("texts", "prompts")):
        reasons = {e["task"]: e["reason"] for e in manifest.values["missing"] if e["checkpoint"] == name}
        assert set(reasons) == set(manifest.values["tasks"])
        assert "features are not finite" in reasons["colors"] and words in reasons["colors"]
    text = scores_text(rows_of(stage), manifest.values)
    assert next(line for line in text.splitlines() if "average" in line).count("–") == 2


class Pairs(Kind):
    """A custom kind: is an image nearer to its second caption than to its first?"""

    protocols = frozenset({"zeroshot"})

    def members(self, task) -> tuple[str, ...]:
        return ("txt",)

    def read(self, sample) -> Target:
        return Target(captions=read_captions(sample))

    def zeroshot(self, features, test_set) -> list[Row]:
        first = features.encode_texts([captions[0] for captions in features.captions])
        second = features.encode_texts([captions[1] for captions in features.captions])
        fraction = float(np.mean(np.sum(features.images * (second - first), axis=1) > 0))
        return [Row("acc1", fraction, len(first), 0.0)]


def test_a_registered_kind(tmp_path: Path, spec: str, monkeypatch) -> None:
    monkeypatch.setitem(KINDS.table, "pairs", f"{__name__}:Pairs")
    root = tmp_path / "data" / "wds_pairs_test"
    write_tar(
        root / "test" / "0.tar",
        [
            {"key": f"s{i}", "members": {"png": draw_image((i, 90, 3), i, ext="png"), "txt": b"one\nsame"}}
            for i in range(4)
        ],
    )
    (root / "test" / "nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("pairs")
    stage = stage_of(spec, tmp_path / "data", tmp_path / "out")
    run(stage)
    (row,) = rows_of(stage)
    assert (row["task"], row["metric"], row["n"]) == ("pairs", "acc1", 4)


def test_nothing_to_evaluate(tmp_path: Path, spec: str) -> None:
    broken = write_classification(tmp_path / "data")
    (broken / "classnames.txt").unlink()
    with pytest.raises(WinnowError, match=r"no task could be evaluated.*classnames.txt: no such file"):
        run(stage_of(spec, tmp_path / "data", tmp_path / "out"), Budget(9))
    (write_classification(tmp_path / "other") / "dataset_type.txt").write_text("captioning")
    with pytest.raises(UsageError, match="no task here can be evaluated by zeroshot"):
        run(stage_of(spec, tmp_path / "other", tmp_path / "out2"))


def test_encoder_without_text_is_not_applicable(tmp_path: Path, data: Path, spec: str, monkeypatch) -> None:
    import winnow.pretrain.encoder

    blind = winnow.pretrain.encoder.load_encoder(spec)
    monkeypatch.setattr(blind, "reads", frozenset({"image"}))
    monkeypatch.setattr(winnow.pretrain.encoder, "_load", lambda *_: blind)
    with pytest.raises(WinnowError, match="the encoder has no text tower"):
        run(stage_of(spec, data, tmp_path / "out"))


def test_serial_equals_ray(tmp_path: Path, data: Path, spec: str, ray_executor) -> None:
    first, second = stage_of(spec, data, tmp_path / "a"), stage_of(spec, data, tmp_path / "b")
    assert run(first) == run(second, executor=ray_executor)
    assert (tmp_path / "a/scores.parquet").read_bytes() == (tmp_path / "b/scores.parquet").read_bytes()


def test_real_sets(tmp_path: Path, real_data: Path, spec: str) -> None:
    """A random encoder is at chance on the real MNIST and Caltech-101 sets."""
    stage = stage_of(spec, real_data / "eval", tmp_path / "out", tasks=("mnist", "vtab/caltech101"))
    manifest = run(stage)
    for row in rows_of(stage):
        if row["metric"] == "mean_per_class_recall":
            chance = 1 / manifest.values["tasks"][row["task"]]["chance"]
            assert row["value"] < 1 / chance + 0.1
