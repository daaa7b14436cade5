"""Injected noise against its definition: who is drawn, what changes, and what must not."""

import hashlib
import io
import itertools
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from tests.drawing import draw_image, sample, write_tar
from winnow.curation.noise import corrupt
from winnow.curation.noise.inject import KINDS, InjectConfig, InjectStage
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.members import read_members
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import decode_uids, hash_unit
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute

ALL = InjectConfig(
    mismatched=0.3,
    duplicates=0.1,
    near_duplicates=0.1,
    foreign_language=0.1,
    file_name=0.1,
    tiny=0.1,
    extreme_aspect=0.1,
    watermark=0.05,
    seed=3,
)
N = 120


def make_source(folder, cuts, n=N):
    """A pool of n samples cut into shards before the given numbers."""
    edges = [0, *cuts, n]
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        samples = [sample(number) for number in range(low, high)]
        for item in samples:
            item["row"]["sha256"] = hashlib.sha256(item["members"]["jpg"]).hexdigest()
            item["row"]["width"], item["row"]["height"] = 24, 20
        write_tar(folder / "shards" / f"{i:05d}.tar", samples)
        pq.write_table(pa.Table.from_pylist([item["row"] for item in samples]), folder / "shards" / f"{i:05d}.parquet")
    execute(IndexStage((str(folder / "shards"),), str(folder / "pool")), SerialExecutor())
    return str(folder / "pool")


def inject(source, out, config=ALL):
    stage = InjectStage(pool=source, config=config, out=str(out))
    return execute(stage, SerialExecutor()), Pool.open(str(out))


def rows_of(pool):
    """uid -> row with the image's bytes, in order."""
    result = {}
    for shard in pool.shards:
        table = shard.table()
        for row, data in zip(table.to_pylist(), shard.image_bytes(table), strict=True):
            result[row["uid"]] = row | {"data": data}
    return result


def tree_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected_kinds(uids):
    """The definition restated: cumulative intervals of one uniform draw a sample."""
    values = hash_unit(decode_uids(pa.array(uids)), ALL.seed, "noise")
    kinds = {}
    for uid, value in zip(uids, values, strict=True):
        top = 0.0
        kinds[uid] = None
        for kind in KINDS:
            top += getattr(ALL, kind)
            if value < top:
                kinds[uid] = kind
                break
    return kinds


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inject")
    source = make_source(folder, [70])
    before = tree_of(folder)
    manifest, pool = inject(source, folder / "noisy")
    after = {name: data for name, data in tree_of(folder).items() if not name.startswith("noisy/")}
    return folder, source, before, after, manifest, rows_of(Pool.open(source)), rows_of(pool)


def test_who_is_drawn(made):
    *_, manifest, old, new = made
    expected = expected_kinds(list(old))
    assert set(expected.values()) == {*KINDS, None}
    for uid, kind in expected.items():
        assert new[uid]["noise"] == (None if kind in ("duplicates", "near_duplicates") else kind)
    copies = {row["noise_of"]: row["noise"] for row in new.values() if row["noise_of"]}
    assert copies == {uid: kind for uid, kind in expected.items() if kind in ("duplicates", "near_duplicates")}
    assert manifest.values["noise"] == {kind: count for kind, count in Counter(expected.values()).items() if kind}
    assert len(new) == N + len(copies) == sum(shard["rows"] for shard in manifest.values["shards"])


def test_source_is_not_touched(made):
    _, _, before, after, *_ = made
    assert before == after


def test_clean_samples_are_as_before(made):
    *_, old, new = made
    for uid, row in old.items():
        if new[uid]["noise"] is None:
            assert {name: new[uid][name] for name in row} == row


def test_mismatched_is_a_derangement_within_the_shard(made):
    folder, *_, old, new = made
    for shard in Pool.open(str(folder / "noisy")).shards:
        drawn = [uid for uid in shard.table()["uid"].to_pylist() if new[uid]["noise"] == "mismatched"]
        assert len(drawn) > 5
        assert sorted(new[uid]["text"] for uid in drawn) == sorted(old[uid]["text"] for uid in drawn)
        assert all(new[uid]["text"] != old[uid]["text"] and new[uid]["data"] == old[uid]["data"] for uid in drawn)


def test_no_caption_of_the_tar_contradicts_the_view(made):
    folder, *_ = made
    for shard in Pool.open(str(folder / "noisy")).shards:
        table = shard.table()
        table = table.filter(table["text_offset"].is_valid())
        assert table.num_rows > 10
        assert [data.decode() for data in read_members(shard.tars, table, "text")] == table["text"].to_pylist()
        table = table.filter(table["json_offset"].is_valid())
        assert [json.loads(data)["uid"] for data in read_members(shard.tars, table, "json")] == table["uid"].to_pylist()


