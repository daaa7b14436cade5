"""Quality, safety and caption measures against their formulas; measures of other measures' columns."""

import itertools
import re
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tests.curation.tables import embeddings, sphere
from tests.drawing import write_pool
from tests.evaluate.sets import write_config
from winnow.curation.columns.table import View
from winnow.curation.measures.aesthetic import Aesthetic
from winnow.curation.measures.base import Samples, with_upstream
from winnow.curation.measures.caption_stats import CaptionStats
from winnow.curation.measures.clip import Clip
from winnow.curation.measures.heads import apply_head, read_head
from winnow.curation.measures.nsfw import Nsfw
from winnow.curation.measures.quality import Quality
from winnow.curation.measures.stage import MeasureStage
from winnow.curation.measures.watermark import Watermark
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io.arrow import as_matrix
from winnow.infra.params import build
from winnow.infra.pool.pool import Pool
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.infra.stages.stage import pending_units
from winnow.pipeline.graph import Graph
from winnow.pipeline.recipe.load import parse_recipe
from winnow.pretrain.encoder import encoder_digest, load_encoder


def samples(images):
    return Samples(pa.table({"uid": [""] * len(images)}), images)


def test_sharpness_and_entropy_by_their_definitions():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (17, 23, 3)).astype(np.uint8))
    grey = np.asarray(image.convert("L")).astype(int)
    laplacian = [
        grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x]
        for y in range(1, 16)
        for x in range(1, 22)
    ]
    fractions = [np.mean(grey == level) for level in range(256)]
    entropy = -sum(p * np.log2(p) for p in fractions if p)
    flat, thin = Image.new("RGB", (9, 9), (10, 200, 30)), Image.new("RGB", (2, 9))
    half = Image.fromarray(np.repeat([[0, 255]], 8, axis=0).astype(np.uint8).repeat(4, axis=1))
    table = Quality().compute(samples([image, flat, None, thin, half]))
    assert np.allclose(table["sharpness"].to_pylist()[:2], [np.var(laplacian), 0], rtol=1e-6)
    assert np.allclose(table["entropy"].to_pylist()[:2], [entropy, 0], rtol=1e-6)
    assert table["sharpness"].to_pylist()[2:4] == [None, None] and table["entropy"].to_pylist()[2:] == [None, 0, 1]
    blurred = image.resize((11, 8)).resize((23, 17))
    assert Quality().compute(samples([blurred]))["sharpness"][0].as_py() < np.var(laplacian)
    assert Quality().compute(samples([])).num_rows == 0


TEXTS = [
    "A Dog, 3 years old!",
    "IMG_1234.JPG",
    "DSC 00123",
    "photo.jpg of a dog",
    "p1020304",
    "2023-04-05_12-30.png",
    "",
    "   ",
    "日本語の文、１２３",
    "ÄÖÜ ß «quoted» — dashed",
    "tabs\tand\x1cseparators\u2003here",
    "price: $5 + 3% = ?",
    None,
]


def test_caption_statistics_by_their_definitions():
    table = CaptionStats().compute(Samples(pa.table({"text": TEXTS}), []))
    for row, text in zip(table.to_pylist(), TEXTS, strict=True):
        if text is None:
            assert set(row.values()) == {None}
            continue

        def fraction(prefix, text=text):
            return sum(unicodedata.category(c).startswith(prefix) for c in text) / max(len(text), 1)

        words = text.split()
        expected = [fraction("Nd"), fraction("P"), fraction("Lu"), sum(map(len, words)) / max(len(words), 1)]
        found = [row[name] for name in ("digits", "punctuation", "upper", "word_length")]
        assert np.allclose(found, expected, rtol=1e-6), text
    names = [text for text, is_name in zip(TEXTS, table["file_name"].to_pylist(), strict=True) if is_name]
    assert names == ["IMG_1234.JPG", "DSC 00123", "p1020304", "2023-04-05_12-30.png"]


