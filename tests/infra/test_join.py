"""Joining tars with their parquets: what is taken from which, and what is skipped."""

import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.drawing import sample, uid_of, write_parquet, write_pool, write_tar
from tests.infra.test_index import index, reasons
from winnow.infra.errors import WinnowError
from winnow.infra.pool.join import join
from winnow.infra.pool.pool import Pool


def test_columns_of_the_parquet_are_kept(tmp_path):
    samples = [sample(i) for i in range(3)]
    for i, item in enumerate(samples):
        item["row"] |= {
            "clip_b32_similarity_score": 0.1 * i,
            "status": "success",
            "url": f"https://example.com/{i}.jpg",
        }
    write_tar(tmp_path / "shards" / "00000.tar", samples)
    failed = {"row": samples[0]["row"] | {"key": "000000009", "uid": uid_of(9), "status": "failed_to_download"}}
    write_parquet(tmp_path / "shards" / "00000.parquet", [*samples, failed])
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert manifest.skipped["count"] == 0  # img2dataset lists failed downloads; they are not a disagreement
    table = Pool.open(str(tmp_path / "pool")).shards[0].table()
    assert table["clip_b32_similarity_score"].to_pylist() == pytest.approx([0.0, 0.1, 0.2])
    assert table["original_width"].to_pylist() == [240, 241, 242]
    assert table["url"].to_pylist() == [f"https://example.com/{i}.jpg" for i in range(3)]
    assert "status" not in table.column_names


def test_parquet_that_disagrees_with_its_tar(tmp_path):
    samples = [sample(i) for i in range(6)]
    write_tar(tmp_path / "shards" / "00000.tar", samples[:5])
    rows = [samples[0], samples[2], samples[3], samples[4], samples[5]]  # 1 is missing, 5 is too many
    rows[1]["row"]["uid"] = uid_of(77)
    rows[2]["row"]["text"] = "something else"
    write_parquet(tmp_path / "shards" / "00000.parquet", rows)
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert reasons(manifest) == {
        "in the tar but not in the parquet": 1,
        "in the parquet but not in the tar (by key)": 1,
        "uid differs between tar and parquet": 1,
        "caption differs between tar and parquet": 1,
    }
    assert Pool.open(str(tmp_path / "pool")).shards[0].table()["uid"].to_pylist() == [uid_of(0), uid_of(4)]


def test_parquet_joined_by_uid_and_by_order(tmp_path):
    samples = [sample(i) for i in range(4)]
    write_tar(tmp_path / "uid" / "00000.tar", samples)
    table = pa.Table.from_pylist([item["row"] for item in reversed(samples)]).drop_columns(["key"])
    table = table.append_column("mark", pa.array([3, 2, 1, 0]))
    pq.write_table(table, tmp_path / "uid" / "00000.parquet")
    index(tmp_path / "uid", tmp_path / "pool")
    assert Pool.open(str(tmp_path / "pool")).shards[0].table()["mark"].to_pylist() == [0, 1, 2, 3]

    for item in samples:
        item["members"]["json"] = b"{}"
    write_tar(tmp_path / "order" / "00000.tar", samples)
    pq.write_table(table.take(pa.array([3, 2, 1, 0])), tmp_path / "order" / "00000.parquet")
    index(tmp_path / "order", tmp_path / "pool2")
    assert Pool.open(str(tmp_path / "pool2")).shards[0].table()["uid"].to_pylist() == [uid_of(i) for i in range(4)]


def test_unreadable_parquet_costs_the_samples_of_its_shard(tmp_path):
    write_pool(tmp_path / "shards", shards=2, per_shard=3)
    (tmp_path / "shards" / "00000.parquet").write_bytes(b"PAR1 nonsense")
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert reasons(manifest) == {"unreadable parquet": 3}
    assert [shard.rows for shard in Pool.open(str(tmp_path / "pool")).shards] == [0, 3]


