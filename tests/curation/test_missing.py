"""Samples without a value: null, NaN, infinite, an embedding of zeros. No filter keeps them, each counts them, and what
is fitted is as if they were not there."""

import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

from tests.curation.tables import Columns, embeddings, halves, sphere, uids
from winnow.curation.algebra.funnel import TreeEvaluator
from winnow.curation.algebra.in_memory import fit
from winnow.curation.algebra.parse import parse
from winnow.curation.filters import FILTERS
from winnow.curation.filters.base import Filter
from winnow.curation.filters.basic import Basic
from winnow.curation.filters.clip_score import ClipScore
from winnow.curation.filters.exact_duplicates import ExactDuplicates
from winnow.curation.filters.image_based import ImageBased
from winnow.curation.filters.image_cluster import ImageCluster
from winnow.curation.filters.near_duplicates import NearDuplicates
from winnow.curation.filters.norm_sim import NormSim
from winnow.curation.filters.semdedup import SemDeDup
from winnow.infra.errors import WinnowError
from winnow.infra.params import params

N, BROKEN = 60, 8  # samples of the pool, of which the first lack a value
INF, NAN = math.inf, math.nan
VECTORS = ("clip.image", "clip.text")


def world() -> pa.Table:
    """A pool in which every filter keeps some samples and drops some."""
    rng = np.random.default_rng(0)
    image, text = sphere(rng, N, 6), sphere(rng, N, 6)
    image[1::4] = image[::4]  # duplicates
    words = rng.integers(2, 9, N)
    return pa.table(
        {
            "uid": uids(N),
            "text": [" ".join(["a red dog on the beach", "two words"][i % 3 == 0].split()) for i in range(N)],
            "original_width": rng.integers(150, 700, N),
            "original_height": rng.integers(150, 700, N),
            "caption.words": pa.array(words, pa.int32()),
            "caption.characters": pa.array(words * 4, pa.int32()),
            "language.code": [["en", "en", "de"][i % 3] for i in range(N)],
            "entity.in21k": [i % 2 == 0 for i in range(N)],
            "clip_b32_similarity_score": pa.array(rng.uniform(0.2, 0.4, N), pa.float32()),
            "clip.score": pa.array(rng.uniform(0.1, 0.4, N), pa.float32()),
            "aesthetic.score": pa.array(rng.uniform(1, 9, N), pa.float32()),
            "clip.image": embeddings(image),
            "clip.text": embeddings(text),
            "image_hash.phash": pa.array(rng.integers(0, 1 << 63, N)[np.arange(N) // 2 * 2], pa.uint64()),
            "content.sha256": [f"{i // 2:064x}" for i in range(N)],
        }
    )


# A filter for a pool of n samples, so that what a fraction keeps does not depend on samples without a value.
CASES: dict[str, Callable[[int], dict]] = {
    "basic": lambda n: {"basic": {}},
    "clip_score": lambda n: {"clip_score": {"keep": 20}},
    "cluster_balanced": lambda n: {"cluster_balanced": {"clusters": 3, "fraction": 20.5 / n}},
    "d2_pruning": lambda n: {"d2_pruning": {"keep": 20}},
    "decontaminate": lambda n: {"decontaminate": {"target": "t", "cosine": 0.99}},
    "dfn": lambda n: {"dfn": {"keep": 20}},
    "exact_duplicates": lambda n: {"exact_duplicates": {}},
    "image_based": lambda n: {"image_based": {"target": "t", "clusters": 8}},
    "image_cluster": lambda n: {"image_cluster": {"target": "t", "clusters": 8}},
    "laion2b": lambda n: {"laion2b": {}},
    "metaclip": lambda n: {"metaclip": {"t": 1}},
    "near_duplicates": lambda n: {"near_duplicates": {"radius": 2}},
    "near_duplicates by cosine": lambda n: {"near_duplicates": {"cosine": 0.99}},
    "neg_clip_loss": lambda n: {"neg_clip_loss": {"keep": 20}},
    "norm_sim": lambda n: {"norm_sim": {"target": "t", "keep": 20}},
    "random": lambda n: {"random": {"fraction": 0.5}},
    "score": lambda n: {"score": {"clip": 1.0, "aesthetic": 0.5, "keep": 20}},
    "semdedup": lambda n: {"semdedup": {"clusters": 3, "epsilon": 0.05}},
    "text_based": lambda n: {"text_based": {}},
}


def test_every_filter_has_a_case():
    assert {name.partition(" ")[0] for name in CASES} == set(FILTERS.names())


def without(table: pa.Table, column: str, kind: str) -> pa.Table | None:
    """The table whose first samples have no value in a column; None where its type cannot express that."""
    at, values = table.column_names.index(column), table[column].to_pylist()
    dtype = table.schema.field(at).type
    if kind != "null" and column in VECTORS:
        for i in range(BROKEN):
            values[i] = [*values[i][:2], {"nan": NAN, "inf": INF, "-inf": -INF}.get(kind, 0.0), *values[i][3:]]
            values[i] = [0.0] * 6 if kind == "zeros" else values[i]
    elif kind == "null" or (pa.types.is_floating(dtype) and kind != "zeros"):
        values[:BROKEN] = [None if kind == "null" else float(kind)] * BROKEN
    else:
        return None
    return table.set_column(at, column, pa.array(values, dtype))


def decide(tree, table: pa.Table, targets: dict) -> tuple[list[bool], int]:
    """What a tree with one filter keeps of a pool of three shards, and how many samples the filter has no value for."""
    (node,) = tree.filters()
    parts = [table.slice(0, BROKEN), table.slice(BROKEN, 20), table.slice(BROKEN + 20)]
    # A shard that lacks the column has nulls without a type.
    empty = [i for i, name in enumerate(parts[0].column_names) if parts[0][name].null_count == BROKEN]
    for i in empty:
        parts[0] = parts[0].set_column(i, parts[0].column_names[i], pa.nulls(BROKEN))
    view = Columns(*parts, targets=targets)
    evaluator = TreeEvaluator(tree, [node.fit(view)])
    masks = [evaluator.mask(batch) for batch in view.batches(node.columns())]
    return np.concatenate(masks).tolist(), next(evaluator.counts.leaves()).nan


@pytest.mark.parametrize("name", CASES)
def test_no_filter_keeps_or_uses_a_sample_without_a_value(name, tmp_path):
    (tmp_path / "entries.txt").write_text("red dog\nwords\nbeach\n")

    def tree(n: int) -> Filter:
        ((kind, given),) = CASES[name](n).items()
        return parse({kind: given | ({"metadata": str(tmp_path / "entries.txt")} if kind == "metaclip" else {})})

    table = world()
    images = table.slice(N - 6).select(["clip.image", "image_hash.phash"])
    targets = {"t": Columns(images)}
    node = tree(N)
    columns = node.numeric()
    assert columns or name == "random"
    rest, none = decide(tree(N - BROKEN), table.slice(BROKEN), targets)
    assert none == 0 and 0 < sum(rest) < N - BROKEN
    tried = 0
    whole = decide(node, table, targets)[0][BROKEN:]
    for column in columns:
        # It clusters all embeddings, also those of samples without a caption.
        kept = whole if name == "image_based" and column not in VECTORS else rest
        for kind in ("null", "nan", "inf", "-inf", "zeros"):
            if (broken := without(table, column, kind)) is None:
                continue
            tried += 1
            assert decide(node, broken, targets) == ([False] * BROKEN + kept, BROKEN), (column, kind)
            assert decide(~node, broken, targets) == ([False] * BROKEN + [not passes for passes in kept], BROKEN)
    assert tried >= len(columns)
    # What a target set lacks is ignored too.
    for column in {"image_hash.phash", "clip.image"} & {*node.target_columns()}:
        for kind in ("null", "nan", "inf", "zeros"):
            broken = without(table, column, kind)
            if broken is not None:
                more = Columns(broken.slice(0, BROKEN).select(images.column_names), images)
                assert decide(node, table, {"t": more}) == decide(node, table, targets), (column, kind)
                if name in ("image_cluster", "image_based"):
                    report = node.report(node.fit(Columns(table, targets={"t": more})))
                    assert report["targets without a value"] == BROKEN


def test_an_infinite_score_is_not_the_best_of_duplicates():
    table = pa.table(
        {
            "uid": uids(6),
            "content.sha256": ["a", "a", "b", "b", "c", "c"],
            "clip.image": embeddings(np.eye(3)[[0, 0, 1, 1, 2, 2]]),
            "clip.score": [INF, 0.5, NAN, 0.1, None, -INF],
        }
    )
    for node in (ExactDuplicates(score="clip.score"), NearDuplicates(cosine=0.9, score="clip.score")):
        state = node.fit(Columns(table))
        assert node.mask(table, state).tolist() == [False, True, False, True, True, False]


@params
class Everything(Filter):
    """Keeps what it is shown."""

    name: ClassVar[str] = "everything"

    def columns(self):
        return ("uid", "clip.score", "text")

    def mask(self, batch, state):
        return np.ones(batch.num_rows, dtype=bool)


def test_a_custom_filter_gets_no_sample_without_a_value_past():
    table = pa.table({"uid": uids(4), "clip.score": [0.5, NAN, INF, 0.1], "text": ["a", "b", "c", None]})
    assert fit(Everything(), table).mask(table).tolist() == [True, False, False, False]
    assert fit(~Everything(), table).mask(table).tolist() == [False] * 4


def test_trees_decide_by_three_valued_logic():
    """`not`, `all` and `any` against the truth tables of Kleene (1952), None for unknown."""
    values = [0.9, 0.1, None]
    rows = [(a, b) for a in values for b in values]
    table = pa.table({"clip.score": [a for a, _ in rows], "aesthetic.score": [b for _, b in rows]})
    one, other = ClipScore(threshold=0.5), parse({"score": {"aesthetic": 1, "threshold": 0.6}})

    def known(value):
        return None if value is None else value > 0.5

    def both(a, b):
        return False if a is False or b is False else None if a is None or b is None else True

    def opposite(a):
        return None if a is None else not a

    trees = {
        one & other: lambda a, b: both(a, b),
        one | other: lambda a, b: opposite(both(opposite(a), opposite(b))),
        ~one: lambda a, b: opposite(a),
        ~(one & other): lambda a, b: opposite(both(a, b)),
        ~(one | other): lambda a, b: both(opposite(a), opposite(b)),
        ~(~one | (one & other)): lambda a, b: both(a, opposite(both(a, b))),
    }
    for tree, rule in trees.items():
        found = fit(tree, table).mask(table)
        assert found.tolist() == [rule(known(a), known(b)) is True for a, b in rows], str(tree)
    evaluator = TreeEvaluator(~one, [one.fit(Columns(table))])
    assert evaluator.mask(table).sum() == 3 and evaluator.counts.nan == 3  # the funnel has the count at `not` too


def test_centroids_that_are_not_finite_are_refused(tmp_path):
    centroids = np.eye(3, 6, dtype=np.float32)
    centroids[1, 2] = NAN  # the largest of a row of products with a NaN in it is that NaN
    np.save(tmp_path / "c.npy", centroids)
    np.save(tmp_path / "t.npy", np.eye(2, 6, dtype=np.float32))
    node = ImageBased(target=str(tmp_path / "t.npy"), centroids=str(tmp_path / "c.npy"), features="clip.image")
    with pytest.raises(WinnowError, match=r"1 of 3 centroids are not finite.*"):
        node.fit(Columns(world()))


def test_target_arrays_without_a_value_add_nothing(tmp_path):
    good = halves(sphere(np.random.default_rng(1), 3, 6)).astype(np.float16)
    bad = np.stack([np.full(6, NAN), np.zeros(6), np.r_[INF, np.zeros(5)]]).astype(np.float16)
    np.save(tmp_path / "good.npy", good)
    np.save(tmp_path / "all.npy", np.concatenate([bad, good]))
    for make in (
        lambda name: NormSim(target=f"{tmp_path}/{name}.npy", threshold=0.6),
        lambda name: ImageBased(target=f"{tmp_path}/{name}.npy", clusters=8, features="clip.image"),
    ):
        assert decide(make("all"), world(), {}) == decide(make("good"), world(), {})


def test_embeddings_that_are_not_normalised_are_refused(tmp_path):
    table, raw = world(), 3 * sphere(np.random.default_rng(2), N, 6)
    at = table.column_names.index("clip.image")
    table = table.set_column(at, "own", embeddings(raw))
    target = Columns(pa.table({"own": embeddings(raw), "clip.image": embeddings(raw)}))
    for node in (
        SemDeDup(clusters=2, epsilon=0.1, column="own"),
        NearDuplicates(cosine=0.9, column="own"),
        ImageCluster(target="t", clusters=2, column="own"),
        NormSim(target="t", keep=3, column="own"),
    ):
        with pytest.raises(WinnowError, match=r'column "(own|clip.image)".* not L2-normalised \(norms 3 to 3\)'):
            node.fit(Columns(table, targets={"t": target}))
    np.save(tmp_path / "t.npy", raw)
    with pytest.raises(WinnowError, match=r"t.npy.* 60 of 60 embeddings are not L2-normalised"):
        NormSim(target=str(tmp_path / "t.npy"), keep=3).fit(Columns(world()))
    # The nearest centroid of a target does not depend on its norm, so DataComp's arrays are taken as they are.
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    np.save(tmp_path / "unit.npy", unit)
    nodes = [ImageBased(target=f"{tmp_path}/{name}.npy", clusters=9, features="clip.image") for name in ("t", "unit")]
    assert decide(nodes[0], world(), {}) == decide(nodes[1], world(), {})


def test_embeddings_as_lists_of_any_length(tmp_path):
    """pandas and pyarrow write lists without a fixed length."""
    vectors = halves(sphere(np.random.default_rng(3), 30, 6))
    fixed = pa.table({"uid": uids(30), "own": embeddings(vectors)})
    loose = pa.table({"uid": uids(30), "own": pa.array(vectors.tolist(), pa.list_(pa.float32()))})
    node = SemDeDup(clusters=2, epsilon=0.3, column="own")
    assert fit(node, loose).mask(loose).tolist() == fit(node, fixed).mask(fixed).tolist()
    ragged = pa.table({"uid": uids(30), "own": pa.array([[1.0] * (1 + i % 2) for i in range(30)])})
    with pytest.raises(WinnowError, match=r'column "own" has the type list<.*equally many'):
        fit(node, ragged)


def test_basic_counts_a_missing_language():
    table = world().set_column(6, "language.code", pa.array([None] * N, pa.string()))
    assert decide(Basic(), table, {}) == ([False] * N, N)
