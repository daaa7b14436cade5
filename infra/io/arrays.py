"""Matrices of embeddings that a user gives: centroids and target sets in .npy files, features in columns."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage

_TOLERANCE = 0.01  # of a norm; rounding to float16 changes it by less than 0.001
_ROWS = 256  # converted at a time, so that they stay in the cache


def read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of a .npy file that is open at its start. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def is_array(url: str) -> bool:
    """Whether a parameter names an array file and not a folder."""
    return url.endswith(".npy")


def matrix_shape(url: str) -> tuple[int, int]:
    """(rows, dimensions) of the matrix in a .npy file. Only the header is read.

    Raises:
        WinnowError: there is no such file, or it is not a .npy file, or not a matrix of floating-point numbers.
    """
    do = "Save the embeddings with `numpy.save`, float16 or float32, shape [rows, dimensions]."
    try:
        with storage.open_read(url) as file:
            shape, _, kind = read_header(file)
    except (ValueError, EOFError) as error:
        raise WinnowError(f"is not a .npy file ({error})", where=url, do=do) from None
    if len(shape) != 2 or kind.kind != "f":
        raise WinnowError(f"holds {kind} of shape {list(shape)}, not a matrix of embeddings", where=url, do=do)
    return shape[0], shape[1]


def load_matrix(url: str) -> np.ndarray:
    """The matrix in a .npy file, shape [rows, dimensions]; memory-mapped if the file is on a local disk.

    Raises:
        WinnowError: as for `matrix_shape`; or the file is truncated.
    """
    matrix_shape(url)
    try:
        if storage.is_local(url):
            return np.load(storage.local_path(url), mmap_mode="r", allow_pickle=False)
        return np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise WinnowError(f"cannot be read as an array ({error})", where=url) from None


def usable_rows(matrix: np.ndarray) -> np.ndarray:
    """Which embeddings have a direction: finite in every element, and not all 0. bool [n]; `matrix` [n, d], floats."""
    if matrix.dtype == np.float16:  # as integers, whose order is that of the magnitudes
        bits = (matrix.view(np.uint16) & 0x7FFF).max(axis=1, initial=0)
        return (bits > 0) & (bits < 0x7C00)
    largest = np.abs(matrix).max(axis=1, initial=0)
    return (largest > 0) & (largest < np.inf)


def check_normalised(matrix: np.ndarray, usable: np.ndarray, what: str, where: str | None = None) -> None:
    """Refuse embeddings that are not L2-normalised, because inner products are taken for cosines.

    Args:
        matrix: floats, shape [n, d].
        usable: the rows that are looked at, bool [n].
        what, where: the name of the embeddings, and the file that holds them.

    Raises:
        WinnowError: a norm differs from 1 by more than 0.01.
    """
    squared = np.ones(len(matrix), np.float32)
    for start in range(0, len(matrix), _ROWS):
        rows = slice(start, start + _ROWS)
        block = matrix[rows].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            np.einsum("nd,nd->n", block, block, out=squared[rows])
    norm = np.sqrt(squared[usable])
    if wrong := int(np.count_nonzero(np.abs(norm - 1) > _TOLERANCE)):
        norms = f"norms {norm.min():.3g} to {norm.max():.3g}"
        found = f"{what}: {wrong:,} of {len(norm):,} embeddings are not L2-normalised ({norms})"
        raise WinnowError(found, where=where, do="Divide each embedding by its L2 norm.")
