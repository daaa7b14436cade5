"""Finding and opening test sets, and the messages for broken ones."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.drawing import COLORS, draw_image, write_tar
from tests.evaluate.sets import (
    TEMPLATES,
    image_of,
    npy,
    open_found,
    samples_of,
    write_classification,
    write_faces,
    write_retrieval,
)
from winnow.evaluate.protocols.base import IMAGES
from winnow.evaluate.sets.files import data_digest
from winnow.evaluate.sets.layout import find_tasks
from winnow.evaluate.sets.shards import Wanted, read_part, split_into_parts
from winnow.evaluate.tasks.task import TaskError
from winnow.infra.errors import UsageError

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_find_tasks(tmp_path: Path) -> None:
    write_classification(tmp_path, "wds_cifar10_test", names=TEN[:6])
    write_classification(tmp_path, "wds_colors_test")
    write_retrieval(tmp_path)
    (tmp_path / "hf_cache").mkdir()
    found = {entry.task.key: entry.task for entry in find_tasks(str(tmp_path))}
    assert list(found) == ["cifar10", "colors", "retrieval-colors"]
    assert found["cifar10"].group == "other" and found["cifar10"].classes == 10
    assert found["colors"].group == "extra" and found["colors"].chance == pytest.approx(1 / 6)
    assert found["retrieval-colors"].kind == "retrieval"
    assert [entry.task.key for entry in find_tasks(str(tmp_path), ("colors", "CIFAR-10"))] == ["cifar10", "colors"]
    with pytest.raises(UsageError, match=r'unknown task "colours".*Did you mean "colors"'):
        find_tasks(str(tmp_path), ("colours",))
    with pytest.raises(UsageError, match=r'no data for task "mnist".*wds_mnist_test'):
        find_tasks(str(tmp_path), ("mnist",))
    with pytest.raises(UsageError, match="no such folder"):
        find_tasks(str(tmp_path / "nothing"))


def test_reads_what_was_written(tmp_path: Path) -> None:
    write_classification(tmp_path, n=10, shards=3)
    test_set = open_found(find_tasks(str(tmp_path))[0])
    assert test_set.classnames == tuple(COLORS) and test_set.templates == TEMPLATES
    assert test_set.prompts("red {x}")[0] == "a photo of a red {x} square."
    samples = list(samples_of(test_set))
    assert sorted(sample.key for sample in samples) == [f"s{i:07d}" for i in range(10)]
    assert {sample.key: sample.label for sample in samples} == {f"s{i:07d}": i * 5 % 6 for i in range(10)}


def test_captions(tmp_path: Path) -> None:
    root = write_retrieval(tmp_path, n=2)
    members = {"jpg": draw_image((9, 9, 9), 0), "txt": b"one\r\n\n two \nthree"}
    write_tar(root / "test" / "0.tar", [{"key": "a", "members": members}])
    (sample,) = samples_of(open_found(find_tasks(str(tmp_path))[0]))
    assert sample.texts == ("one", " two ", "three")


def break_classnames(root: Path) -> None:
    (root / "classnames.txt").write_text("red\ngreen\n")


def break_label(root: Path) -> None:
    write_tar(root / "test" / "1.tar", [{"key": "s9", "members": {"jpg": draw_image((1, 2, 3), 0), "cls": b"10"}}])


def break_label_text(root: Path) -> None:
    write_tar(root / "test" / "1.tar", [{"key": "s9", "members": {"jpg": draw_image((1, 2, 3), 0), "cls": b"cat"}}])


def remove_label(root: Path) -> None:
    write_tar(root / "test" / "1.tar", [{"key": "s9", "members": {"jpg": draw_image((1, 2, 3), 0)}}])


def remove_templates(root: Path) -> None:
    (root / "zeroshot_classification_templates.txt").unlink()


def break_template(root: Path) -> None:
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\na photo of {}.\n")


def truncate_tar(root: Path) -> None:
    data = (root / "test" / "1.tar").read_bytes()
    (root / "test" / "1.tar").write_bytes(data[: len(data) // 2 - 100])


def remove_tar(root: Path) -> None:
    (root / "test" / "1.tar").unlink()


def break_count(root: Path) -> None:
    (root / "test" / "nshards.txt").write_text("two")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (break_classnames, r"classnames\.txt: has 2 class names, CIFAR-10 has 10 classes"),
        (break_label, r"1\.tar, sample s9: label 10 is out of range: classnames\.txt has 10 classes"),
        (break_label_text, r"1\.tar, sample s9: the label b'cat' is not a whole number"),
        (remove_label, r"1\.tar, sample s9: no label"),
        (remove_templates, r"zeroshot_classification_templates\.txt: no such file"),
        (break_template, r"zeroshot_classification_templates\.txt:2: .*no \{c\}"),
        (truncate_tar, r"1\.tar: truncated tar"),
        (remove_tar, r"1\.tar: no such file"),
        (break_count, r"nshards\.txt: should hold the number of test shards"),
    ],
)
def test_broken_sets(tmp_path: Path, fault, message: str) -> None:
    fault(write_classification(tmp_path, "wds_cifar10_test", names=TEN, n=20))
    (found,) = find_tasks(str(tmp_path))
    with pytest.raises(TaskError, match=message):
        list(samples_of(open_found(found)))


def test_digest_follows_content(tmp_path: Path) -> None:
    root, copy = write_classification(tmp_path / "a"), write_classification(tmp_path / "b")
    assert data_digest(str(root)) == data_digest(str(copy))
    before = data_digest(str(root))
    (root / "classnames.txt").write_text("\n".join(reversed(list(COLORS))) + "\n")
    assert data_digest(str(root)) != before


@pytest.mark.parametrize("cut", [100, 600, 1030, 1200, 2047, 2049, 2300, 2560 + 17, "between samples"])
def test_a_tar_truncated_anywhere_is_reported(tmp_path: Path, cut: int | str) -> None:
    """Within a header, within data, within the padding after them, and where a sample ends."""
    root = write_classification(tmp_path, shards=1)
    if isinstance(cut, str):
        with tarfile.open(root / "test" / "0.tar") as archive:
            cut = archive.getmembers()[6].offset
    tar = root / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:cut])
    (found,) = find_tasks(str(tmp_path))
    with pytest.raises(TaskError, match=r"0\.tar: truncated tar"):
        list(samples_of(open_found(found)))


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (None, r"0\.tar, sample a: no metadata \(\.npy\)"),
        (b"\x93NUMPY", r"0\.tar, sample a: the metadata \(\.npy\) cannot be read"),
        (npy([1]), r"holds 1 values instead of 2"),
        (npy(["x", "y"], "U1"), r"holds 2 values of type <U1, not numbers"),
        (npy([-1, 3]), r"gives region as -1, which is not a group"),
        (npy([float("nan"), 3.0], "float64"), r"gives region as nan, which is not a group"),
    ],
)
def test_broken_metadata(tmp_path: Path, member: bytes | None, message: str) -> None:
    root = write_classification(tmp_path, "wds_geode_test", n=4, shards=1, names=[f"thing {i}" for i in range(40)])
    members = {"jpg": draw_image((1, 2, 3), 0), "cls": b"0"} | ({} if member is None else {"npy": member})
    write_tar(root / "test" / "0.tar", [{"key": "a", "members": members}])
    with pytest.raises(TaskError, match=message):
        list(samples_of(open_found(find_tasks(str(tmp_path))[0])))


def test_pickled_metadata_is_not_unpickled(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}, print], dtype=object), allow_pickle=True)
    test_broken_metadata(tmp_path, file.getvalue(), "cannot be read.*allow_pickle=False")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("classnames.txt", "race:white\nhair:red\n", r'classnames\.txt:2: "hair" is none of race, gender, age, toxic'),
        ("classnames.txt", "race:white\ngender:male\nage:3\n", r'classnames\.txt: no line begins with "toxic:"'),
        ("zeroshot_classification_templates.txt", "race:a {c}\n", r'templates\.txt: no line begins with "gender:"'),
    ],
)
def test_broken_faces(tmp_path: Path, file: str, text: str, message: str) -> None:
    (write_faces(tmp_path, n=3) / file).write_text(text)
    with pytest.raises(TaskError, match=message):
        open_found(find_tasks(str(tmp_path))[0])


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"cue": "owl"}',
        '{"cue": "", "candidates": ["a"], "associations": ["a"]}',
        '{"cue": "owl", "candidates": ["a"], "associations": []}',
        '{"cue": "owl", "candidates": [], "associations": ["a"]}',
    ],
)
def test_broken_associations(tmp_path: Path, line: str) -> None:
    root = write_classification(tmp_path, "wds_misc-winogavil_test", n=4)
    (root / "associations.jsonl").write_text('{"cue": "owl", "candidates": ["a"], "associations": ["a"]}\n' + line)
    with pytest.raises(TaskError, match=r"associations\.jsonl:2: should be an object with a cue"):
        open_found(find_tasks(str(tmp_path))[0])


def test_labels_are_whole_numbers(tmp_path: Path) -> None:
    for number, text in enumerate((b"0_3", b"3.0", b"3" + b" " * 40 + b"7", "٣".encode(), b"")):
        root = write_classification(tmp_path / str(number), "wds_cifar10_test", names=TEN, n=2, shards=1)
        write_tar(root / "test" / "0.tar", [{"key": "s", "members": {"jpg": draw_image((1, 2, 3), 0), "cls": text}}])
        (found,) = find_tasks(str(tmp_path / str(number)))
        with pytest.raises(TaskError, match="is not a whole number"):
            list(samples_of(open_found(found)))


def test_of_several_images_the_one_that_datacomps_evaluation_takes(tmp_path: Path) -> None:
    root = write_classification(tmp_path, n=2, shards=1)
    kinds = {
        ext: draw_image((i, 0, 0), i, ext="jpg" if ext == "jpeg" else ext)
        for i, ext in enumerate(("jpeg", "jpg", "png", "webp"))
    }
    for expected in ("webp", "png", "jpg", "jpeg"):
        write_tar(root / "test" / "0.tar", [{"key": "s", "members": {**kinds, "cls": b"0"}}])
        (found,) = find_tasks(str(tmp_path))
        (sample,) = samples_of(open_found(found))
        (raw,) = read_part(split_into_parts(found.url, "test")[0], Wanted(IMAGES))
        assert image_of(sample) == image_of(raw) == kinds.pop(expected)


def test_text_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    root = write_retrieval(tmp_path)
    for path in (root / "dataset_type.txt", root / "test" / "nshards.txt"):
        path.write_text(path.read_text(), encoding="utf-8-sig")
    (found,) = find_tasks(str(tmp_path))
    assert found.task.kind == "retrieval" and len(list(samples_of(open_found(found)))) == 9


def test_unusual_names_and_stray_files_hide_no_set(tmp_path: Path) -> None:
    root = write_classification(tmp_path, "wds_colors_test")
    before = data_digest(str(root))
    for folder in ("wds_my set_test", "wds_été_test", "wds_grouped_test"):
        write_classification(tmp_path, folder)
    for folder in ("wds__test", "wds_.._test", "wds_a,b_test"):
        (tmp_path / folder).mkdir()
    (tmp_path / "wds_grouped_test" / "dataset_type.txt").write_text("grouped_classification")
    (root / "test" / "notes").mkdir()
    (root / "test" / "dangling").symlink_to("nowhere")
    assert [found.task.key for found in find_tasks(str(tmp_path))] == ["colors", "grouped", "my set", "été"]
    assert all(len(list(samples_of(open_found(found)))) == 30 for found in find_tasks(str(tmp_path)))
    assert data_digest(str(root)) == before
    (root / "test" / "1.tar").unlink()
    (root / "test" / "1.tar").mkdir()
    with pytest.raises(TaskError, match="is a folder"):
        open_found(find_tasks(str(tmp_path), "colors")[0])
    (root / "test" / "1.tar").rmdir()
    (root / "test" / "1.tar").symlink_to("nowhere")
    assert data_digest(str(root)) != before
    with pytest.raises(TaskError, match="no such file"):
        open_found(find_tasks(str(tmp_path), "colors")[0])
