"""Reading parquet files.

`pyarrow.parquet.read_table` is not used: the threads of its scanner release a Python file some time after it has
returned, and an interpreter that ends before then is aborted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.content import LFS_POINTER, is_lfs_pointer


def open_parquet(url: str) -> pq.ParquetFile:
    """Open a parquet file; Arrow itself reads local ones. Raises WinnowError when it is not one."""
    try:
        if storage.is_local(url):
            return pq.ParquetFile(str(storage.local_path(url)), pre_buffer=False)
        return pq.ParquetFile(storage.open_read(url))
    except FileNotFoundError:
        raise WinnowError("no such file", where=url) from None
    except (pa.ArrowException, OSError) as error:
        raise unreadable(url, error) from error


def read_parquet(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A parquet file, or some of its columns. Raises WinnowError when it is truncated or not one."""
    with open_parquet(url) as parquet:
        try:
            return parquet.read(columns=None if columns is None else list(columns))
        except (pa.ArrowException, OSError) as error:
            raise unreadable(url, error) from error


def unreadable(url: str, error: Exception) -> WinnowError:
    """The error for a truncated or damaged parquet file."""
    with contextlib.suppress(WinnowError, OSError), storage.open_read(url) as file:
        if is_lfs_pointer(file.read(60)):
            return WinnowError(f"is {LFS_POINTER}", where=url)
    return WinnowError(f"is not a readable parquet file ({error})", where=url, do="Download or create it again.")
