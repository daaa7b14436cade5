"""DataComp's text-based, LAION-2B and image-based filters against its rules written plainly, one sample at a time."""

import math

import numpy as np
import pyarrow as pa
import pytest

from tests.curation.tables import Columns, embeddings, sphere
from winnow.curation.algebra.funnel import TreeEvaluator
from winnow.curation.algebra.parse import fingerprint, parse
from winnow.curation.filters.clip_score import ClipScore
from winnow.curation.filters.image_based import ImageBased, tokens
from winnow.curation.filters.laion2b import Laion2b
from winnow.curation.filters.text_based import TextBased
from winnow.curation.measures.base import Samples
from winnow.curation.measures.language import Language, _load
from winnow.infra.errors import WinnowError
from winnow.infra.params import ParameterError, build

CAPTIONS = [
    "a dog on the beach",
    "oneword",
    "oneword\n",  # the newline is a token
    "\n\n\n\n\n\n",
    "a b",
    "a bcd",
    "a bcde",
    "      ",
    "",
    "no\u00a0break",  # no separator of fastText's
    "nul\x00byte",
    "unit\x1fseparator",
    "\ttabs\vand\ffeeds\r",
    "日本 語の文字です",
]


def fasttext_tokens(text):
    """fastText's Dictionary::readWord, until the end of the text."""
    words, word = [], b""
    for byte in text.encode():
        if byte in b" \n\r\t\v\f\0":
            if word:
                words.append(word)
            word = b""
            if byte == ord("\n"):
                words.append(b"</s>")
        else:
            word += bytes([byte])
    return words + ([word] if word else [])


def test_tokens_are_fasttexts():
    counts = tokens(pa.chunked_array([pa.array([*CAPTIONS, None])]))
    assert counts.to_pylist() == [*(len(fasttext_tokens(text)) for text in CAPTIONS), None]
    fasttext = pytest.importorskip("fasttext")
    if hasattr(fasttext, "tokenize"):
        assert counts.to_pylist()[:-1] == [len(fasttext.tokenize(text)) for text in CAPTIONS]


def test_text_based_is_datacomps():
    codes, flags = ["en", "de", None], [True, False, None]
    rows = [{"language.code": code, "entity.in21k": flag} for code in codes for flag in flags]
    table = pa.Table.from_pylist(rows, schema=pa.schema([("language.code", pa.string()), ("entity.in21k", pa.bool_())]))
    expected = [row["language.code"] == "en" and row["entity.in21k"] is True for row in rows]
    assert TextBased().mask(table, {}).tolist() == expected
    anything = TextBased(language=None)
    assert anything.columns() == ("entity.in21k",)
    assert anything.mask(table, {}).tolist() == [row["entity.in21k"] is True for row in rows]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_laion2b_is_datacomps(kind):
    near = np.array([0.28, np.nextafter(kind(0.28), kind(0)), np.nextafter(kind(0.28), kind(1))], dtype=kind)
    scores = np.concatenate([near, np.array([0.1, 0.9, np.nan], dtype=kind)])
    table = pa.table(
        {
            "clip_b32_similarity_score": pa.array([*scores.tolist(), None] * 3, pa.from_numpy_dtype(kind)),
            "language.code": ["en"] * 7 + ["fr"] * 7 + [None] * 7,
        }
    )
    (here,) = np.nonzero(np.concatenate([scores >= 0.28, [False]]))  # as pandas compares, the number in its precision
    assert np.flatnonzero(Laion2b().mask(table, {})).tolist() == here.tolist() == [0, 2, 4]
    with pytest.raises(ParameterError, match="threshold must be at most 1, not 28"):
        build(Laion2b, {"threshold": 28}, "laion2b")


@pytest.fixture
def pool(tmp_path):
    """A view of DataComp's columns in two shards, with centroids and targets as files."""
    rng = np.random.default_rng(5)
    n = 600
    table = pa.table(
        {
            "text": rng.choice(CAPTIONS, n).tolist(),
            "language.code": rng.choice(["en", "en", "de"], n).tolist(),
            "clip_l14_similarity_score": np.round(rng.normal(size=n), 2),
            "l14_img": embeddings(sphere(rng, n, 8)),
        }
    )
    np.save(tmp_path / "centroids.npy", rng.normal(size=(40, 8)).astype(np.float32))  # of unequal lengths
    np.save(tmp_path / "target.npy", sphere(rng, 15, 8).astype(np.float16))
    return Columns(table.slice(0, 250), table.slice(250)), table, tmp_path


def datacomp_image_based(table, centroids, targets):
    """DataComp's rule, one sample at a time."""
    wanted = {int(np.argmax([float(c @ t) for c in centroids])) for t in targets}
    kept = []
    for row in table.to_pylist():
        vector = np.array(row["l14_img"], dtype=np.float32)
        kept.append(
            row["language.code"] == "en"
            and len(fasttext_tokens(row["text"])) > 1
            and len(row["text"]) > 5
            and int(np.argmax([float(c @ vector) for c in centroids])) in wanted
        )
    return kept


