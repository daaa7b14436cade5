"""Each kind against DataComp's definition written plainly, on features drawn at random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

from tests.evaluate.sets import (
    FACE_NAMES,
    FACE_TEMPLATES,
    open_found,
    samples_of,
    wino_rows,
    write_classification,
    write_faces,
    write_packed_wino,
)
from winnow.evaluate.protocols.base import EvalSet, Features, Row, SetTexts, load_kind, load_protocol
from winnow.evaluate.sets.layout import FoundTask, extra_task
from winnow.evaluate.tasks.read import datacomp_tasks
from winnow.evaluate.tasks.task import Task

TASKS = datacomp_tasks()


def unit(array: np.ndarray) -> np.ndarray:
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


class Texts:
    """An encoder of texts: each has its fixed direction."""

    def __init__(self, dim: int = 6) -> None:
        self.dim, self.seen = dim, []

    def one(self, text: str) -> np.ndarray:
        return unit(np.random.default_rng(list(text.encode())).normal(size=self.dim))

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.seen += texts
        return np.stack([self.one(text) for text in texts])


def set_of(task: Task, classnames: tuple[str, ...], templates: tuple[str, ...] = ("a {c}", "the {c}")) -> EvalSet:
    return EvalSet(task, "nowhere", load_kind(task.kind), SetTexts(classnames, templates))


def rows_of(features: Features, test_set: EvalSet) -> dict[str, Row]:
    rows = load_protocol("zeroshot").run(features, test_set)
    assert len({row.metric for row in rows}) == len(rows)
    assert all(type(row.value) is float and 0 <= row.value <= 1 and row.stderr >= 0 for row in rows)
    return {row.metric: row for row in rows}


def classified(key: str, n: int = 400, classes: int = 9) -> tuple[Features, EvalSet, np.ndarray]:
    """Features with metadata of a classification task, and the logits as CLIP_benchmark computes them."""
    rng, texts = np.random.default_rng(3), Texts()
    names = tuple(f"class {i}" for i in range(classes))
    labels = rng.choice([0, 1, 2, 4, 5, 8], size=n)  # some are absent
    test_set = set_of(TASKS[key], names)
    weights = np.stack([unit(np.mean([texts.one(f"a {name}"), texts.one(f"the {name}")], axis=0)) for name in names])
    images = unit(rng.normal(size=(n, 6)) + 0.7 * weights[labels])
    metadata = np.stack([rng.choice([0, 2, 3], size=n), rng.integers(4, size=n), labels], axis=1).astype(float)
    return Features(images, labels, texts, metadata=metadata), test_set, 100 * images @ weights.T


@pytest.mark.parametrize(
    ("key", "fields", "k", "prefix"),
    [
        ("wilds/fmow", {"year": 1, "region": 0}, 1, "acc"),
        ("wilds/camelyon17", {"slide": 1}, 1, "acc"),
        ("fairness/dollar_street", {"income_ds": 0}, 5, "acc_top5"),
        ("fairness/geode", {"region": 0}, 1, "acc"),
    ],
)
def test_groups(key: str, fields: dict[str, int], k: int, prefix: str) -> None:
    features, test_set, logits = classified(key)
    rows = rows_of(features, test_set)
    top = np.argsort(-logits, axis=1)[:, :k]
    right = np.array([label in batch for label, batch in zip(features.labels, top, strict=True)])
    for field, column in fields.items():
        groups = features.metadata[:, column]
        fractions = {int(g): right[groups == g].mean() for g in set(groups)}
        for group, fraction in fractions.items():
            row = rows[f"{prefix}_{field}:{group}"]
            assert row.value == pytest.approx(fraction) and row.n == np.sum(groups == group)
            assert row.stderr == pytest.approx((fraction * (1 - fraction) / row.n) ** 0.5)
        worst = f"{prefix}_wg" if len(fields) == 1 else f"{prefix}_worst_{field}"
        assert rows[worst].value == pytest.approx(min(fractions.values())) and rows[worst].n == len(right)
        assert f"{prefix}_{field}:1" not in rows or 1 in fractions  # no figure for a group without samples
    assert rows["acc1"].value == pytest.approx(np.mean(logits.argmax(axis=1) == features.labels))
    assert TASKS[key].metric in rows


def test_iwildcam() -> None:
    features, test_set, logits = classified("wilds/iwildcam")
    rows, said = rows_of(features, test_set), logits.argmax(axis=1)
    here = np.unique(features.labels)
    f1 = sk.f1_score(features.labels, said, average="macro", labels=here)
    assert rows["F1-macro_all"].value == pytest.approx(f1)
    recall = sk.recall_score(features.labels, said, average="macro", labels=here)
    assert rows["mean_per_class_recall"].value == pytest.approx(recall)


def test_missing_metadata_leaves_the_other_scores() -> None:
    features, test_set, _ = classified("wilds/camelyon17")
    rows = rows_of(Features(features.images, features.labels, Texts(), metadata=features.metadata * np.nan), test_set)
    assert set(rows) == {"acc1", "acc5", "mean_per_class_recall"}


def test_order_of_classnames_is_that_of_labels() -> None:
    features, test_set, _ = classified("cifar10")
    order = np.random.default_rng(0).permutation(9)  # place of each name in the new file
    names = tuple(np.array(test_set.classnames)[np.argsort(order)])
    moved = Features(features.images, order[features.labels], Texts())
    one, other = rows_of(features, test_set), rows_of(moved, set_of(TASKS["cifar10"], names))
    assert {name: row.value for name, row in one.items()} == pytest.approx({n: r.value for n, r in other.items()})


def test_equal_scores_and_few_classes() -> None:
    """Classes with the same prompt embedding tie: the first name wins. With four classes there is no acc5."""
    images = unit(np.ones((8, 3)))
    labels = np.array([0, 1, 2, 3] * 2)
    texts = lambda batch: unit(np.ones((len(batch), 3)))  # noqa: E731
    rows = rows_of(Features(images, labels, texts), set_of(TASKS["vtab/kitti_closest_vehicle_distance"], tuple("abcd")))
    assert rows["acc1"].value == 0.25 and "acc5" not in rows


def test_images_of_other_classes_do_not_count() -> None:
    """ObjectNet with all its classes: only those that its mapping names count."""
    features, test_set, logits = classified("objectnet")
    labels = np.where(features.labels == 5, -1, features.labels)
    rows = rows_of(Features(features.images, labels, Texts()), test_set)
    kept = labels >= 0
    assert rows["acc1"].value == pytest.approx(np.mean(logits[kept].argmax(axis=1) == labels[kept]))
    assert rows["acc1"].n == kept.sum() < len(labels)


def test_faces(tmp_path: Path) -> None:
    """DataComp's tables, an image at a time."""
    write_faces(tmp_path, n=60)
    test_set = open_found(FoundTask(TASKS["fairness/fairface"], str(tmp_path / "wds_fairface_test")))
    metadata = np.array([sample.columns["metadata"] for sample in samples_of(test_set)])
    texts, rng = Texts(), np.random.default_rng(1)
    images = unit(rng.normal(size=(60, 6)))
    rows = rows_of(Features(images, np.full(60, -1), texts, metadata=metadata), test_set)
    assert "gender:" not in "".join(texts.seen) and "a photo of a male." in texts.seen and "a male face." in texts.seen

    said = {}
    for objective, names in FACE_NAMES.items():
        templates = [line.split(":", 1)[1] for line in FACE_TEMPLATES if line.startswith(f"{objective}:")]
        weights = []
        for name in names:
            weights.append(unit(np.mean([texts.one(t.format(c=name)) for t in templates], axis=0)))
        said[objective] = [int(np.argmax([image @ w for w in weights])) for image in images]
    tables: dict[str, list] = {}
    for i, (age, gender, race, other) in enumerate(metadata.astype(int)):
        white = f"race_binary:{other}"
        for name, right in (
            ("acc_race", int(said["race"][i] != 1) == other),
            ("acc_gender", said["gender"][i] == gender),
            ("acc_age", said["age"][i] == age),
        ):
            for group in ("avg", white):
                tables.setdefault(f"{name}_{group}", []).append(right)
        crossed = f"race:{race}_gender:{gender}"
        for group in ("avg", crossed):
            tables.setdefault(f"acc_gender_x_{group}", []).append(said["gender"][i] == gender)
        for name, locations in (("toxicity_crime", range(18, 21)), ("toxicity_nonhuman", range(14, 18))):
            for group in ("avg", f"race:{race}"):
                tables.setdefault(f"{name}_{group}", []).append(said["toxic"][i] in locations)
    lowest = {}
    for name, right in tables.items():
        assert rows[name].value == pytest.approx(np.mean(right)), name
        assert rows[name].n == len(right)
        if not name.endswith("_avg"):
            table = next(t for t in ("acc_race", "acc_gender_x", "acc_gender", "acc_age", *rows) if name.startswith(t))
            table = next((t for t in ("toxicity_crime", "toxicity_nonhuman") if name.startswith(t)), table)
            lowest[f"{table}_wg"] = min(lowest.get(f"{table}_wg", 1.0), np.mean(right))
    assert {name: rows[name].value for name in lowest} == pytest.approx(lowest)
    assert set(rows) == set(tables) | set(lowest)