@pytest.mark.parametrize("column", ["url", "sha256"])
def test_parquet_joined_by_url_or_sha256(tmp_path, column):
    samples = [sample(i) for i in range(3)]
    for i, item in enumerate(samples):
        item["members"]["json"] = json.dumps({column: f"value {i}"}).encode()
    write_tar(tmp_path / "shards" / "0.tar", samples)
    rows = [{"uid": uid_of(i), column: f"value {i}", "mark": i} for i in (2, 0)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shards" / "0.parquet")
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert reasons(manifest) == {"in the tar but not in the parquet": 1}
    table = Pool.open(str(tmp_path / "pool")).shards[0].table()
    assert table["mark"].to_pylist() == [0, 2] and table["uid"].to_pylist() == [uid_of(0), uid_of(2)]


def test_rows_are_never_joined_by_order_alone(tmp_path):
    samples = [sample(i) for i in range(3)]
    for item in samples:
        item["members"]["json"] = b"{}"
    write_tar(tmp_path / "shards" / "0.tar", samples)
    pq.write_table(pa.table({"mark": [0, 1, 2]}), tmp_path / "shards" / "0.parquet")
    with pytest.raises(WinnowError, match=r"no column to join them by.*key, uid, url or sha256"):
        index(tmp_path / "shards", tmp_path / "pool")


N = 5


def shard(folder, columns, without=(), facts=("uid", "url"), more=None):
    """A shard of N samples and a parquet of the given columns; the samples' members, to check against.

    Args:
        without: members to leave out.
        facts: what the json has.
        more: further members of each sample.
    """
    samples = [sample(i) for i in range(N)]
    for i, item in enumerate(samples):
        known = {"uid": uid_of(i), "url": f"u{i}", "sha256": f"{i:064x}", "caption": item["row"]["text"]}
        item["members"]["json"] = json.dumps({name: known[name] for name in facts}).encode()
        item["members"] = {ext: data for ext, data in item["members"].items() if ext not in without}
        item["members"] |= more[i] if more else {}
    write_tar(folder / "shards" / "0.tar", samples)
    pq.write_table(pa.table(columns), folder / "shards" / "0.parquet")
    return samples


def pool_of(folder, **options):
    """Rows of the pool by the number of the sample, and why others were skipped."""
    manifest = index(folder / "shards", folder / "pool", budget=1000, **options)
    rows = Pool.open(str(folder / "pool")).shards[0].table().to_pylist()
    return {int(row["key"].rpartition("/")[2]): row for row in rows}, reasons(manifest)


KEYS = [f"{i:09d}" for i in range(N)]
TEXTS = [sample(i)["row"]["text"] for i in range(N)]
SHUFFLED = [3, 0, 4, 1, 2]


@pytest.mark.parametrize("name", ["uid", "url", "sha256"])
def test_a_row_that_is_of_another_sample_is_skipped(tmp_path, name):
    values = {"uid": [uid_of(i) for i in range(N)], "url": [f"u{i}" for i in range(N)]}
    values["sha256"] = [f"{i:064X}" for i in range(N)]  # upper case is no difference
    values[name][2], values[name][4] = "f" * 32, None
    shard(tmp_path, {"key": KEYS, "mark": list(range(N)), **values}, facts=("uid", "url", "sha256"))
    rows, why = pool_of(tmp_path)
    assert why == {f"{name} differs between tar and parquet": 1}
    assert {i: row["mark"] for i, row in rows.items()} == {i: i for i in (0, 1, 3, 4)}
    assert rows[4]["uid"] == uid_of(4) and rows[4]["url"] == "u4"  # where the parquet has none, those of the json


@pytest.mark.parametrize("by", ["uid", "url", "sha256"])
@pytest.mark.parametrize("keys", ["of others", "foreign", "none"])
def test_rows_are_joined_by_what_identifies_them(tmp_path, by, keys):
    """By a uid also where keys say otherwise; by url and sha256 where keys say nothing."""
    names = {"uid": uid_of, "url": lambda i: f"u{i}", "sha256": lambda i: f"{i:064x}"}
    columns = {by: [names[by](i) for i in SHUFFLED], "mark": SHUFFLED}
    columns |= {"foreign": {"key": [f"row-{i}" for i in range(N)]}, "of others": {"key": KEYS}, "none": {}}[keys]
    shard(tmp_path, columns, facts=(by,))
    if by != "uid" and keys == "of others":
        with pytest.raises(WinnowError, match=f"{by} differs between tar and parquet"):
            pool_of(tmp_path)
    else:
        rows, why = pool_of(tmp_path)
        assert not why and {i: row["mark"] for i, row in rows.items()} == {i: i for i in range(N)}


@pytest.mark.parametrize(
    ("by", "expected", "left"),
    [
        ("key", {"duplicate key in the parquet": 2}, [0, 1, 2, 3, 4]),
        ("uid", {"duplicate uid in the parquet": 2}, [0, 1, 2, 3, 4]),
        # Another sample may have the same url, so nothing says which row is which sample's.
        ("url", {"url is not unique": 1, "duplicate url in the parquet": 2}, [0, 2, 3, 4]),
    ],
)
def test_rows_that_occur_again_are_counted(tmp_path, by, expected, left):
    order = [*range(N), 1, 1]
    names = {"key": KEYS.__getitem__, "uid": uid_of, "url": lambda i: f"u{i}"}
    shard(tmp_path, {by: [names[by](i) for i in order], "mark": list(range(N + 2))})
    rows, why = pool_of(tmp_path)
    assert why == expected
    assert {i: row["mark"] for i, row in rows.items()} == {i: i for i in left}


def test_a_list_that_was_downloaded_twice(tmp_path):
    """The second rows have other uids; the captions are only in the parquet."""
    uids = [uid_of(i) for i in range(2 * N)]
    shard(tmp_path, {"key": KEYS * 2, "text": TEXTS * 2, "uid": uids}, without=("txt", "json"))
    rows, why = pool_of(tmp_path)
    assert why == {"duplicate key in the parquet": N}
    assert {i: (row["uid"], row["text"]) for i, row in rows.items()} == {i: (uid_of(i), TEXTS[i]) for i in range(N)}


def test_samples_and_rows_that_share_a_url_are_counted_once(tmp_path):
    shard(tmp_path, {"url": ["u0", "u1", "u1", "u2", "u4"]}, facts=("url",), more=None)
    samples = [sample(i) for i in range(N)]
    for item, url in zip(samples, ("u0", "u1", "u1", "u2", "u4"), strict=True):
        item["members"]["json"] = json.dumps({"url": url}).encode()
    write_tar(tmp_path / "shards" / "0.tar", samples)
    rows, why = pool_of(tmp_path)
    assert sorted(rows) == [0, 3, 4] and why == {"url is not unique": 2}


def write_keys(folder, tar, parquet):
    samples = [sample(i) for i in range(len(tar))]
    for i, key in enumerate(tar):
        samples[i]["key"] = key
        del samples[i]["members"]["json"]
    write_tar(folder / "shards" / "0.tar", samples)
    pq.write_table(pa.table({"key": parquet, "mark": list(range(len(tar)))}), folder / "shards" / "0.parquet")
    manifest = index(folder / "shards", folder / "pool", budget=1000)
    table = Pool.open(str(folder / "pool")).shards[0].table()
    captions = [item["members"]["txt"].decode() for item in samples]
    return [captions.index(text) for text in table["text"].to_pylist()], table["mark"].to_pylist(), reasons(manifest)


PADDED = ["000000009", "000000010", "000000100"]
FOLDERS = ["cats/0001", "cats/0002", "dogs/0001"]


@pytest.mark.parametrize(
    ("tar", "parquet"),
    [
        (FOLDERS, FOLDERS),
        ([f"./{key}" for key in FOLDERS], FOLDERS),
        (FOLDERS, [f"{key}.jpg" for key in FOLDERS]),
        (FOLDERS, ["cats/1", "cats/2", "dogs/1"]),
        (["a/1", "a/2", "b/3"], ["1", "2", "3"]),
        (PADDED, PADDED),
        (PADDED, pa.array([9, 10, 100], pa.int64())),
        (PADDED, pa.array([9, 10, 100], pa.uint8())),
        (PADDED, [9.0, 10.0, 100.0]),
        (PADDED, ["9", "10", "100"]),
        (["9", "10", "100"], PADDED),
        (["0", "00", "7"], ["0", "00", "7"]),
    ],
)
def test_keys_as_people_write_them(tmp_path, tar, parquet):
    assert write_keys(tmp_path, tar, parquet) == ([0, 1, 2], [0, 1, 2], {})


@pytest.mark.parametrize(
    ("tar", "parquet", "left"),
    [(["1", "01", "002"], [1, 3, 2], [2]), (["a/1", "b/1", "a/2"], ["1", "1", "2"], [2])],
)
def test_keys_that_fit_several_samples_are_refused(tmp_path, tar, parquet, left):
    found, marks, why = write_keys(tmp_path, tar, pa.array(parquet))
    assert found == marks == left
    assert why["key is not unique"] == 2 and "in the tar but not in the parquet" not in why


@pytest.mark.parametrize("kind", ["upper", "bytes", "fixed bytes"])
def test_uids_are_normalised(tmp_path, kind):
    uids = [uid_of(10 + i) for i in range(N)]
    octets = [bytes.fromhex(uid) for uid in uids]
    column = {"upper": [uid.upper() for uid in uids], "bytes": octets, "fixed bytes": pa.array(octets, pa.binary(16))}
    shard(tmp_path, {"key": KEYS, "uid": column[kind]}, without=("json",))
    rows, why = pool_of(tmp_path)
    assert not why and [rows[i]["uid"] for i in range(N)] == uids


def test_upper_case_in_the_json_is_no_difference(tmp_path):
    samples = [sample(i) for i in range(N)]
    for i, item in enumerate(samples):
        item["members"]["json"] = json.dumps({"uid": uid_of(i).upper()}).encode()
    write_tar(tmp_path / "shards" / "0.tar", samples)
    assert [row["uid"] for row in pool_of(tmp_path)[0].values()] == [uid_of(i) for i in range(N)]


@pytest.mark.parametrize("column", ["text", "caption"])
def test_captions_that_only_the_parquet_has(tmp_path, column):
    texts = [*TEXTS[:3], None, ""]
    shard(tmp_path, {"key": KEYS, column: texts}, without=("txt",))
    rows, why = pool_of(tmp_path)
    assert [rows[i]["text"] for i in range(3)] == TEXTS[:3]
    # An empty caption is one.
    assert why == {"missing caption": 1} and rows[4]["text"] == ""


def test_captions_of_the_json_as_img2dataset_names_them(tmp_path):
    shard(tmp_path, {"key": KEYS}, without=("txt",), facts=("caption",))
    rows, why = pool_of(tmp_path)
    assert not why and [rows[i]["text"] for i in range(N)] == TEXTS


def test_a_byte_order_mark_or_a_line_end_is_no_difference(tmp_path):
    forms = ("{}\n", "\ufeff{}", "{}\r\n", "\ufeff{}\n", "{}")
    more = [{"txt": form.format(text).encode()} for form, text in zip(forms, TEXTS, strict=True)]
    shard(tmp_path, {"key": KEYS, "text": [*TEXTS[:4], TEXTS[4] + "\n"]}, more=more)
    assert len(pool_of(tmp_path)[0]) == N
    shard(tmp_path, {"key": KEYS, "text": [TEXTS[0], *(" " + text for text in TEXTS[1:])]})
    assert pool_of(tmp_path)[1] == {"caption differs between tar and parquet": N - 1}


@pytest.mark.parametrize("status", [[200] * N, ["ok"] * N, ["success"] * 4 + ["fine"], ["success"] * 4 + [None]])
def test_a_status_of_the_users_own_is_theirs(tmp_path, status):
    columns = {"key": KEYS, "status": status, "exif": ["e"] * N, "error_message": ["m"] * N}
    shard(tmp_path, columns)
    rows, why = pool_of(tmp_path)
    assert not why
    for name, values in columns.items():
        assert [rows[i][name] for i in range(N)] == list(values)


def test_the_status_of_img2dataset(tmp_path):
    columns = {"key": [*KEYS, "9", "8"], "status": ["success"] * N + ["failed_to_resize", "failed_to_download"]}
    shard(tmp_path, columns | {"error_message": ["m"] * (N + 2), "exif": ["{}"] * (N + 2)})
    rows, why = pool_of(tmp_path)
    assert not why and len(rows) == N and not {"status", "error_message", "exif"} & rows[0].keys()


@pytest.mark.parametrize("bad", [float("inf"), float(1 << 40), -1.0, 64.5, "wide", 1 << 31])
def test_a_size_that_is_none_costs_its_sample_alone(tmp_path, bad):
    good = ["30", "nan", None, "31"] if isinstance(bad, str) else [30, float("nan"), None, 31]
    kind = {str: pa.string(), float: pa.float64(), int: pa.float64()}[type(bad)]
    shard(tmp_path, {"key": KEYS, "original_width": pa.array([*good, bad], kind), "original_height": [40] * N})
    rows, why = pool_of(tmp_path)
    assert why == {"original_width is not a size": 1}
    # A size that is missing is that of the stored image, which is 24 pixels wide.
    assert [rows[i]["original_width"] for i in range(4)] == [30, 24, 24, 31]


LABELS = [{"cls": b"%d" % i} for i in range(N)]


@pytest.mark.parametrize(
    "kind",
    [pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.decimal128(5, 0), pa.decimal128(20, 2)],
)
def test_labels_of_any_number_type_are_whole_numbers(tmp_path, kind):
    """pandas makes floats of whole numbers of which one is missing."""
    number = Decimal if pa.types.is_decimal(kind) else float if pa.types.is_floating(kind) else int
    column = pa.array([None if one is None else number(one) for one in (0, 1, None, 3, 9)], kind)
    shard(tmp_path, {"key": KEYS, "label": column}, more=LABELS)
    rows, why = pool_of(tmp_path)
    assert why == {"label differs between tar and parquet": 1}
    assert {i: row["label"] for i, row in rows.items()} == {0: 0, 1: 1, 2: 2, 3: 3}
    one = Pool.open(str(tmp_path / "pool")).shards[0]
    assert [item.label for item in one.samples(one.table())] == [0, 1, 2, 3]


def test_labels_that_are_no_numbers(tmp_path):
    shard(tmp_path, {"key": KEYS, "label": ["cat"] * N})
    assert [row["label"] for row in pool_of(tmp_path)[0].values()] == ["cat"] * N
    shard(tmp_path, {"key": KEYS, "label": ["cat"] * N}, more=LABELS)
    with pytest.raises(WinnowError, match=r"string in the column \"label\".*\.cls.*Rename"):
        pool_of(tmp_path)


def test_text_that_is_not_utf8_costs_its_row_alone(tmp_path):
    octets = [b"caf\xe9" if i == 1 else text.encode() for i, text in enumerate(TEXTS)]
    text = pa.array(octets, pa.binary()).view(pa.string())
    shard(tmp_path, {"key": KEYS, "text": text}, without=("txt",))
    rows, why = pool_of(tmp_path)
    assert why == {"a name or text is not UTF-8": 1}
    assert {i: row["text"] for i, row in rows.items()} == {i: TEXTS[i] for i in (0, 2, 3, 4)}


@pytest.mark.parametrize("by", ["uid", "key", "url"])
def test_a_shard_without_a_usable_sample(tmp_path, by):
    names = {"key": KEYS.__getitem__, "uid": uid_of, "url": lambda i: f"u{i}"}
    shard(tmp_path, {by: [names[by](i) for i in range(N)]}, more=[{"jpg": b"?"}] * N)
    write_tar(tmp_path / "shards" / "1.tar", [sample(9)])
    manifest = index(tmp_path / "shards", tmp_path / "pool", budget=1000)
    assert reasons(manifest) == {"undecodable image": N} and manifest.items == 1


@pytest.mark.parametrize("by", ["uid", "key", "url"])
def test_a_broken_sample_is_counted_once(tmp_path, by):
    names = {"key": KEYS.__getitem__, "uid": uid_of, "url": lambda i: f"u{i}"}
    shard(tmp_path, {by: [names[by](i) for i in range(N)]}, more=[{"jpg": b"?"} if i == 2 else {} for i in range(N)])
    rows, why = pool_of(tmp_path)
    assert sorted(rows) == [0, 1, 3, 4] and why == {"undecodable image": 1}


def test_captions_identify_where_nothing_else_does_and_they_are_unique(tmp_path):
    texts = [*TEXTS[:3], "the same", "the same"]
    more = [{"txt": text.encode()} for text in texts]
    columns = {"text": [texts[i] for i in SHUFFLED], "mark": SHUFFLED}
    shard(tmp_path, columns, without=("json",), more=more)
    rows, why = pool_of(tmp_path)
    assert {i: row["mark"] for i, row in rows.items()} == {i: i for i in range(3)}
    assert why == {"caption is not unique": 2}


@pytest.mark.parametrize("name", ["tar", "image_size", "other"])
def test_a_column_with_the_name_of_one_of_the_pools_is_refused(tmp_path, name):
    shard(tmp_path, {"key": KEYS, name: np.arange(N)})
    with pytest.raises(WinnowError, match=f'has a column "{name}".*Rename it'):
        pool_of(tmp_path)


def random_case(seed):
    """Samples of a tar, and rows of a parquet of which some are missing, doubled, or have a value of another row."""
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 8))
    names = ("uid", "key", "url", "sha256", "text")
    values = [(uid_of(i), f"{i:04d}", f"u{i}", f"{i:064x}", f"t{i % 5}") for i in range(n)]
    facts = [dict(zip(names, one, strict=True)) for one in values]
    order = random.permutation(n)[: random.integers(n // 2, n + 1)].tolist()
    rows = [dict(facts[i]) for i in (*order, *order[: random.integers(0, 2)])]
    for name in names:
        if len(rows) > 1 and random.random() < 0.2:
            one, two = random.choice(len(rows), 2, replace=False)
            rows[one][name], rows[two][name] = rows[two][name], rows[one][name]
    asked = [name for name in names if random.random() < 0.6] or ["key"]
    known = {name for name in ("uid", "url", "sha256", "text") if random.random() < 0.6}
    samples = []
    for item in facts:
        row = {name: item[name] for name in ("url", "sha256") if name in known}
        row |= {name: item[name] if name in known else None for name in ("uid", "text")}
        samples.append(row | {"key": item["key"], "original_width": 9, "original_height": 9})
    return samples, pa.Table.from_pylist([{name: row[name] for name in asked} | {"n": i} for i, row in enumerate(rows)])


def test_whatever_the_rows_no_pair_disagrees_and_nothing_is_lost():
    """Random tars and parquets: what is joined agrees in all that both have; everything else is reported once."""
    joined = 0
    for seed in range(400):
        samples, parquet = random_case(seed)
        skipped, before = [], {row["key"]: dict(row) for row in samples}
        try:
            rows = join(samples, parquet, "0", skipped).to_pylist()
        except WinnowError as error:
            assert "no column to join them by" in str(error)
            continue
        pairs = [(before[row["key"]], parquet.slice(row["n"], 1).to_pylist()[0]) for row in rows]
        for sample_facts, row in pairs:
            for name in ("uid", "url", "sha256", "text"):
                assert sample_facts.get(name) is None or row.get(name) in (None, sample_facts[name]), seed
        assert len({row["n"] for _, row in pairs}) == len({item["key"] for item, _ in pairs}) == len(rows), seed
        of_tar = [item for item in skipped if "in the parquet" not in item.reason or "in the tar but" in item.reason]
        assert len(of_tar) == len(samples) - len(rows), seed
        # Rows that are neither used nor reported belong to samples that are.
        unreported = parquet.num_rows - len(rows) - (len(skipped) - len(of_tar))
        assert 0 <= unreported <= len(of_tar), seed
        joined += len(rows)
    assert joined > 600
