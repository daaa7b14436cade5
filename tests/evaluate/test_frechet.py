"""The Fréchet distance as a protocol: of images that are drawn, or pretend to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import winnow.pretrain.encoder
from tests.evaluate.sets import image_of, open_found, samples_of, write_classification, write_config
from winnow.evaluate import metrics
from winnow.evaluate.protocols.frechet import embedded
from winnow.evaluate.report.score_table import scores_text
from winnow.evaluate.sets.layout import find_tasks
from winnow.evaluate.stage import EvaluateStage
from winnow.infra.errors import UsageError
from winnow.infra.io.images import decode_image
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.pretrain.encoder import encoder_digest


@pytest.fixture
def stage(tmp_path: Path) -> EvaluateStage:
    root = write_classification(tmp_path / "data", n=30)
    (root / "dataset_type.txt").write_text("images")
    (root / "classnames.txt").unlink()
    write_classification(tmp_path / "data", "wds_other_test", n=12)
    spec = write_config(tmp_path)
    checkpoints = (("tiny", spec, encoder_digest(spec)),)
    return EvaluateStage(checkpoints, str(tmp_path / "data"), str(tmp_path / "out"), protocols=("frechet", "zeroshot"))


def run(stage: EvaluateStage):
    execute(stage.embedding(), SerialExecutor())
    return execute(stage, SerialExecutor())


def test_distance_of_drawn_images(stage: EvaluateStage, monkeypatch) -> None:
    drawn = np.random.default_rng(1).integers(255, size=(30, 3, 20, 20), dtype=np.uint8)
    monkeypatch.setattr(winnow.pretrain.encoder, "load_sampler", lambda spec: lambda n, **_: drawn[:n])
    manifest = run(stage)
    rows = {(r["task"], r["metric"]): r for r in pq.read_table(stage.url("scores.parquet")).to_pylist()}
    found = find_tasks(stage.data, "colors")[0]
    real = embedded((decode_image(image_of(s)) for s in samples_of(open_found(found))), "pixels:8", "cpu")
    fake = embedded((decode_image(_png(image)) for image in drawn), "pixels:8", "cpu")
    row = rows["colors", "frechet_distance"]
    assert row["value"] == pytest.approx(metrics.frechet(fake, real)) and row["n"] == 30
    assert 0 < row["stderr"] < row["value"]
    text = scores_text(list(rows.values()), manifest.values)
    line = next(line for line in text.splitlines() if line.startswith("| colors | frechet"))
    assert "frechet_distance" in line and f"{row['value']:.3f}" in line
    assert "acc1" in next(line for line in text.splitlines() if line.startswith("| other  | zeroshot"))


def test_a_checkpoint_that_draws_nothing(stage: EvaluateStage) -> None:
    manifest = run(replace(stage, tasks=("other",)))
    (entry,) = manifest.values["not_applicable"]
    assert (entry["protocol"], entry["reason"]) == ("frechet", "the checkpoint draws no images")
    assert manifest.values["missing"] == []


def test_the_sampler_refuses_other_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        winnow.pretrain.encoder.load_sampler(write_config(tmp_path))(1)


def _png(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()
