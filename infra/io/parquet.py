"""Reading parquet files.

`pyarrow.parquet.read_table` is not used: the threads of its scanner release a Python file some time after it has
returned, and an interpreter that ends before then is aborted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.content import LFS_POINTER, is_lfs_pointer

MAX_BYTES = 4 << 30  # of a file that is read as a whole


def open_parquet(url: str) -> pq.ParquetFile:
    """Open a parquet file; Arrow itself reads local ones. Raises WinnowError when it is not one, or has two columns of
    one name."""
    try:
        if storage.is_local(url):
            options: dict[str, Any] = {"pre_buffer": False, "page_checksum_verification": True}
            parquet = pq.ParquetFile(str(storage.local_path(url)), **options)
        else:
            parquet = pq.ParquetFile(storage.open_read(url), page_checksum_verification=True)
        names = parquet.schema_arrow.names
    except FileNotFoundError:
        raise WinnowError("no such file", where=url) from None
    except (pa.ArrowException, OSError) as error:
        raise unreadable(url, error) from error
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        parquet.close()
        raise WinnowError(f'has {names.count(name)} columns called "{name}"', where=url, do="Rename or drop one.")
    return parquet


def read_parquet(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A parquet file, or some of its columns. Raises WinnowError when it is truncated, not one or too large."""
    with open_parquet(url) as parquet:
        groups = map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups))
        if columns is None and (size := sum(group.total_byte_size for group in groups)) > MAX_BYTES:
            raise WinnowError(f"unpacks to {size:,} bytes, and at most {MAX_BYTES:,} are read", where=url)
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
