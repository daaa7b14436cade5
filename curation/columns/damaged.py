"""Folders of metadata of which some files cannot be read: what is made of the others, and how much is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from winnow.curation.columns.table import View, measure_of
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.prefetch import prefetch
from winnow.infra.pool.pool import Shard
from winnow.infra.stages.stage import Skipped

T = TypeVar("T")
Faults = Mapping[str, WinnowError]  # by shard


def without_damaged(
    view: View, columns: Sequence[str], work: Callable[[View], T], read: bool = True
) -> tuple[T, Faults]:
    """What `work` gives of a view. Where it fails over files of a folder of metadata, `work` is done once more, on the
    view without the shards that lack one of the columns or, with `read`, whose columns cannot be read. These are
    returned with the reason.

    Raises:
        WinnowError: of `work`, where no file or every file is damaged.
    """
    try:
        return work(view), {}
    except UsageError:
        raise
    except WinnowError as error:
        if view.pool.images or (read and error.where in (None, view.pool.url)):
            raise
        faults = _faults(view, columns, read)
        if not 0 < len(faults) < len(view.pool.shards):
            raise
    return work(replace(view, pool=view.pool.without(faults))), faults


def _faults(view: View, columns: Sequence[str], read: bool) -> dict[str, WinnowError]:
    def fault(shard: Shard) -> WinnowError | None:
        try:
            present = shard.columns()
            if read:
                view.table(shard, columns)
            elif missing := [name for name in columns if measure_of(name) is None and name not in present]:
                return WinnowError(f'has no column "{missing[0]}"', where=shard.view)
        except WinnowError as error:
            return error
        return None

    found = zip(view.pool.shards, prefetch(fault, view.pool.shards), strict=True)
    return {shard.name: error for shard, error in found if error is not None}


def lost_samples(view: View, faults: Faults) -> list[Skipped]:
    """The samples of the damaged shards: as many as the parquet says, else as the other shards have on average."""
    if not faults:
        return []
    sizes = {shard.name: _rows(shard) for shard in view.pool.shards}
    known = [size for name, size in sizes.items() if size is not None and name not in faults]
    lost = []
    for name, error in faults.items():
        size = sizes[name] or round(sum(known) / max(len(known), 1))
        reason = f"{storage.name_of(error.where or name)}: {error.what}"
        lost.append(Skipped(name, reason, str(error), max(size, 1)))
    return lost


def _rows(shard: Shard) -> int | None:
    try:
        return shard.rows
    except WinnowError:
        return None
