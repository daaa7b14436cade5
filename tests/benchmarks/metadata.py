"""Metadata in DataComp's schema, drawn from a seed: what the benchmarks and the tests of metadata pools read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_HEX = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
_ENGLISH = """the a of in with for and on to new red black white photo vintage image stock free home design large set
best women men house wedding kitchen modern living room art print wall canvas dog cat street night water blue green
leather shoes dress summer winter christmas gift card background vector illustration hand drawn map city park beach
mountain car engine 2019 2020 pdf download buy online sale size color steel wood table chair lamp light"""
_GERMAN_AND_FRENCH = "der die das und mit für ein neue haus katze auf dem maison avec pour les dans une gato casa para"
_WORDS, _FOREIGN = _ENGLISH.split(), _GERMAN_AND_FRENCH.split()


def hex_strings(rng: np.random.Generator, n: int, length: int) -> pa.Array:
    """n random hex strings."""
    octets = rng.integers(0, 256, (n, length // 2), dtype=np.uint8)
    digits = np.empty((n, length), np.uint8)
    digits[:, 0::2], digits[:, 1::2] = _HEX[octets >> 4], _HEX[octets & 15]
    offsets = pa.py_buffer(np.arange(0, (n + 1) * length, length, dtype=np.int32))
    return pa.StringArray.from_buffers(n, offsets, pa.py_buffer(digits.ravel()))


def texts(rng: np.random.Generator, n: int) -> pa.Array:
    """n captions of 1 to 18 words, a quarter of them not English, a twentieth with a newline."""
    foreign = rng.random(n) < 0.25
    lengths = np.minimum(1 + rng.geometric(0.12, n), 18)
    ends = np.cumsum(lengths)
    english = rng.integers(0, len(_WORDS), ends[-1])
    others = rng.integers(0, len(_FOREIGN), ends[-1])
    vocabulary = pa.array([*_WORDS, *_FOREIGN])
    words = vocabulary.take(pa.array(np.where(np.repeat(foreign, lengths), len(_WORDS) + others, english)))
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    joined = pa.compute.binary_join(pa.ListArray.from_arrays(offsets, words), " ")
    broken = pa.array(rng.random(n) < 0.05)
    return pa.compute.if_else(broken, pa.compute.replace_substring(joined, " ", "\n", max_replacements=1), joined)


def table(rng: np.random.Generator, n: int) -> pa.Table:
    """n rows with DataComp's columns; scores normal, float64."""
    faces = rng.geometric(0.6, n) - 1
    boxes = pa.array(rng.random(4 * int(faces.sum())))
    inner = pa.ListArray.from_arrays(pa.array(np.arange(0, len(boxes) + 1, 4, dtype=np.int32)), boxes)
    starts = pa.array(np.concatenate([[0], np.cumsum(faces)]).astype(np.int32))
    hosts = pa.array([f"https://img{i}.example.com/images/" for i in range(997)])
    columns = {
        "uid": hex_strings(rng, n, 32),
        "url": pa.compute.binary_join_element_wise(
            hosts.take(pa.array(rng.integers(0, len(hosts), n))), hex_strings(rng, n, 12), ".jpg", ""
        ),
        "text": texts(rng, n),
        "original_width": pa.array(np.exp(rng.normal(6.2, 0.6, n)).astype(np.int64)),
        "original_height": pa.array(np.exp(rng.normal(6.1, 0.6, n)).astype(np.int64)),
        "clip_b32_similarity_score": pa.array(rng.normal(0.22, 0.06, n)),
        "clip_l14_similarity_score": pa.array(rng.normal(0.19, 0.06, n)),
        "face_bboxes": pa.ListArray.from_arrays(starts, inner),
        "sha256": hex_strings(rng, n, 64),
    }
    return pa.table(columns)


def write_metadata(folder: Path, rows: int, per_file: int = 10_000, seed: int = 0) -> Path:
    """Write `rows` rows into files of `per_file` as img2dataset and pandas do: snappy, one row group. What is there
    already is kept; each file depends on the seed and its number alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, rows, per_file)):
        path = folder / f"{number:08d}.parquet"
        if not path.exists():
            rng = np.random.default_rng([seed, number])
            temporary = path.with_suffix(".part")
            pq.write_table(table(rng, min(per_file, rows - start)), temporary, compression="snappy")
            temporary.rename(path)
    return folder