def evaluator(node, view):
    made = TreeEvaluator(node, [item.fit(view) for item in node.filters()])
    return [kept for table in view.tables for kept in made.mask(table).tolist()]


def test_image_based_is_datacomps(pool):
    view, table, folder = pool
    centroids, target = (np.load(folder / name).astype(np.float32) for name in ("centroids.npy", "target.npy"))
    expected = datacomp_image_based(table, centroids, target)
    assert 20 < sum(expected) < 300
    form = {"image_based": {"centroids": f"{folder}/centroids.npy", "target": f"{folder}/target.npy"}}
    assert evaluator(parse(form), view) == expected
    # several arrays are one target
    for i, part in enumerate((target[:4], target[4:])):
        np.save(folder / f"part{i}.npy", part)
    parts = ImageBased(
        target=(f"{folder}/part0.npy", f"{folder}/part1.npy"), centroids=form["image_based"]["centroids"]
    )
    assert evaluator(parts, view) == expected


@pytest.mark.parametrize("fraction", [0.3, 0.05])
def test_image_based_and_clip_score_give_datacomps_intersection(pool, fraction):
    view, table, folder = pool
    centroids, target = (np.load(folder / name).astype(np.float32) for name in ("centroids.npy", "target.npy"))
    scores = table["clip_l14_similarity_score"].to_pylist()
    threshold = sorted(scores, reverse=True)[
        int(len(scores) * fraction)
    ]  # of the whole pool, not of what the images leave
    expected = [
        kept and score >= threshold
        for kept, score in zip(datacomp_image_based(table, centroids, target), scores, strict=True)
    ]
    images = ImageBased(target=f"{folder}/target.npy", centroids=f"{folder}/centroids.npy")
    assert sum(expected) and evaluator(ClipScore(fraction=fraction, model="l14") & images, view) == expected
    assert evaluator(images & ClipScore(fraction=fraction, model="l14"), view) == expected


def test_image_based_clusters_the_pool_and_embeds_a_target_folder(pool):
    _, table, _ = pool
    rng = np.random.default_rng(6)
    wanted = sphere(rng, 4, 8).astype(np.float16)
    table = table.rename_columns(["text", "language.code", "clip_l14_similarity_score", "clip.image"])
    target = Columns(pa.table({"clip.image": embeddings(wanted)}))
    view = Columns(table.slice(0, 250), table.slice(250), targets={"images": target})
    node = ImageBased(target="images", clusters=12)
    assert node.targets() == ("images",) and "clip.image" in node.columns()
    state = node.fit(view)
    assert state["centroids"].shape == (12, 8)
    plain = table.rename_columns(["text", "language.code", "score", "l14_img"])
    expected = datacomp_image_based(plain, state["centroids"], wanted.astype(np.float32))
    assert node.mask(table, state).tolist() == expected and any(expected)


def test_samples_without_a_usable_embedding_or_caption_never_pass(pool):
    view, _, folder = pool
    node = ImageBased(target=f"{folder}/target.npy", centroids=f"{folder}/target.npy")  # every centroid is hit
    state = node.fit(view)
    vectors = np.ones((4, 8), np.float16)
    vectors[1, 3] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 8, mask=pa.array([False, False, True, False]))
    texts = pa.array(["a caption", "a caption", "a caption", None])
    table = pa.table({"text": texts, "language.code": ["en"] * 4, "l14_img": column})
    assert node.mask(table, state).tolist() == [True, False, False, False]
    assert node.mask(table.slice(0, 0), state).tolist() == []


def test_default_columns_of_embeddings():
    assert ImageBased(target="t.npy").columns() == ("text", "l14_img", "language.code")
    assert ImageBased(target="folder").columns() == ("text", "clip.image", "language.code")
    assert ImageBased(target="t.npy", features="b32_img", language=None).columns() == ("text", "b32_img")
    assert ImageBased(target=("a", "b")).targets() == ("a", "b") and not ImageBased(target=("a.npy",)).targets()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"target": "{}/target.npy", "clusters": 601}, "600 samples cannot make 601 clusters.*at most 600"),
        ({"target": "{}/empty.npy", "centroids": "{}/centroids.npy"}, "target set is empty"),
        ({"target": "{}/target.npy", "centroids": "{}/empty.npy"}, "holds no centroid"),
        ({"target": "{}/wide.npy", "centroids": "{}/centroids.npy"}, "l14_img has 8, the centroids .* has 8, .* has 9"),
        ({"target": "{}/target.npy", "centroids": "{}/wide.npy"}, "centroids .* has 9.*from one model"),
        ({"target": "{}/wide.npy", "clusters": 5}, "differ in dimension"),
        ({"target": "{}/nan.npy", "clusters": 5}, "no usable image"),
        ({"target": "{}/none.npy", "clusters": 5}, "no such file"),
        ({"target": "{}/flat.npy", "clusters": 5}, r"float64 of shape \[8\], not a matrix"),
        ({"target": "{}/text.npy", "clusters": 5}, "is not a .npy file"),
        ({"target": "{}/objects.npy", "clusters": 5}, "holds object"),
        ({"target": "{}/cut.npy", "clusters": 5}, "cannot be read as an array"),
    ],
)
def test_image_based_refuses(pool, params, words):
    view, _, folder = pool
    np.save(folder / "empty.npy", np.empty((0, 8), np.float32))
    np.save(folder / "wide.npy", np.ones((3, 9), np.float32))
    np.save(folder / "nan.npy", np.full((3, 8), np.nan, np.float32))
    np.save(folder / "flat.npy", np.ones(8))
    np.save(folder / "objects.npy", np.array([[{}]]), allow_pickle=True)
    (folder / "text.npy").write_text("centroids")
    (folder / "cut.npy").write_bytes((folder / "target.npy").read_bytes()[:-5])
    params = {key: value.format(folder) if isinstance(value, str) else value for key, value in params.items()}
    with pytest.raises(WinnowError, match=words):
        ImageBased(**params).fit(view)


