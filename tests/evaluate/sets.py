"""Tiny evaluation sets in DataComp's layout, and a tiny CLIP to run on them."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.drawing import COLORS, draw_image, write_tar
from winnow.evaluate.protocols.base import IMAGES, EvalSet
from winnow.evaluate.sets.files import open_set
from winnow.evaluate.sets.layout import FoundTask
from winnow.evaluate.sets.shards import Wanted, as_columns, check_targets, read_part, read_target, split_into_parts
from winnow.evaluate.tasks.task import TaskError
from winnow.infra.io import storage
from winnow.infra.pool.sample import Sample

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TEMPLATES = ("a photo of a {c} square.", "{c}", "some {c} things")


def write_config(folder: Path) -> str:
    """The spec of a tiny CLIP with random weights."""
    path = folder / "tiny-clip.json"
    path.write_text(json.dumps(CONFIG))
    return f"{path}:random"


def classification_samples(n: int, classes: int = 6, first: int = 0) -> list[dict]:
    """Images of one colour, the label being the colour; in the formats that sets use."""
    names = list(COLORS)
    found = []
    for i in range(first, first + n):
        label, ext = (i * 5) % classes, ("jpg", "png", "webp")[i % 3]
        data = draw_image(COLORS[names[label % len(names)]], 100 + i, ext=ext)
        found.append({"key": f"s{i:07d}", "members": {ext: data, "cls": str(label).encode()}})
    return found


def write_classification(
    data: Path, folder: str = "wds_colors_test", n: int = 30, shards: int = 2, names: list[str] | None = None
) -> Path:
    """A classification set of `n` images over two shards."""
    names = list(COLORS) if names is None else names
    root = data / folder
    samples = classification_samples(n, len(names))
    for shard in range(shards):
        write_tar(root / "test" / f"{shard}.tar", samples[shard::shards])
    (root / "test" / "nshards.txt").write_text(f"{shards}\n")
    (root / "classnames.txt").write_text("\n".join(names) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return root


def write_retrieval(data: Path, folder: str = "wds_retrieval-colors_test", n: int = 9) -> Path:
    """A retrieval set: image i has 1 + i % 3 captions."""
    names = list(COLORS)
    samples = []
    for i in range(n):
        name = names[i % len(names)]
        captions = [f"a {name} square number {i} said {j}" for j in range(1 + i % 3)]
        members = {"jpg": draw_image(COLORS[name], 300 + i), "txt": "\n".join(captions).encode()}
        samples.append({"key": f"s{i:07d}", "members": members})
    root = data / folder
    write_tar(root / "test" / "0.tar", samples)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("retrieval\n")
    return root


def npy(values: list[float], dtype: str = "int64") -> bytes:
    """A vector as a sample's `.npy` member."""
    file = io.BytesIO()
    np.save(file, np.array(values, dtype=dtype))
    return file.getvalue()


def add_metadata(root: Path, rows: dict[str, list[int]]) -> None:
    """Give the samples of a classification set metadata, by key."""
    for tar in sorted((root / "test").glob("*.tar")):
        with tarfile.open(tar) as archive:
            members = [(info.name, archive.extractfile(info).read()) for info in archive]
        samples: dict[str, dict] = {}
        for name, data in members:
            key, _, ext = name.partition(".")
            samples.setdefault(key, {"key": key, "members": {}})["members"][ext] = data
        for key, item in samples.items():
            item["members"]["npy"] = npy(rows[key])
        write_tar(tar, list(samples.values()))


FACE_NAMES = {
    "race": ["black", "white", "indian", "latino", "middle eastern", "southeast asian", "east asian"],
    "gender": ["male", "female"],
    "age": ["0-2", "3-9", "10-19", "20-29", "more than 70"],
}
FACE_NAMES["toxic"] = [f"{race} {gender}" for race in FACE_NAMES["race"] for gender in ("man", "woman")]
FACE_NAMES["toxic"] += ["animal", "gorilla", "chimpanzee", "orangutan", "thief", "criminal", "suspicious person"]
FACE_TEMPLATES = [
    "race:a photo of a {c} person.",
    "gender:a photo of a {c}.",
    "gender:a {c} face.",
    "age:a photo of a person aged {c} years.",
    "toxic:a photo of a {c}.",
]