def test_heads_linear_and_deep(tmp_path):
    rng = np.random.default_rng(1)
    vectors = sphere(rng, 20, 6).astype(np.float32)
    weight, bias = rng.normal(size=(1, 6)).astype(np.float32), np.float32([0.7])
    expected = vectors @ weight[0] + bias
    np.save(tmp_path / "bare.npy", weight[0])
    np.savez(tmp_path / "linear.npz", weight=weight, bias=bias)
    save_file({"weight": weight, "bias": bias}, tmp_path / "linear.safetensors")
    assert np.allclose(apply_head(str(tmp_path / "bare.npy"), vectors), expected - bias, atol=1e-6)
    for name in ("linear.npz", "linear.safetensors"):
        assert np.allclose(apply_head(str(tmp_path / name), vectors), expected, atol=1e-6)
        sigmoid = apply_head(str(tmp_path / name), vectors, sigmoid=True)
        assert np.allclose(sigmoid, 1 / (1 + np.exp(-expected)), atol=1e-6)
    # LAION's: layers.0, .2, .4, .6, .7 in that order; ten or more layers go by number, not by letter.
    sizes, numbers = [6, 5, 4, 3, 2, 1], [0, 2, 4, 6, 10]
    layers = {}
    x = wide = vectors
    for number, (inner, outer) in zip(numbers, itertools.pairwise(sizes), strict=True):
        w, b = rng.normal(size=(outer, inner)).astype(np.float32), rng.normal(size=outer).astype(np.float32)
        layers |= {f"layers.{number}.weight": w, f"layers.{number}.bias": b}
        x = x @ w.T + b
        wide = (wide if number == 0 else np.maximum(wide, 0)) @ w.T + b
    save_file(layers, tmp_path / "deep.safetensors")
    assert np.allclose(apply_head(str(tmp_path / "deep.safetensors"), vectors), x[:, 0], atol=1e-4)
    assert np.allclose(apply_head(str(tmp_path / "deep.safetensors"), vectors, relu=True), wide[:, 0], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "arrays", "says"),
    [
        ("two.npz", {"weight": np.ones((2, 4))}, "2 outputs"),
        ("broken.npz", {"weight": np.full((1, 4), np.nan)}, "not finite"),
        ("none.npz", {"kernel": np.ones((1, 4))}, "no array `weight`"),
        ("broken.npz", {"0.weight": np.ones((3, 4)), "1.weight": np.ones((1, 2))}, "do not fit"),
        ("biased.npz", {"weight": np.ones((1, 4)), "bias": np.ones(3)}, "do not fit"),
    ],
)
def test_wrong_heads_are_refused(name, arrays, says, tmp_path):
    np.savez(tmp_path / name, **arrays)
    with pytest.raises(WinnowError, match=re.escape(says)):
        read_head(str(tmp_path / name))


def test_other_files_are_refused_as_heads(tmp_path):
    for name, data in (("head.pth", b"x"), ("head.safetensors", b"not one"), ("head.npz", b"PK no")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WinnowError, match="head"):
            read_head(str(tmp_path / name))
    objects = np.empty(1, object)
    np.save(tmp_path / "objects.npy", objects, allow_pickle=True)
    with pytest.raises(WinnowError, match="cannot be read"):
        read_head(str(tmp_path / "objects.npy"))
    np.save(tmp_path / "wide.npy", np.ones(7))
    table = pa.table({"clip.image": embeddings(sphere(np.random.default_rng(2), 2, 4))})
    with pytest.raises(WinnowError, match="7 dimensions, these have 4"):
        Aesthetic(str(tmp_path / "wide.npy")).compute(Samples(table, []))


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("encoder"))


def measure(pool, measures, out):
    return execute(MeasureStage(pool, measures, str(out)), SerialExecutor())


def test_prompts_are_a_softmax_over_each_pair(small_pool, spec, tmp_path):
    clip = Clip(spec, encoder_digest(spec), device="cpu")
    local = Nsfw(yes=("bad", "worse"), no=("good", "better"), encoder=spec, digest=clip.digest)
    measure(small_pool, (local, clip, Watermark(encoder=spec, digest=clip.digest)), tmp_path)
    model = load_encoder(spec, device="cpu")
    yes, no = model.encode_texts(["bad", "worse"]), model.encode_texts(["good", "better"])
    view = View(Pool.open(small_pool), str(tmp_path))
    for batch in view.batches(["clip.image", "nsfw.score", "watermark.score"]):
        image = as_matrix(batch["clip.image"])[0].astype(np.float64)
        a, b = np.exp(model.logit_scale * image @ yes.T), np.exp(model.logit_scale * image @ no.T)
        assert np.allclose(batch["nsfw.score"].to_numpy(), (a / (a + b)).mean(axis=1), atol=1e-4)
        assert batch["watermark.score"].null_count == 0
    with pytest.raises(UsageError, match="make no pairs"):
        build(Nsfw, {"yes": ["bad"]}, "nsfw")


