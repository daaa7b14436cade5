"""Duplicates and leakage against comparing everything with everything."""

import hashlib
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.curation.tables import Columns, embeddings, kept, sphere, uids
from tests.drawing import sample, write_tar
from winnow.curation.algebra.parse import parse
from winnow.curation.curate import CurateStage, MeasuredPool
from winnow.curation.filters.decontaminate import Decontaminate, task_name
from winnow.curation.filters.exact_duplicates import ExactDuplicates
from winnow.curation.filters.near_duplicates import NearDuplicates
from winnow.curation.measures.base import Samples
from winnow.curation.measures.content import Content
from winnow.curation.measures.image_hash import ImageHash, phash
from winnow.curation.measures.stage import MeasureStage
from winnow.curation.search.hamming import _masks, hamming_pairs
from winnow.curation.search.neighbours import components, first_of_groups
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.params import ParameterError, build
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.layouts import find_shards
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import encode_uids, load_subset
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute


def near_hashes(rng, n, families=30, flips=6):
    """Hashes in families that differ in a few bits, some of them equal."""
    base = rng.integers(0, 1 << 63, families, dtype=np.uint64)[rng.integers(0, families, n)]
    for i in range(n):
        for bit in rng.choice(64, rng.integers(0, flips), replace=False):
            base[i] ^= np.uint64(1) << np.uint64(bit)
    return base


def distance(a, b):
    return (int(a) ^ int(b)).bit_count()


@pytest.mark.parametrize("radius", [0, 1, 3, 4, 7, 10, 16])
def test_hamming_pairs_against_brute_force(radius, monkeypatch):
    rng = np.random.default_rng(radius)
    a, b = near_hashes(rng, 150), near_hashes(rng, 60)
    b[:20] = a[:20]
    local = [(i, j) for i in range(150) for j in range(i + 1, 150) if distance(a[i], a[j]) <= radius]
    cross = [(i, j) for i in range(150) for j in range(60) if distance(a[i], b[j]) <= radius]
    assert list(zip(*(x.tolist() for x in hamming_pairs(a, None, radius)), strict=True)) == local
    assert list(zip(*(x.tolist() for x in hamming_pairs(a, b, radius)), strict=True)) == cross
    # As it would be cut up for a large pool, where tables are small; and in parts.
    masks = _masks(10**6, 10**6, radius)
    monkeypatch.setattr("winnow.curation.search.hamming._masks", lambda *args: masks)
    monkeypatch.setattr("winnow.curation.search.hamming._PART", 50)
    assert list(zip(*(x.tolist() for x in hamming_pairs(a, None, radius)), strict=True)) == local
    assert list(zip(*(x.tolist() for x in hamming_pairs(a, b, radius)), strict=True)) == cross


def test_no_hashes_give_no_pairs():
    none = np.empty(0, np.uint64)
    assert [x.tolist() for x in hamming_pairs(none, None, 4)] == [[], []]
    assert [x.tolist() for x in hamming_pairs(np.zeros(2, np.uint64), none, 4)] == [[], []]


def plain_groups(n, pairs, order, join):
    near = {i: set() for i in range(n)}
    for i, j in pairs:
        near[i].add(j)
        near[j].add(i)
    stays = set()
    if join == "greedy":
        for i in order:
            if not near[i] & stays:
                stays.add(i)
    else:
        seen = set()
        for i in order:
            if i in seen:
                continue
            stays.add(i)
            walk = [i]
            while walk:
                node = walk.pop()
                if node not in seen:
                    seen.add(node)
                    walk += near[node]
    return [i in stays for i in range(n)]


@pytest.mark.parametrize("join", ["greedy", "components"])
def test_groups_against_a_plain_graph_search(join):
    rng = np.random.default_rng(1)
    for edges in (0, 5, 40, 120):
        i = rng.integers(0, 60, edges)
        j = (i + rng.integers(1, 59, edges)) % 60
        order = rng.permutation(60)
        rank = np.empty(60, int)
        rank[order] = np.arange(60)
        pairs = list(zip(i.tolist(), j.tolist(), strict=True))
        assert first_of_groups(i, j, rank, join).tolist() == plain_groups(60, pairs, order.tolist(), join)