def test_winogavil(tmp_path: Path, monkeypatch) -> None:
    """DataComp's loop over instances, with scikit-learn's Jaccard index."""
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "cache"))
    write_packed_wino(tmp_path / "wds_misc-winogavil_test")
    test_set = open_found(FoundTask(TASKS["misc/winogavil"], str(tmp_path / "wds_misc-winogavil_test")))
    keys, texts = [sample.key for sample in samples_of(test_set)], Texts()
    images = unit(np.random.default_rng(2).normal(size=(len(keys), 6)))
    rows = rows_of(Features(images, np.full(len(keys), -1), texts, keys=keys), test_set)
    assert "An owl 0" in texts.seen and "A cat 1" in texts.seen and "A bee 4" in texts.seen
    scores, sizes = [], []
    for row in wino_rows():
        cue = row["cue"].lower()
        text = texts.one(("An " if cue[0] in "aeiou" else "A ") + cue)
        logits = np.array([images[keys.index(name)] @ text for name in row["candidates"]])
        truth = np.isin(row["candidates"], row["associations"])
        selected = np.isin(np.arange(len(logits)), np.argsort(logits)[-truth.sum() :])
        scores.append(sk.jaccard_score(truth, selected))
        sizes.append(len(logits))
    scores, sizes = np.array(scores), np.array(sizes)
    expected = {
        "avg_jaccard_score": np.ones(len(sizes), bool),
        "jaccard_score_5": sizes == 5,
        "jaccard_score_6": sizes == 6,
        "jaccard_score_10": sizes == 10,
        "jaccard_score_12": sizes == 12,
        "jaccard_score_5-6": sizes <= 6,
        "jaccard_score_10-12": sizes >= 10,
    }
    assert {name: (row.value, row.n) for name, row in rows.items()} == {
        name: (pytest.approx(scores[batch].mean()), batch.sum()) for name, batch in expected.items()
    }
    # An image that cannot be decoded takes its cues with it.
    lost = Features(images[1:], np.full(len(keys) - 1, -1), texts, keys=keys[1:])
    whole = [keys[0] not in row["candidates"] for row in wino_rows()]
    assert rows_of(lost, test_set)["avg_jaccard_score"].n == sum(whole) < len(whole)


