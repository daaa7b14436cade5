"""`winnow ls`: what is registered, read off the registries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from infra.registry import Registry, config_fields, unknown


def listing(what: str) -> str:
    """A plain-text table. Raises UsageError for another word."""
    tables = {
        "filters": _filters,
        "measures": _measures,
        "objectives": _objectives,
        "tasks": _tasks,
        "recipes": _recipes,
    }
    if what not in tables:
        raise unknown("list", what, tables)
    return aligned(tables[what]())


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as columns of equal width."""
    if not rows:
        return "(none)"
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def parameters(kind: Any) -> str:
    """`name=default` of a dataclass's fields; a name alone must be given."""
    parts = []
    for item in fields(kind):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        parts.append(item.name if default is MISSING else f"{item.name}={default}")
    return ", ".join(parts)


def _needs(kind: Any) -> str:
    """The columns a filter reads, with the parameters it must be given made up."""
    example: dict[str, Any] = {
        item.name: "x" for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING
    }
    if kind.__name__ == "ClipScore":
        example["fraction"] = 0.3
    return ", ".join(kind(**example).columns())


def _filters() -> Sequence[tuple[str, ...]]:
    from curation.filters import FILTERS

    rows = [("name", "needs", "parameters", "paper")]
    for name in FILTERS.names():
        kind = FILTERS.load(name)
        rows.append((name, _needs(kind), parameters(kind), kind.paper))
    return rows


def _measures() -> Sequence[tuple[str, ...]]:
    from curation.measures import MEASURES

    rows = [("name", "reads", "parameters", "what")]
    for name in MEASURES.names():
        kind = MEASURES.load(name)
        reads = ", ".join([*(["pixels"] if kind.pixels else []), *kind.reads])
        rows.append((name, reads, parameters(kind), kind.summary))
    return rows


def _objectives() -> Sequence[tuple[str, ...]]:
    from pretrain.objectives import OBJECTIVES

    return [("name", "parameters", "file"), *[_objective(OBJECTIVES, name) for name in OBJECTIVES.names()]]


def _objective(registry: Registry, name: str) -> tuple[str, ...]:
    path = registry.path(name)
    return name, ", ".join(config_fields(path)), path.partition(":")[0].replace(".", "/") + ".py"


def _tasks() -> Sequence[tuple[str, ...]]:
    from evaluate.tasks import datacomp_tasks

    rows = [("name", "kind", "group", "metric", "classes", "scored")]
    for task in datacomp_tasks().values():
        scored = "yes" if task.scored else "no"
        rows.append((task.key, task.kind, task.group, task.metric or "", str(task.classes or ""), scored))
    return rows


def _recipes() -> Sequence[tuple[str, ...]]:
    rows = []
    for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        rows.append((path.stem, first))
    return rows
