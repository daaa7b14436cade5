"""The README's examples: a task, a kind and a protocol, each in one file, in the tables and outside them."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.drawing import draw_image, write_tar
from tests.evaluate.sets import npy, write_classification, write_config, write_train
from winnow.evaluate.protocols import KINDS, PROTOCOLS
from winnow.evaluate.protocols.base import Kind, Row, Target, load_kind, load_protocol, read_metadata
from winnow.evaluate.sets.layout import find_tasks
from winnow.evaluate.stage import EvaluateStage
from winnow.infra import importing
from winnow.infra.errors import UsageError
from winnow.infra.pool.sample import Sample
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.pretrain.encoder import encoder_digest, load_encoder

EXAMPLES = Path(__file__).parents[1] / "examples"
README = (Path(__file__).parents[2] / "evaluate" / "README.md").read_text()
PROTOCOL = "tests.examples.nearest_mean:NEAREST_MEAN"
KIND = "tests.examples.caption_pairs:CaptionPairs"


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_config(tmp_path_factory.mktemp("model"))


def scores_of(spec: str, data: Path, out: Path, **more) -> list[dict]:
    stage = EvaluateStage((("tiny", spec, encoder_digest(spec)),), str(data), str(out), **more)
    execute(stage.embedding(), SerialExecutor())
    execute(stage, SerialExecutor())
    return pq.read_table(stage.url("scores.parquet")).to_pylist()


def write_pairs(data: Path, n: int = 5) -> None:
    captions = [(f"a thing {i}", f"some other thing {i}") for i in range(n)]
    samples = [
        {"key": f"s{i}", "members": {"png": draw_image((40 * i, 90, 3), i, ext="png"), "txt": "\n".join(pair).encode()}}
        for i, pair in enumerate(captions)
    ]
    write_tar(data / "wds_pairs_test" / "test" / "0.tar", samples)
    (data / "wds_pairs_test" / "test" / "nshards.txt").write_text("1")


@pytest.mark.parametrize("name", ["nearest_mean.py", "caption_pairs.py", "pairs.yaml"])
def test_the_readme_shows_the_examples(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    assert text in README and len(text.splitlines()) < 60


@pytest.mark.parametrize("registered", [False, True])
def test_a_protocol(tmp_path: Path, spec: str, monkeypatch, registered: bool) -> None:
    if registered:
        monkeypatch.setitem(PROTOCOLS.table, "nearest_mean", PROTOCOL)
    write_train(write_classification(tmp_path / "data", n=12), n=24)
    protocols = ("nearest_mean" if registered else PROTOCOL,)
    rows = scores_of(spec, tmp_path / "data", tmp_path / "out", protocols=protocols)
    assert {row["protocol"] for row in rows} == {"nearest_mean"}
    assert {row["metric"] for row in rows} == {"acc1", "acc5", "mean_per_class_recall"}


@pytest.mark.parametrize("location", ["tasks", "data", "recipe", "table"])
def test_a_task_and_a_kind(tmp_path: Path, spec: str, monkeypatch, location: str) -> None:
    data, tasks = tmp_path / "data", "all"
    write_pairs(data)
    if location == "table":
        monkeypatch.setitem(KINDS.table, "caption_pairs", KIND)
        (data / "wds_pairs_test" / "dataset_type.txt").write_text("caption_pairs")
    elif location == "recipe":
        tasks = (str(EXAMPLES / "pairs.yaml"),)
    elif location == "data":
        tasks = ("pairs.yaml",)
        (data / "pairs.yaml").write_text((EXAMPLES / "pairs.yaml").read_text())
    else:
        (data / "tasks").mkdir()
        (data / "tasks" / "pairs.yaml").write_text((EXAMPLES / "pairs.yaml").read_text())
    if location in ("tasks", "data"):  # a file of the data names code only where the user does as well
        monkeypatch.setenv(importing.TRUSTED, KIND)
    (row,) = scores_of(spec, data, tmp_path / "out", tasks=tasks)
    encoder = load_encoder(spec, device="cpu")
    right = 0
    for i in range(5):
        image = Sample(members={"png": draw_image((40 * i, 90, 3), i, ext="png")}).image()
        feature = encoder.encode_images(encoder.preprocess(image)[None])[0]
        wrong, better = encoder.encode_texts([f"a thing {i}", f"some other thing {i}"])
        right += feature @ better > feature @ wrong
    assert (row["task"], row["metric"], row["n"], row["value"]) == ("pairs", "acc1", 5, right / 5)


def test_a_task_file_is_refused_with_its_line(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    file = tmp_path / "pairs.yaml"
    for text, message in (
        ("tests.examples.nowhere:CaptionPairs", 'line 3: no module "tests.examples.nowhere"'),
        ("tests.examples.nearest_mean:nearest_mean", "line 3: .* is not a kind of task"),
        ("caption_pears", 'line 3: unknown kind "caption_pears"'),
    ):
        file.write_text((EXAMPLES / "pairs.yaml").read_text().replace(KIND, text))
        with pytest.raises(UsageError, match=message):
            find_tasks(str(tmp_path / "data"), (str(file),))
    with pytest.raises(UsageError, match="no such file"):
        find_tasks(str(tmp_path / "data"), ("nowhere.yaml",))
    with pytest.raises(UsageError, match="is not a protocol"):
        load_protocol("tests.examples.nearest_mean:nearest_mean")


def test_a_test_set_cannot_name_code(tmp_path: Path) -> None:
    """Only a task file may name a class; `dataset_type.txt` comes with the data."""
    write_pairs(tmp_path)
    (tmp_path / "wds_pairs_test" / "dataset_type.txt").write_text(KIND)
    assert find_tasks(str(tmp_path))[0].kind is None


class Loudness(Kind):
    """Reads a sound, a mask and numbers next to the image."""

    images = ("jpg",)
    protocols = frozenset({"zeroshot"})

    def members(self, task) -> tuple[str, ...]:
        return ("wav", "mask.png", "npy")

    def read(self, sample: Sample) -> Target:
        covered = Sample(members={"png": sample.member("mask.png")}).image().getpixel((0, 0))[0]
        return Target(label=len(sample.member("wav")), metadata=(*read_metadata(sample), float(covered)))

    def zeroshot(self, features, test_set) -> list[Row]:
        total = float(features.metadata.sum())
        return [Row("acc1", float(features.labels.sum()) + total, len(features.labels), 0.0)]


def test_a_kind_reads_any_member(tmp_path: Path, spec: str, monkeypatch) -> None:
    """And the image is the one that it names, not the mask."""
    data = tmp_path / "data"
    samples = [
        {
            "key": f"s{i}",
            "members": {
                "mask.png": draw_image((200, 0, 0), i, size=(8, 8), ext="png"),
                "png": b"not this one",
                "jpg": draw_image((9, 9, 9), i),
                "wav": b"RIFF" * (i + 1),
                "npy": npy([10 * i]),
            },
        }
        for i in range(3)
    ]
    write_tar(data / "wds_sounds_test" / "test" / "0.tar", samples)
    (data / "wds_sounds_test" / "test" / "nshards.txt").write_text("1")
    (data / "tasks").mkdir()
    task = f"""
        name: Sounds
        key: sounds
        kind: {__name__}:Loudness
        metric: acc1
        group: extra
        version: 1
    """
    monkeypatch.setenv(importing.TRUSTED, f"{__name__}:Loudness")
    (data / "tasks" / "sounds.yaml").write_text(textwrap.dedent(task))
    (row,) = scores_of(spec, data, tmp_path / "out")
    masks = [Sample(members={"png": one["members"]["mask.png"]}).image() for one in samples]
    expected = (4 + 8 + 12) + (0 + 10 + 20) + sum(int(np.asarray(mask)[0, 0, 0]) for mask in masks)
    assert (row["value"], row["n"]) == (expected, 3)
    assert load_kind(f"{__name__}:Loudness").names == [f"{__name__}:Loudness"]