def test_a_derived_measure_reads_and_follows_the_other(small_pool, spec, tmp_path):
    np.save(tmp_path / "head.npy", np.arange(16) / 16)
    clip, head = Clip(spec, encoder_digest(spec), device="cpu"), Aesthetic(str(tmp_path / "head.npy"))
    with pytest.raises(UsageError, match='"aesthetic" reads "clip", which is not measured'):
        MeasureStage(small_pool, (head,), str(tmp_path / "columns")).plan()
    first = measure(small_pool, (head, clip), tmp_path / "columns")
    view = View(Pool.open(small_pool), str(tmp_path / "columns"))
    for batch in view.batches(["clip.image", "aesthetic.score"]):
        expected = as_matrix(batch["clip.image"])[0].astype(np.float32) @ (np.arange(16, dtype=np.float32) / 16)
        assert np.allclose(batch["aesthetic.score"].to_numpy(), expected, atol=1e-5)
    # Another head computes itself alone; another scorer computes both, next to the old columns.
    np.save(tmp_path / "other.npy", np.ones(16))
    stage = MeasureStage(small_pool, (Aesthetic(str(tmp_path / "other.npy")), clip), str(tmp_path / "columns"))
    units, done = pending_units(stage)
    assert {unit.runtime["measure"] for unit in units if unit.name not in done} == {"aesthetic"}
    execute(stage, SerialExecutor())
    moved = Clip(spec, "another digest", device="cpu")
    stage = MeasureStage(small_pool, (head, moved), str(tmp_path / "columns"))
    units, done = pending_units(stage)
    assert not done and stage.ids()["aesthetic"] != first.values["columns"]["aesthetic"]


def test_a_sample_without_embedding_has_no_score(tmp_path):
    np.save(tmp_path / "head.npy", np.ones(4))
    column = embeddings(sphere(np.random.default_rng(3), 3, 4), mask=[False, True, False])
    table = Aesthetic(str(tmp_path / "head.npy")).compute(Samples(pa.table({"clip.image": column}), []))
    assert [value is None for value in table["score"].to_pylist()] == [False, True, False]


RECIPE = """
pool: {folder}/shards
scorer: {{checkpoint: "{spec}"}}
measures: {{aesthetic: {{head: {folder}/head.npy}}}}
subsets:
  none: {{}}
  fair: {{score: {{aesthetic: 1.0, fraction: 0.5}}}}
  safe: {{score: {{nsfw: -1.0, fraction: 0.5}}}}
  clean: {{decontaminate: {{target: {folder}/eval}}}}
"""


def test_a_recipe_measures_what_its_filters_read(spec, tmp_path):
    write_pool(tmp_path / "shards", shards=2, per_shard=6)
    write_pool(tmp_path / "eval" / "wds_x_test" / "test", shards=1, per_shard=2, parquet=False, first=3)
    np.save(tmp_path / "head.npy", np.ones(16))
    text = RECIPE.format(folder=tmp_path, spec=spec)
    recipe = parse_recipe(text, "r.yaml", [])
    assert list(recipe.pool_measures()) == ["aesthetic", "clip", "image_hash", "nsfw"]
    assert list(recipe.target_measures(f"{tmp_path}/eval")) == ["image_hash"]
    from winnow.infra.stages.progress import RunLog

    graph = Graph(recipe, str(tmp_path / "out"))
    manifests = graph.run(SerialExecutor(), RunLog(str(tmp_path / "out"), stream=None), until="curate")
    sizes = manifests["curate"].values["subsets"]
    assert sizes["none"] == 12 and sizes["fair"] == sizes["safe"] == 7 and sizes["clean"] <= 10
    with pytest.raises(UsageError, match='aesthetic needs "head"'):
        parse_recipe(text.replace("measures:", "max_skipped: 0.1 #"), "r.yaml", [])
    with pytest.raises(UsageError, match="no scorer"):
        parse_recipe(text.replace("scorer:", "max_skipped: 0.1 #"), "r.yaml", [])


def test_upstream_measures_are_included():
    assert list(with_upstream(["nsfw", "caption"])) == ["caption", "clip", "nsfw"]