def test_captions_are_of_their_kind(made):
    *_, new = made
    texts = {kind: [row["text"] for row in new.values() if row["noise"] == kind] for kind in KINDS}
    assert set(texts["foreign_language"]) <= set(corrupt.foreign_sentences())
    assert all("." in text and " " not in text for text in texts["file_name"])


def test_copies(made):
    *_, old, new = made
    for uid, row in new.items():
        if row["noise"] not in ("duplicates", "near_duplicates"):
            continue
        source = old[row["noise_of"]]
        assert uid not in old and row["key"] != source["key"] and row["text"] == source["text"]
        if row["noise"] == "duplicates":
            assert row["data"] == source["data"]
        else:
            a, b = (np.asarray(Image.open(io.BytesIO(x["data"]))).astype(int) for x in (row, source))
            assert a.shape == b.shape and row["data"] != source["data"] and np.abs(a - b).mean() < 40


def test_altered_images_and_their_columns(made):
    *_, old, new = made
    for row in new.values():
        assert row["sha256"] == hashlib.sha256(row["data"]).hexdigest()
        size = Image.open(io.BytesIO(row["data"])).size
        assert (row["width"], row["height"]) == size
        if row["noise"] == "tiny":
            assert 8 <= min(size) <= 14 and (row["original_width"], row["original_height"]) == size
        if row["noise"] == "extreme_aspect":
            assert 4 <= max(size) / min(size) <= 8
            for name, side, before in zip(("original_width", "original_height"), size, (24, 20), strict=True):
                assert row[name] == round(old[row["uid"]][name] * side / before)


def test_twice_gives_the_same_bytes(made, tmp_path):
    folder, source, *_ = made
    inject(source, tmp_path / "noisy")
    assert tree_of(tmp_path / "noisy") == tree_of(folder / "noisy")


def test_shard_layout_does_not_matter(made, tmp_path):
    *_, split = made
    _, pool = inject(make_source(tmp_path, []), tmp_path / "noisy")
    whole = rows_of(pool)
    assert whole.keys() == split.keys()
    for uid, row in whole.items():
        assert row["noise"] == split[uid]["noise"] and row["data"] == split[uid]["data"]
        if row["noise"] != "mismatched":
            assert row["text"] == split[uid]["text"]


def test_noise_on_a_noisy_pool(made, tmp_path):
    folder, *_, once = made
    _, pool = inject(str(folder / "noisy"), tmp_path / "again", InjectConfig(duplicates=0.5, watermark=0.2, seed=8))
    duplicates = rows_of(pool)
    for uid, row in once.items():
        if duplicates[uid]["noise"] != "watermark":
            assert duplicates[uid]["data"] == row["data"] and duplicates[uid]["noise"] == row["noise"]
    assert sum(row["noise"] == "watermark" for row in duplicates.values()) > 10
    assert len({row["key"] for row in duplicates.values()}) == len(duplicates)


def test_single_chosen_or_equal_captions_are_not_called_mismatched(tmp_path):
    source = make_source(tmp_path, [], n=1)
    _, pool = inject(source, tmp_path / "noisy", InjectConfig(mismatched=1.0))
    assert pool.column("noise").to_pylist() == [None]


def test_undecodable_image_stays_as_it_is(tmp_path):
    samples = [sample(number) for number in range(6)]
    samples[2]["members"]["jpg"] = draw_image((90, 90, 200), 0, size=(128, 128))[
        :1500
    ]  # the header is there, the pixels are not
    write_tar(tmp_path / "shards" / "00000.tar", samples)
    execute(IndexStage((str(tmp_path / "shards"),), str(tmp_path / "pool")), SerialExecutor())
    for kind in ("near_duplicates", "watermark"):
        _, pool = inject(str(tmp_path / "pool"), tmp_path / kind, InjectConfig(**{kind: 1.0}))
        rows = rows_of(pool)
        assert sum(row["noise"] == kind for row in rows.values()) == 5
        assert rows[json.loads(samples[2]["members"]["json"])["uid"]]["noise"] is None
        assert len(rows) == (11 if kind == "near_duplicates" else 6)


def test_altered_samples_keep_their_other_members(tmp_path):
    samples = [sample(number) for number in range(4)]
    for number, item in enumerate(samples):
        item["members"]["cls"] = b"%d" % number
    write_tar(tmp_path / "shards" / "0.tar", samples)
    execute(IndexStage((str(tmp_path / "shards"),), str(tmp_path / "pool")), SerialExecutor())
    _, pool = inject(str(tmp_path / "pool"), tmp_path / "noisy", InjectConfig(watermark=1.0))
    shard = pool.shards[0]
    assert shard.table()["noise"].to_pylist() == ["watermark"] * 4
    assert shard.member_bytes(shard.table(), "cls") == [b"0", b"1", b"2", b"3"]


def test_too_much_is_refused():
    with pytest.raises(ValidationError, match=r"sum to 1\.2"):
        InjectConfig(mismatched=0.7, tiny=0.5)
    with pytest.raises(ValidationError):
        InjectConfig(mismatch=0.1)
