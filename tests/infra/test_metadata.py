"""DataComp's metadata folder as a pool."""

import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from winnow.infra.errors import WinnowError
from winnow.infra.pool.metadata import feature_dims, is_metadata, read_feature
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import decode_uids, derived_uid


@pytest.fixture
def folder(tmp_path):
    """Two parquets of 5 and 3 rows; the first with features next to it."""
    folder, rng = tmp_path / "metadata", np.random.default_rng(0)
    folder.mkdir()
    for stem, rows in (("b", range(5)), ("a", range(5, 8))):
        table = pa.table({"uid": [derived_uid(str(i)) for i in rows], "text": [f"caption {i}" for i in rows]})
        pq.write_table(table, folder / f"{stem}.parquet")
    b32 = rng.normal(size=(5, 4))
    b32 = (b32 / np.linalg.norm(b32, axis=1, keepdims=True)).astype(np.float16)
    np.savez(folder / "b.npz", b32_img=b32, l14_img=np.asfortranarray(np.eye(5, 3)))
    return folder


def test_rows_columns_and_features(folder):
    pool = Pool.open(str(folder))
    assert [shard.name for shard in pool.shards] == ["a", "b"]
    assert not pool.counted and not pool.images and len(pool) == 8
    a, b = pool.shards
    assert b.columns() == ["uid", "text", "l14_img", "b32_img"] and a.columns() == ["uid", "text"]
    table = b.table(["l14_img", "text", "b32_img"])
    with np.load(folder / "b.npz") as arrays:
        for name in ("l14_img", "b32_img"):
            values = table[name].combine_chunks()
            assert values.type == pa.list_(pa.float16(), arrays[name].shape[1])
            assert np.array_equal(
                values.flatten().to_numpy().reshape(arrays[name].shape), arrays[name].astype(np.float16)
            )
    assert table["text"].to_pylist() == [f"caption {i}" for i in range(5)]
    assert np.array_equal(b.uids(), decode_uids(pa.array([derived_uid(str(i)) for i in range(5)])))


def test_a_changed_file_is_another_pool(folder):
    before = Pool.open(str(folder))
    table = pq.read_table(folder / "a.parquet")
    pq.write_table(table.slice(0, 2), folder / "a.parquet")
    after = Pool.open(str(folder))
    assert before.digest != after.digest and before.shards[1].digest == after.shards[1].digest


def test_folders_that_are_not_metadata(folder, tmp_path):
    assert is_metadata(str(folder))
    (folder / "0.tar").touch()
    assert not is_metadata(str(folder)) and not is_metadata(str(tmp_path)) and not is_metadata(str(tmp_path / "none"))


def lying(path, shape):
    """An archive of an array of 30 bytes whose header says another shape."""
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(path, "w") as archive, archive.open("l14_img.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(30))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "b.npz").unlink(), "b.npz is missing.*Download"),
        (lambda f: np.savez(f / "b.npz", l14_img=np.ones((4, 3), np.float16)), "4 rows, the parquet next to it 5"),
        (lambda f: np.savez(f / "b.npz", l14_img=np.ones(5, np.float16)), "not a matrix"),
        (lambda f: np.savez(f / "b.npz", l14_img=1.02 * np.eye(5)), "b.npz: l14_img: 5 of 5 .* not L2-normalised"),
        (lambda f: np.savez(f / "b.npz", l14_img=np.array([[{}]], object)), "not a matrix"),
        (lambda f: np.savez(f / "b.npz", other=np.ones((5, 2))), 'holds no array "l14_img".*It holds: other'),
        (lambda f: lying(f / "b.npz", (5, 1 << 40)), r"said to be float16 of shape \(5, 1099511627776\), and 30 bytes"),
        (lambda f: lying(f / "b.npz", (5, 2)), r"shape \(5, 2\), and 30 bytes"),
        (lambda f: np.savez_compressed(f / "b.npz", l14_img=np.zeros((5, 20000), np.float16)), "at most"),
        (lambda f: (f / "b.npz").write_bytes(b"PK"), "not a readable .npz"),
        (lambda f: (f / "b.parquet").write_bytes(b"PAR1" * 9), "not a readable parquet"),
    ],
)
def test_damage_is_reported(folder, damage, words):
    damage(folder)
    with pytest.raises(WinnowError, match=words):
        Pool.open(str(folder)).shard("b").table(["l14_img"])


def test_a_missing_column(folder):
    with pytest.raises(WinnowError, match='no column "clip_l14_similarity_score"'):
        Pool.open(str(folder)).shard("a").table(["clip_l14_similarity_score"])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_corrupted_byte_of_the_features_is_noticed_or_changes_nothing(tmp_path, save):
    vectors = np.random.default_rng(0).normal(size=(20, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    path = tmp_path / "a.npz"
    save(path, l14_img=vectors)
    whole, noticed = path.read_bytes(), 0
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        try:
            feature_dims(str(path))
            found = read_feature(str(path), "l14_img", 20)
        except WinnowError as error:
            assert "a.npz: " in str(error)
            noticed += 1
        else:
            assert np.array_equal(found.flatten().to_numpy(zero_copy_only=False), vectors.ravel())
    assert noticed > len(whole) // 2