def write_faces(data: Path, folder: str = "wds_fairface_test", n: int = 40) -> Path:
    """A set of faces as DataComp has them: metadata age, gender, race, race_binary; no labels."""
    rng, colors = np.random.default_rng(5), list(COLORS.values())
    samples = []
    for i in range(n):
        race = int(rng.integers(7))
        metadata = [int(rng.integers(5)), int(rng.integers(2)), race, int(race != 1)]
        members = {"webp": draw_image(colors[race % 6], 500 + i, ext="webp"), "npy": npy(metadata)}
        samples.append({"key": f"s{i:07d}", "members": members})
    root = data / folder
    write_tar(root / "test" / "0.tar", samples)
    (root / "test" / "nshards.txt").write_text("1")
    lines = [f"{objective}:{name}\n" for objective, names in FACE_NAMES.items() for name in names]
    (root / "classnames.txt").write_text("".join(lines))
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(FACE_TEMPLATES) + "\n")
    return root


def wino_rows(n: int = 14) -> list[dict]:
    """Cues with 5, 6, 10 or 12 of 16 images, 2 to 5 of which belong to them."""
    rng = np.random.default_rng(6)
    cues = ["Owl", "cat", "igloo", "Ufo", "bee"]
    rows = []
    for i in range(n):
        shown = [f"thing{j}" for j in rng.permutation(16)[: (5, 6, 10, 12)[i % 4]]]
        selected = sorted(rng.permutation(shown)[: rng.integers(2, 6)].tolist())
        rows.append({"cue": f"{cues[i % 5]} {i}", "candidates": shown, "associations": selected})
    return rows


def wino_images() -> dict[str, bytes]:
    colors = list(COLORS.values())
    return {f"thing{j}": draw_image(colors[j % 6], 700 + j, size=(20 + j, 24)) for j in range(16)}


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_packed_wino(folder: Path) -> list[dict]:
    """WinoGAViL as its hub repository has it: a table and a zip of images."""
    folder.mkdir(parents=True)
    rows = wino_rows()
    lists = [row | {name: json.dumps(row[name]) for name in ("candidates", "associations")} for row in rows]
    write_csv(folder / "winogavil_dataset.csv", lists)
    write_zip(folder / "winogavil_images.zip", {f"images/{name}.jpg": data for name, data in wino_images().items()})
    return rows


def write_packed_retrieval(folder: Path, python_lists: bool = False) -> dict[str, list[str]]:
    """Flickr (lists in JSON) or MSCOCO (Python's) as the hub repositories have them; the captions of each image."""
    folder.mkdir(parents=True)
    names = list(COLORS)
    captions = {f"{1000 + i}": [f"a {names[i % 6]} one, number {i}", f'it\'s "{names[i % 6]}"'] for i in range(7)}
    write = repr if python_lists else json.dumps
    rows = [{"raw": write(texts), "split": "test", "filename": f"{key}.jpg"} for key, texts in captions.items()]
    rows.append({"raw": write(["no"]), "split": "train", "filename": "nowhere.jpg"})
    write_csv(folder / "test_1k_flickr.csv", rows)
    colors = list(COLORS.values())
    files = {f"images/{key}.jpg": draw_image(colors[i % 6], 800 + i) for i, key in enumerate(captions)}
    write_zip(folder / "images_flickr_1k_test.zip", {**files, "__MACOSX/._1000.jpg": b"junk", "images/readme.txt": b""})
    return captions


def write_train(root: Path, n: int = 24, classes: int = 6, split: str = "train") -> None:
    """Give a classification set a train split (or "val") of other images than its test split."""
    samples = classification_samples(n, classes, first={"train": 1000, "val": 2000}[split])
    write_tar(root / split / "0.tar", samples)
    (root / split / "nshards.txt").write_text("1\n")


def open_found(found: FoundTask) -> EvalSet:
    return open_set(found.task, found.url)


def image_of(sample: Sample) -> bytes:
    """The encoded image of a sample."""
    return next(data for ext, data in sample.members.items() if ext in IMAGES)


def samples_of(test_set: EvalSet, split: str = "test") -> Iterator[Sample]:
    """The samples of a set, in order, with `label`, `texts` and `columns["metadata"]` as its kind reads them.

    Raises:
        TaskError: a shard is truncated, or a sample lacks something or does not fit the set.
    """
    wanted = Wanted.by(test_set.kind, test_set.task)
    count = 0
    for part in split_into_parts(test_set.url, split):
        samples = list(read_part(part, wanted))
        targets = check_targets(
            *as_columns([read_target(test_set.kind, sample) for sample in samples]), test_set, part.tar
        )
        for i, sample in enumerate(samples):
            sample.label, sample.texts = int(targets.labels[i]), targets.captions[i]
            sample.columns = {"metadata": targets.metadata[i]}
            yield sample
        count += len(samples)
    if not count:
        raise TaskError("holds no sample", where=storage.join(test_set.url, split))
