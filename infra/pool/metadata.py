"""DataComp's metadata folder: `NAME.parquet` with captions, sizes and scores, `NAME.npz` with CLIP features; no tars.

A pool without images. Nothing is copied or indexed: the parquets are the views, and rows are counted on request. Name,
size and modification time of a file represent its content in digests.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.arrays import check_normalised, read_header, usable_rows
from winnow.infra.pool.layouts import is_ours
from winnow.infra.stages.stage import LOCATIONS, MANIFEST, RECORDS

# Members of the .npz (DataComp's names): L2-normalised CLIP ViT-L/14 and ViT-B/32 embeddings, float16.
FEATURES = ("l14_img", "l14_txt", "b32_img", "b32_txt")

MAX_DIM = 1 << 14


def is_metadata(url: str) -> bool:
    """Whether a directory holds parquets, no tars, and is not the output of a stage."""
    names = [name for name in storage.list_names(url) if is_ours(name)]
    if {MANIFEST, LOCATIONS, RECORDS} & set(names) or any(name.endswith(".tar") for name in names):
        return False
    return any(name.endswith(".parquet") for name in names)


def metadata_files(url: str) -> list[tuple[str, str, str | None, str]]:
    """(stem, parquet URL, npz URL or None, version token) of each parquet in a folder, by name."""
    tokens = storage.list_tokens(url)
    found = []
    for name in sorted(name for name in tokens if is_ours(name) and name.endswith(".parquet")):
        stem = name.removesuffix(".parquet")
        features = f"{stem}.npz" if f"{stem}.npz" in tokens else None
        token = tokens[name] + (f"+{tokens[features]}" if features else "")
        found.append((stem, storage.join(url, name), storage.join(url, features) if features else None, token))
    return found


def feature_dims(url: str) -> dict[str, int]:
    """Dimension of each feature array of an .npz, out of its headers. Raises WinnowError."""
    with _archive(url) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        return {name: _header(archive, name, url)[1][0][1] for name in FEATURES if name in names}


def read_feature(url: str, name: str, rows: int) -> pa.FixedSizeListArray:
    """One array of an .npz, one of FEATURES, as float16 lists of fixed size, shape [rows]; the others are not read.

    Raises:
        WinnowError: no such file or member, not a matrix of floats, another number of rows, or not L2-normalised.
    """
    with _archive(url) as archive:
        file, (shape, fortran, dtype) = _header(archive, name, url)
        if shape[0] != rows:
            raise WinnowError(f"{name} has {shape[0]} rows, the parquet next to it {rows}", where=url)
        count = shape[0] * shape[1]
        rest = archive.getinfo(f"{name}.npy").file_size - file.tell()
        if shape[1] > MAX_DIM or rest != count * dtype.itemsize:
            what = f"{name} is said to be {dtype} of shape {shape}, and {rest:,} bytes follow"
            raise WinnowError(what, where=url, do=f"It may have {MAX_DIM:,} columns at most.")
        data = file.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise WinnowError(f"{name} is truncated", where=url)
    matrix = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="), copy=False)
    matrix = np.ascontiguousarray(matrix.reshape(shape[::-1]).T) if fortran else matrix.reshape(shape)
    check_normalised(matrix, usable_rows(matrix), name, url)
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel().astype(np.float16, copy=False)), shape[1])


@contextlib.contextmanager
def _archive(url: str) -> Iterator[zipfile.ZipFile]:
    """The archive, closed at the end. What goes wrong in reading it becomes a WinnowError."""
    try:
        with storage.open_read(url) as file, zipfile.ZipFile(file) as archive:
            yield archive
    # Damage becomes a wrong version, an unknown compression (NotImplementedError) or encryption (RuntimeError), too.
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        what = f"is not a readable .npz file ({error or type(error).__name__})"
        raise WinnowError(what, where=url, do="Download or create it again.") from error


def _header(archive: zipfile.ZipFile, name: str, url: str) -> tuple[Any, tuple[tuple[int, int], bool, np.dtype]]:
    """The opened member, and (shape, Fortran order, dtype) of the array in it. Nothing is unpickled."""
    try:
        file = archive.open(f"{name}.npy")
    except KeyError:
        known = ", ".join(sorted(item.removesuffix(".npy") for item in archive.namelist()))
        raise WinnowError(f'holds no array "{name}"', where=url, do=f"It holds: {known}.") from None
    try:
        shape, fortran, dtype = read_header(file)
    except ValueError as error:
        raise WinnowError(f"{name} is not a NumPy array ({error})", where=url) from error
    if len(shape) != 2 or dtype.kind != "f":
        raise WinnowError(f"{name} is {dtype} of shape {shape}, not a matrix of floats", where=url)
    return file, ((shape[0], shape[1]), fortran, dtype)
