"""Pools in memory for tests of filters."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from winnow.infra.pool.uids import derived_uid


class Columns:
    """A view with columns in memory: one table a shard, named `0`, `1`, … by default."""

    def __init__(self, *tables, targets=None, names=None):
        self.tables, self.targets = tables, targets or {}
        self.names = names or [str(i) for i in range(len(tables))]

    def __len__(self):
        return sum(table.num_rows for table in self.tables)

    @property
    def whole(self):
        return self

    def knows(self, column):
        return True

    def batches(self, columns):
        return (table.select(list(columns)) for table in self.tables)

    def shards(self, columns):
        return zip(self.names, self.batches(columns), strict=True)

    def target(self, name):
        return self.targets[name]


def uids(n, salt=""):
    return [derived_uid(salt, str(i)) for i in range(n)]


def sphere(rng, n, d):
    vectors = rng.normal(size=(n, d))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def embeddings(vectors, mask=None):
    """A column of float16 lists of fixed size; rows where `mask` is true are null."""
    flat = pa.array(np.asarray(vectors, np.float16).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, np.shape(vectors)[1], mask=None if mask is None else pa.array(mask))


def halves(vectors):
    """As they come back from a column: rounded to float16, as float64."""
    return np.asarray(vectors, np.float16).astype(np.float64)


def kept(node, table, parts=3, targets=None):
    """The mask of a filter fitted to a table in several shards."""
    size = -(-table.num_rows // parts)
    view = Columns(*(table.slice(at, size) for at in range(0, table.num_rows, size)), targets=targets)
    return node.mask(table, node.fit(view))
