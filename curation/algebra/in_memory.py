"""Trees of filters on a table in memory, without a pool on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from winnow.curation.algebra.fit import Survivors, columns_of, fit_tree
from winnow.curation.algebra.funnel import TreeEvaluator
from winnow.curation.algebra.nodes import Node
from winnow.curation.columns.table import State, View, with_fixed_lists
from winnow.curation.filters.base import Filter
from winnow.infra.errors import UsageError
from winnow.infra.io.arrow import mask_array, plain


class TableView(View):
    """The columns of a table, as a filter's `fit` reads those of a pool. `parent` is the table it is a part of."""

    def __init__(self, table: pa.Table, parent: TableView | None = None) -> None:
        super().__init__(pool=None)  # type: ignore[arg-type]
        object.__setattr__(self, "data", table)
        object.__setattr__(self, "parent", parent)

    data: pa.Table
    parent: TableView | None

    def __len__(self) -> int:
        return int(self.data.num_rows)

    @property
    def whole(self) -> View:
        return self.parent or self

    def check(self, columns: Sequence[str]) -> None:
        names = self.data.column_names
        if missing := [column for column in columns if column not in names]:
            raise UsageError(f'the table has no column "{missing[0]}"', do=f"It has: {', '.join(sorted(names))}.")

    def knows(self, column: str) -> bool:
        return True

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        self.check(columns)
        yield self.data.select(list(dict.fromkeys(columns)))

    def shards(self, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        return (("table", batch) for batch in self.batches(columns))


@dataclass(frozen=True)
class Fitted:
    """A tree of filters that was fitted to a table. `states` has what each filter learned, in order."""

    node: Node
    states: tuple[State, ...]

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """What each filter reports about its fit, by its expression: a threshold, say."""
        pairs = zip(self.node.filters(), self.states, strict=True)
        return {str(item): report for item, state in pairs if (report := item.report(state))}

    def mask(self, data: Any) -> np.ndarray:
        """Which rows the tree keeps.

        Args:
            data: a pyarrow Table or a pandas DataFrame with the columns that the filters read.

        Returns:
            bool, shape [n].

        Raises:
            UsageError: a column is missing.
        """
        table = as_table(data)
        TableView(table).check(columns_of(self.node))
        return TreeEvaluator(self.node, self.states).mask(table)


def fit(node: Node, data: Any) -> Fitted:
    """Fit a tree of filters to a table: thresholds of fractions, clusters, duplicates.

    Args:
        node: the tree.
        data: a pyarrow Table or a pandas DataFrame. Columns are named as filters name them: those of the pool (`text`,
            `original_width`) and measured ones (`clip.score`).

    Raises:
        UsageError: a column is missing, or a filter compares with a target set, which takes a recipe.

    Example:
        >>> import pyarrow as pa, winnow
        >>> table = pa.table({"clip.score": [0.31, 0.12, 0.25, 0.28]})
        >>> best = winnow.fit(winnow.ClipScore(fraction=0.25), table)
        >>> best.mask(table).tolist()
        [True, False, False, True]
    """
    table = as_table(data)
    for item in node.filters():
        if item.targets():
            raise UsageError(f"{item.name} compares with a target set", do="Run it in a recipe, or `winnow curate`.")
    view = TableView(table)
    view.check(columns_of(node))

    def fit_one(item: Filter, seen: View) -> State:
        if not isinstance(seen, Survivors):
            return item.fit(view)
        kept = TreeEvaluator(seen.node, seen.states).mask(table)
        return item.fit(TableView(table.filter(mask_array(kept)), view))

    return Fitted(node, tuple(fit_tree(node, view, fit_one)))


def apply(node: Node | Fitted, data: Any) -> Any:
    """The rows of a table that a tree of filters keeps.

    Args:
        node: the tree, which is fitted to the same table; or what `fit` returned.
        data: a pyarrow Table or a pandas DataFrame.

    Returns:
        a table or data frame as given, with fewer rows.

    Example:
        >>> import pyarrow as pa, winnow
        >>> tree = winnow.parse_filters({"clip_score": {"threshold": 0.3}})
        >>> winnow.apply(tree, pa.table({"clip.score": [0.31, 0.12, None]}))["clip.score"].to_pylist()
        [0.31]
    """
    fitted = node if isinstance(node, Fitted) else fit(node, data)
    mask = fitted.mask(data)
    return data.filter(mask_array(mask)) if isinstance(data, pa.Table) else data[mask]


def as_table(data: Any) -> pa.Table:
    """A pyarrow Table, in plain types and with embeddings as lists of fixed size, of a Table or a pandas DataFrame."""
    if isinstance(data, pa.Table):
        return with_fixed_lists(plain(data))
    if hasattr(data, "to_numpy") and hasattr(data, "columns"):
        return with_fixed_lists(plain(pa.Table.from_pandas(data, preserve_index=False)))
    raise UsageError(f"a pyarrow Table or a pandas DataFrame is wanted, this is a {type(data).__name__}")