def test_a_target_folder_without_images_or_of_another_model_is_refused(pool):
    _, table, _ = pool
    table = table.rename_columns(["text", "language.code", "score", "clip.image"])
    for target, words in [
        (pa.table({"clip.image": embeddings(np.empty((0, 8)))}), "target set is empty"),
        (pa.table({"clip.image": embeddings(np.eye(2, 5))}), "clip.image has 8, the target t has 5"),
    ]:
        view = Columns(table, targets={"t": Columns(target)})
        with pytest.raises(WinnowError, match=words):
            ImageBased(target="t", clusters=5).fit(view)


def test_arrays_are_identified_by_content(pool):
    _, _, folder = pool
    for name in ("target", "centroids"):
        (folder / f"copy-{name}.npy").write_bytes((folder / f"{name}.npy").read_bytes())
    node = ImageBased(target=f"{folder}/target.npy", centroids=f"{folder}/centroids.npy")
    copy = ImageBased(target=f"{folder}/copy-target.npy", centroids=f"{folder}/copy-centroids.npy")
    other = ImageBased(target=f"{folder}/target.npy", centroids=f"{folder}/target.npy")
    assert fingerprint(node) == fingerprint(copy) != fingerprint(other)
    several, others = (ImageBased(target=(node.target, name)) for name in (copy.target, node.centroids))
    assert fingerprint(several) == fingerprint(ImageBased(target=(copy.target, node.target))) != fingerprint(others)


@pytest.mark.parametrize(
    "params", [{"target": ""}, {"target": []}, {"target": "t", "clusters": 0}, {"target": ["a.npy", "folder"]}]
)
def test_wrong_parameters_of_image_based(params):
    with pytest.raises(ParameterError):
        build(ImageBased, params, "image_based")
    with pytest.raises(ParameterError, match=r"not a \.npy file"):
        build(ImageBased, {"target": "t.npy", "centroids": "centroids.pt"}, "image_based")


def test_languages_are_the_first_labels_of_the_model():
    texts = [*CAPTIONS, "Die Kinder spielen\nim Garten.", None]
    table = Language().compute(Samples(pa.table({"text": pa.array(texts)}), []))
    model = _load(None)
    for text, code, probability in zip(texts, *(column.to_pylist() for column in table.columns), strict=True):
        if text is None:
            assert code is None and probability is None
        else:
            labels, scores = model.predict(text.replace("\n", " "))
            assert code == labels[0].replace("__label__", "") and math.isclose(probability, scores[0], rel_tol=1e-6)
    assert Language().compute(Samples(pa.table({"text": pa.array([], pa.string())}), [])).num_rows == 0


def test_cld3_equals_its_package():
    gcld3 = pytest.importorskip("gcld3", reason="gcld3 is not installed")
    identifier = gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000)
    texts = [text for text in CAPTIONS if "\x00" not in text]
    table = Language(identifier="gcld3").compute(Samples(pa.table({"text": pa.array([*texts, None])}), []))
    expected = [identifier.FindLanguage(text=text.replace("\n", " ")).language for text in texts]
    assert table["code"].to_pylist() == [*expected, None]
    assert Language(identifier="gcld3").id != Language().id


def test_unknown_identifiers_are_refused():
    import importlib.util

    with pytest.raises(ParameterError, match='Did you mean "gcld3"'):
        build(Language, {"identifier": "cld3"}, "language")
    with pytest.raises(ParameterError, match="fastText model"):
        build(Language, {"path": "lid.176.bin", "identifier": "gcld3"}, "language")
    if importlib.util.find_spec("gcld3") is None:
        with pytest.raises(WinnowError, match=r"gcld3 is not installed.*protobuf"):
            Language(identifier="gcld3").params()
    with pytest.raises(WinnowError, match="no such file"):
        Language(path="nowhere.bin").params()
