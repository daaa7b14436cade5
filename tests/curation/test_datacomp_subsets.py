"""DataComp's seven subsets of a folder in its layout: files byte for byte as its rules, written plainly, give them."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from winnow.curation.algebra.parse import parse
from winnow.curation.curate import CurateStage, MeasuredPool
from winnow.curation.measures.caption import Caption
from winnow.curation.measures.entity import Entity
from winnow.curation.measures.language import Language, _load
from winnow.curation.measures.stage import MeasureStage
from winnow.curation.measures.wordnet import WordNet
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute

SENTENCES = [
    "the children are playing with a dog in the garden",
    "a photo of the old church behind our house",
    "this is what we had for dinner last night",
    "three wolves\nwere seen near the river",
    "Die Kinder spielen mit dem dog im Garten hinter dem Haus",
    "les enfants jouent dans le jardin derrière la maison",
    "well done",
    "hello\n",
    "dog",
]
LISTED = {100, 120}  # dog, wolf
N, PARTS, D = 240, 3, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_wordnet):
    """metadata/ in DataComp's layout, columns/ with the measures, centroids and targets."""
    folder, rng = tmp_path_factory.mktemp("datacomp"), np.random.default_rng(7)
    vectors = rng.normal(size=(N, D))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    table = pa.table(
        {
            "uid": [rng.bytes(16).hex() for _ in range(N)],
            "url": ["a"] * N,
            "text": rng.choice(SENTENCES, N).tolist(),
            "original_width": rng.choice([199, 200, 300, 601], N),
            "original_height": rng.choice([199, 200, 601], N),
            "clip_b32_similarity_score": np.round(rng.normal(0.28, 0.03, N), 2).astype(np.float32),
            "clip_l14_similarity_score": np.round(rng.normal(0.25, 0.03, N), 2).astype(np.float32),
        }
    )
    (folder / "metadata").mkdir()
    for part in range(PARTS):
        rows = np.arange(N)[part::PARTS]
        stem = folder / "metadata" / f"{7919 * (PARTS - part):032x}"
        pq.write_table(table.take(rows), f"{stem}.parquet")
        np.savez(f"{stem}.npz", **dict.fromkeys(("l14_img", "l14_txt", "b32_img", "b32_txt"), vectors[rows]))
    np.save(folder / "centroids.npy", rng.normal(size=(30, D)).astype(np.float32))
    np.save(folder / "target.npy", vectors[:12].astype(np.float32))
    (folder / "synsets.txt").write_text("".join(f"n{offset:08d}\n" for offset in LISTED))
    measures = (Language(), Caption(), Entity(str(tiny_wordnet), str(folder / "synsets.txt")))
    execute(MeasureStage(str(folder / "metadata"), measures, str(folder / "columns")), SerialExecutor())
    return folder, table, vectors, WordNet(str(tiny_wordnet))


def plainly(folder, table, vectors, dictionary):
    """For each of DataComp's baselines, whether it keeps each row."""
    rows = table.to_pylist()
    model = _load(None)
    english = [model.predict(row["text"].replace("\n", " "))[0][0] == "__label__en" for row in rows]
    scores = table["clip_l14_similarity_score"].to_numpy()
    threshold = -np.sort(-scores)[int(N * 0.3)]
    centroids, target = np.load(folder / "centroids.npy"), np.load(folder / "target.npy")
    wanted = {int(np.argmax(centroids @ vector)) for vector in target}

    def basic(i):
        text, sides = rows[i]["text"], (rows[i]["original_width"], rows[i]["original_height"])
        shape = min(sides) >= 200 and max(sides) / min(sides) <= 3
        return english[i] and len(text.split()) > 2 and len(text) > 5 and shape

    def text_based(i):
        return english[i] and any(dictionary.first(word) in LISTED for word in rows[i]["text"].split())

    def image_based(i):
        text = rows[i]["text"]
        tokens = len(text.split()) + text.count("\n")  # these captions have no other separators
        nearest = int(np.argmax(centroids @ vectors[i].astype(np.float32)))
        return english[i] and tokens > 1 and len(text) > 5 and nearest in wanted

    rules = {
        "none": lambda i: True,
        "basic": basic,
        "laion2b": lambda i: english[i] and rows[i]["clip_b32_similarity_score"] >= np.float32(0.28),
        "text_based": text_based,
        "image_based": image_based,
        "clip_score": lambda i: scores[i] >= threshold,
        "both": lambda i: image_based(i) and scores[i] >= threshold,
    }
    return {name: [i for i in range(N) if rule(i)] for name, rule in rules.items()}


def test_the_seven_baselines_byte_for_byte(folder):
    path, table, vectors, dictionary = folder
    clip = {"clip_score": {"model": "l14", "fraction": 0.3}}
    images = {"image_based": {"centroids": f"{path}/centroids.npy", "target": f"{path}/target.npy"}}
    trees = {
        "none": {},
        "basic": {"basic": {}},
        "laion2b": {"laion2b": {}},
        "text_based": {"text_based": {}},
        "image_based": images,
        "clip_score": clip,
        "both": {"all": [clip, images]},
    }
    out = path / "subsets"
    source = MeasuredPool(str(path / "metadata"), str(path / "columns"))
    execute(CurateStage(source, tuple((name, parse(tree)) for name, tree in trees.items()), str(out)), SerialExecutor())
    uids = table["uid"].to_pylist()
    for name, kept in plainly(path, table, vectors, dictionary).items():
        assert kept and (len(kept) < N or name == "none")
        pairs = np.array([(int(uids[i][:16], 16), int(uids[i][16:], 16)) for i in kept], np.dtype("u8,u8"))
        pairs.sort()
        file = io.BytesIO()
        np.save(file, pairs)
        assert (out / name / "subset.npy").read_bytes() == file.getvalue(), name
