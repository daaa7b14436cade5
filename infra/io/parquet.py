"""Reading parquet files.

Not by `pyarrow.parquet.read_table`: its scanner's threads let go of a Python file some time after it has returned, and
an interpreter that ends before they do is aborted.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage


def open_parquet(url: str) -> pq.ParquetFile:
    """Open a parquet file, a local one without the detour through Python. Raises WinnowError when it is none."""
    try:
        if storage.is_local(url):
            return pq.ParquetFile(str(storage.local_path(url)), pre_buffer=False)
        return pq.ParquetFile(storage.open_read(url))
    except FileNotFoundError:
        raise WinnowError("no such file", where=url) from None
    except (pa.ArrowException, OSError) as error:
        raise unreadable(url, error) from error


def read_parquet(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole parquet file, or some columns of it. Raises WinnowError when it is none, or is cut."""
    with open_parquet(url) as parquet:
        try:
            return parquet.read(columns=None if columns is None else list(columns))
        except (pa.ArrowException, OSError) as error:
            raise unreadable(url, error) from error


def unreadable(url: str, error: Exception) -> WinnowError:
    """The error for a parquet file that is cut or garbled."""
    return WinnowError(f"is not a readable parquet file ({error})", where=url, do="Fetch or make it again.")