def test_a_long_chain_is_one_component():
    order = np.random.default_rng(2).permutation(5000)
    assert not components(5000, order[:-1], order[1:]).any()


@pytest.mark.parametrize("join", ["greedy", "components"])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("by", ["radius", "cosine"])
def test_near_duplicates_against_brute_force(join, scored, by):
    rng = np.random.default_rng(3)
    n = 160
    hashes = near_hashes(rng, n)
    base = sphere(rng, 20, 8)[rng.integers(0, 20, n)] + 0.12 * rng.normal(size=(n, 8))
    vectors = np.asarray(base / np.linalg.norm(base, axis=1, keepdims=True), np.float16)
    scores = np.round(rng.normal(size=n), 1)
    scores[:10] = np.nan
    table = pa.table(
        {
            "uid": uids(n),
            "image_hash.phash": pa.array(hashes, pa.uint64()),
            "clip.image": embeddings(vectors),
            "clip.score": scores,
        }
    )
    cosine = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    near = (lambda i, j: distance(hashes[i], hashes[j]) <= 5) if by == "radius" else lambda i, j: cosine[i, j] >= 0.93
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n) if near(i, j)]
    order = list(range(n))
    if scored:
        order.sort(key=lambda i: (np.isnan(scores[i]), -scores[i], i))
    node = NearDuplicates(
        **({"radius": 5} if by == "radius" else {"cosine": 0.93}), score="clip.score" if scored else None, join=join
    )
    expected = plain_groups(n, pairs, order, join)
    assert kept(node, table).tolist() == expected and 20 < sum(expected) < n - 20
    assert node.numeric() == (("image_hash.phash",) if by == "radius" else ("clip.image",))


def test_near_duplicates_drop_samples_without_a_hash():
    table = pa.table({"uid": uids(4), "image_hash.phash": pa.array([7, None, 7, (1 << 64) - 1], pa.uint64())})
    assert kept(NearDuplicates(radius=2), table).tolist() == [True, False, False, True]


def test_exact_duplicates_keep_the_first_or_the_best():
    table = pa.table(
        {
            "uid": uids(8),
            "content.sha256": ["a", "b", "a", "c", None, "b", "a", None],
            "text": ["x", "x", "y", "x", "x", "x", "x", "y"],
            "clip.score": [0.1, 0.5, 0.9, None, 0.3, 0.5, 0.9, 0.2],
        }
    )
    first = [True, True, False, True, False, False, False, False]
    assert kept(ExactDuplicates(), table).tolist() == first
    best = [False, True, True, True, False, False, False, False]
    assert kept(ExactDuplicates(score="clip.score"), table).tolist() == best
    both = [True, True, True, True, False, False, False, False]
    assert kept(ExactDuplicates(by=("content.sha256", "text")), table).tolist() == both
    assert kept(ExactDuplicates(by="text"), table).tolist() == [True, False, True, False, False, False, False, False]


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (NearDuplicates, {}),
        (NearDuplicates, {"radius": 4, "cosine": 0.9}),
        (NearDuplicates, {"radius": 17}),
        (NearDuplicates, {"cosine": 1.2}),
        (NearDuplicates, {"radius": 4, "join": "all"}),
        (NearDuplicates, {"radius": 4, "of": "all"}),
        (ExactDuplicates, {"by": ()}),
        (Decontaminate, {"target": ""}),
        (Decontaminate, {"target": "t", "radius": None}),
    ],
)
def test_refused(kind, params):
    with pytest.raises(ParameterError):
        build(kind, params, kind.name)


