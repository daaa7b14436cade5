"""Sets distributed as a table with images: as in the hub's repositories, and as the datasets library caches them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from tests.drawing import COLORS, draw_image
from tests.evaluate.sets import (
    image_of,
    open_found,
    samples_of,
    wino_images,
    wino_rows,
    write_csv,
    write_packed_retrieval,
    write_packed_wino,
    write_zip,
)
from winnow.evaluate.protocols.base import EvalSet
from winnow.evaluate.sets.files import data_digest
from winnow.evaluate.sets.layout import FoundTask, find_tasks
from winnow.evaluate.tasks.read import datacomp_tasks
from winnow.evaluate.tasks.task import TaskError

FLICKR = datacomp_tasks()["retrieval/flickr_1k_test_image_text_retrieval"]
WINO = datacomp_tasks()["misc/winogavil"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "evaluate"


def opened(data: Path) -> EvalSet:
    (found,) = find_tasks(str(data))
    return open_found(found)


@pytest.mark.parametrize("python_lists", [False, True])
def test_table_and_zip(tmp_path: Path, cache: Path, python_lists: bool) -> None:
    captions = write_packed_retrieval(tmp_path / "data" / FLICKR.data_folder, python_lists)
    samples = list(samples_of(opened(tmp_path / "data")))
    assert {sample.key: list(sample.texts) for sample in samples} == captions
    assert [sample.key for sample in samples] == list(captions)  # in the table's order
    assert image_of(samples[1]) == draw_image(list(COLORS.values())[1], 801)
    list(samples_of(opened(tmp_path / "data")))
    assert len(list(cache.iterdir())) == 1


def test_a_changed_table_is_unpacked_again(tmp_path: Path) -> None:
    root = tmp_path / "data" / FLICKR.data_folder
    write_packed_retrieval(root)
    assert len(list(samples_of(opened(tmp_path / "data")))) == 7
    before = data_digest(str(root))
    write_csv(root / "test_1k_flickr.csv", [{"raw": '["one"]', "split": "test", "filename": "1003.jpg"}])
    (sample,) = samples_of(opened(tmp_path / "data"))
    assert sample.texts == ("one",) and data_digest(str(root)) != before


def test_names_with_dots_are_different_images(tmp_path: Path) -> None:
    """And an association that was not shown does not count, as in DataComp's evaluation."""
    root = tmp_path / "data" / WINO.data_folder
    root.mkdir(parents=True)
    shown = ["dr. a", "dr. b", "c", "50% d", "e"]
    row = {"cue": "x", "candidates": json.dumps(shown), "associations": json.dumps(["dr. b", "elsewhere"])}
    write_csv(root / "winogavil_dataset.csv", [row])
    files = {name: draw_image((40 * i, 9, 9), i) for i, name in enumerate(shown)}
    write_zip(root / "winogavil_images.zip", {f"images/{name}.jpg": data for name, data in files.items()})
    test_set = opened(tmp_path / "data")
    images = {sample.key: image_of(sample) for sample in samples_of(test_set)}
    (one,) = test_set.texts.extra
    assert [images[key] for key in one.candidates] == list(files.values())
    assert [images[key] for key in one.selected] == [files["dr. b"]]


def test_winogavil(tmp_path: Path) -> None:
    rows = write_packed_wino(tmp_path / "data" / WINO.data_folder)
    test_set = opened(tmp_path / "data")
    images = wino_images()
    assert {sample.key: image_of(sample) for sample in samples_of(test_set)} == {
        name: images[name] for row in rows for name in row["candidates"]
    }
    found = [(one.cue, list(one.candidates), sorted(one.selected)) for one in test_set.texts.extra]
    assert found == [(row["cue"], row["candidates"], sorted(row["associations"])) for row in rows]


def write_arrow(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def test_datasets_cache(tmp_path: Path) -> None:
    """What DataComp's download script leaves: images as bytes, or as paths of extracted files that moved since."""
    cache = tmp_path / "data" / "hf_cache"
    images, rows = wino_images(), wino_rows()
    lists = [
        row | {"candidate_images": [{"bytes": images[n], "path": None} for n in row["candidates"]]} for row in rows
    ]
    folder = cache / "nlphuji___winogavil" / "TEST" / "1.1.0" / "abc123"
    write_arrow(folder / "winogavil-test-00000-of-00002.arrow", lists[:5])
    write_arrow(folder / "winogavil-test-00001-of-00002.arrow", lists[5:])
    extracted = cache / "downloads" / "extracted" / "f00" / "1.jpg"
    extracted.parent.mkdir(parents=True)
    extracted.write_bytes(draw_image((1, 2, 3), 4))
    where = "/elsewhere/evalsets/hf_cache/downloads/extracted/f00/1.jpg"
    row = {"image": {"bytes": None, "path": where}, "caption": ["one", "two"], "filename": "1.jpg"}
    name = "flickr_1k_test_image_text_retrieval"
    write_arrow(cache / f"nlphuji___{name}" / "TEST" / "1.1.0" / "abc" / f"{name}-test.arrow", [row])
    found = {entry.task.key: entry for entry in find_tasks(str(tmp_path / "data"))}
    assert list(found) == [WINO.key, FLICKR.key]
    wino = open_found(found[WINO.key])
    assert [one.cue for one in wino.texts.extra] == [row["cue"] for row in rows]
    assert all(image_of(sample) == images[sample.key] for sample in samples_of(wino))
    (sample,) = samples_of(open_found(found[FLICKR.key]))
    assert (sample.key, image_of(sample), sample.texts) == ("1", extracted.read_bytes(), ("one", "two"))


def test_a_path_outside_the_cache_is_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    for path in (str(secret), f"/x/hf_cache/../../{secret.name}"):
        row = {"image": {"bytes": None, "path": path}, "caption": ["one"]}
        folder = tmp_path / "data" / "hf_cache" / "nlphuji___flickr_1k_test_image_text_retrieval"
        write_arrow(folder / "TEST" / "1.1.0" / "a" / "x-test.arrow", [row])
        with pytest.raises(TaskError, match="neither embedded nor in hf_cache"):
            opened(tmp_path / "data")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"raw": '["a"]', "filename": "nowhere.jpg"}, r'images_flickr_1k_test\.zip: holds no image "nowhere\.jpg"'),
        ({"raw": "__import__('os')", "filename": "1000.jpg"}, r"test_1k_flickr\.csv:2: .*is not a list of strings"),
        ({"raw": "[1]", "filename": "1000.jpg"}, r"test_1k_flickr\.csv:2: .*is not a list of strings"),
        ({"text": "a", "filename": "1000.jpg"}, r'test_1k_flickr\.csv: has no column "raw"'),
    ],
)
def test_broken(tmp_path: Path, cache: Path, row: dict, message: str) -> None:
    root = tmp_path / "data" / FLICKR.data_folder
    write_packed_retrieval(root)
    write_csv(root / "test_1k_flickr.csv", [row])
    with pytest.raises(TaskError, match=message):
        opened(tmp_path / "data")
    assert list(cache.iterdir()) == []


def test_a_broken_zip(tmp_path: Path) -> None:
    root = tmp_path / "data" / FLICKR.data_folder
    write_packed_retrieval(root)
    archive = root / "images_flickr_1k_test.zip"
    archive.write_bytes(archive.read_bytes()[:900])
    with pytest.raises(TaskError, match=r"images_flickr_1k_test\.zip: cannot be read"):
        open_found(FoundTask(FLICKR, str(root)))