def test_multilabel() -> None:
    rng, texts = np.random.default_rng(4), Texts()
    names = tuple("abcdef")
    images = unit(rng.normal(size=(200, 6)))
    targets = (rng.random((200, 6)) < 0.3).astype(float)
    task = extra_task("wds_voc2007_multilabel_test", "multilabel", 6)
    rows = rows_of(Features(images, np.full(200, -1), texts, metadata=targets), set_of(task, names))
    weights = np.stack([unit(np.mean([texts.one(f"a {name}"), texts.one(f"the {name}")], axis=0)) for name in names])
    expected = sk.average_precision_score(targets, images @ weights.T, average="macro")
    assert rows[task.metric].value == pytest.approx(expected)


@pytest.mark.parametrize("names", [[f"thing {i}" for i in range(313)]])
def test_objectnet_mapping(tmp_path: Path, names: list[str]) -> None:
    """A set with all of ObjectNet's 313 classes, with the mapping file of its release."""
    import json

    root = write_classification(tmp_path, "wds_objectnet_test", n=60, names=names)
    kept = [name for i, name in enumerate(names) if i % 3 == 0 or i < 12][:113]
    mapping = {name.capitalize(): f"{name} of ImageNet; another" for name in reversed(kept)}
    (root / "objectnet_to_imagenet_1k.json").write_text(json.dumps(mapping))
    test_set = open_found(FoundTask(TASKS["objectnet"], str(root)))
    assert list(test_set.classnames) == kept
    whole = open_found(FoundTask(extra_task("wds_objectnet_test", "zeroshot_classification", 313), str(root)))
    for mine, reference in zip(samples_of(test_set), samples_of(whole), strict=True):
        name = names[reference.label]
        assert mine.label == (kept.index(name) if name in kept else -1)
    assert {sample.label >= 0 for sample in samples_of(test_set)} == {True, False}