def plain_phash(image):
    """DCT-II by its definition, over the image scaled as the docstring says."""
    luma = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    n = np.arange(32)
    low = [
        sum(luma[y] @ np.cos(np.pi * v * (2 * n + 1) / 64) * np.cos(np.pi * u * (2 * y + 1) / 64) for y in range(32))
        for u in range(8)
        for v in range(8)
    ]
    bits = "".join("1" if value > np.median(low) else "0" for value in low)
    return int(bits, 2)


def draw_images(seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(4):
        coarse = rng.integers(0, 255, (6, 7, 3)).astype(np.uint8)
        found.append(Image.fromarray(coarse).resize((140, 120), Image.Resampling.BICUBIC))
    return found


def test_phash_is_the_dct_hash_and_tolerates_small_changes():
    images = draw_images()
    table = ImageHash().compute(Samples(pa.table({"uid": uids(5)}), [*images, None]))
    values = table["phash"].to_pylist()
    assert values[:4] == [plain_phash(image) for image in images] and values[4] is None
    changed = [image.resize((70, 61)).point(lambda value: min(255, int(value * 1.1))) for image in images]
    again = ImageHash().compute(Samples(pa.table({"uid": uids(4)}), changed))["phash"].to_pylist()
    assert max(distance(a, b) for a, b in zip(values, again, strict=False)) <= 6
    assert min(distance(values[i], values[j]) for i in range(4) for j in range(i)) >= 16
    assert phash(np.zeros((1, 32, 32))).tolist() == [0]


def test_content_is_the_sha256_of_the_file():
    table = Content().compute(Samples(pa.table({"uid": uids(2)}), [], [b"one", b"two"]))
    assert table["sha256"].to_pylist() == [hashlib.sha256(b"one").hexdigest(), hashlib.sha256(b"two").hexdigest()]


def test_decontaminate_counts_per_task_against_brute_force():
    rng = np.random.default_rng(4)
    pool_hashes, hashes = near_hashes(rng, 120), near_hashes(np.random.default_rng(4), 50)
    hashes[25:] = rng.integers(0, 1 << 63, 25, dtype=np.uint64)
    vectors = np.asarray(sphere(rng, 120, 6), np.float16)
    aims = np.asarray(sphere(rng, 50, 6), np.float16)
    names = ["wds_birds_test/test/0", "wds_birds_test/test/1", "wds_vtab-dogs_test/test/0"]
    cuts = [(0, 10), (10, 30), (30, 50)]
    target = Columns(
        *(
            pa.table({"image_hash.phash": pa.array(hashes[a:b], pa.uint64()), "clip.image": embeddings(aims[a:b])})
            for a, b in cuts
        ),
        names=names,
    )
    table = pa.table(
        {
            "uid": uids(120),
            "image_hash.phash": pa.array(pool_hashes, pa.uint64()),
            "clip.image": embeddings(vectors),
        }
    )
    task = ["birds"] * 30 + ["vtab-dogs"] * 20
    node = Decontaminate(target="evalsets", radius=3, cosine=0.9)
    view = Columns(table.slice(0, 50), table.slice(50), targets={"evalsets": target})
    state = node.fit(view)
    near = [
        {
            m
            for m in range(50)
            if distance(pool_hashes[i], hashes[m]) <= 3
            or vectors[i].astype(np.float64) @ aims[m].astype(np.float64) >= 0.9
        }
        for i in range(120)
    ]
    assert node.mask(table, state).tolist() == [not found for found in near]
    assert 0 < sum(bool(found) for found in near) < 120
    expected = {
        name: {
            "images": task.count(name),
            "near_samples": sum(any(task[m] == name for m in found) for found in near),
            "leaked_images": len({m for found in near for m in found if task[m] == name}),
        }
        for name in ("birds", "vtab-dogs")
    }
    assert node.report(state) == {"tasks": expected}


def test_task_names_of_shards():
    assert task_name("wds_imagenet1k_test/test/0", "evalsets") == "imagenet1k"
    assert task_name("test/0", "wds_vtab-pets_test") == "vtab-pets"
    assert task_name("00001", "my-images") == "my-images"


def test_evaluation_sets_are_found_as_shards(tmp_path):
    for name in ("wds_a_test/test/0", "wds_a_test/test/1", "wds_a_test/train/0", "wds_b_test/test/0"):
        write_tar(tmp_path / f"{name}.tar", [sample(1)])
    found = ["wds_a_test/test/0", "wds_a_test/test/1", "wds_b_test/test/0"]
    assert find_shards(str(tmp_path)) == found
    assert find_shards(str(tmp_path / "wds_a_test")) == ["test/0", "test/1"]
    (tmp_path / "empty" / "wds_c_test").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no \.tar shard"):
        find_shards(str(tmp_path / "empty"))


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def members(number, data):
    made = sample(number)
    made["members"]["jpg"] = data
    return made


def test_the_stages_measure_drop_and_report(tmp_path):
    """A pool with a copy, a near copy and an image of each of two evaluation sets, through the real stages."""
    a, b, c, d = draw_images(5)
    (e, *_), (f, *_) = draw_images(6), draw_images(7)
    shown = [jpeg(a, 90), jpeg(b, 90), jpeg(a, 90), jpeg(b, 40), jpeg(c, 90), jpeg(d, 90), jpeg(e, 90)]
    write_tar(tmp_path / "shards" / "0.tar", [members(i, data) for i, data in enumerate(shown)])
    sets = tmp_path / "eval"
    write_tar(sets / "wds_one_test" / "test" / "0.tar", [members(50, jpeg(c, 60)), members(51, jpeg(f, 90))])
    write_tar(sets / "wds_two_test" / "test" / "0.tar", [members(60, jpeg(d, 60)), members(61, jpeg(c, 95))])
    target = str(sets)

    def run(stage):
        return execute(stage, SerialExecutor())

    run(IndexStage((str(tmp_path / "shards"),), str(tmp_path / "pool")))
    run(IndexStage((target,), str(tmp_path / "target"), captions=False))
    for name, measures in (("pool", (ImageHash(), Content())), ("target", (ImageHash(),))):
        run(MeasureStage(str(tmp_path / name), measures, str(tmp_path / f"{name}-columns")))
    trees = {
        "exact": {"exact_duplicates": {}},
        "near": {"near_duplicates": {"radius": 6}},
        "clean": {"decontaminate": {"target": target, "radius": 6}},
    }
    source = MeasuredPool(str(tmp_path / "pool"), str(tmp_path / "pool-columns"))
    targets = {target: MeasuredPool(str(tmp_path / "target"), str(tmp_path / "target-columns"))}
    run(CurateStage(source, tuple((name, parse(tree)) for name, tree in trees.items()), str(tmp_path / "out"), targets))
    order = list(Pool.open(str(tmp_path / "pool")).column("uid").to_pylist())

    def numbers(name):
        return sorted(order.index(uid) for uid in encode_uids(load_subset(str(tmp_path / "out" / name / "subset.npy"))))

    assert numbers("exact") == [0, 1, 3, 4, 5, 6]
    assert numbers("near") == [0, 1, 4, 5, 6]
    assert numbers("clean") == [0, 1, 2, 3, 6]
    facts = json.loads((tmp_path / "out" / "clean" / "funnel.json").read_text())["tree"]["facts"]
    assert facts["tasks"] == {
        "one": {"images": 2, "near_samples": 1, "leaked_images": 1},
        "two": {"images": 2, "near_samples": 2, "leaked_images": 2},
    }


def test_targets_without_images_are_refused():
    table = pa.table({"uid": uids(2), "image_hash.phash": pa.array([1, 2], pa.uint64())})
    view = Columns(table, targets={"t": Columns(table.select(["image_hash.phash"]).slice(0, 0))})
    with pytest.raises(WinnowError, match="no usable image"):
        Decontaminate(target="t").fit(view)
