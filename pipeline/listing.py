"""`winnow ls`: what is registered, read off the registries."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from winnow.curation.filters.base import parameter_name
from winnow.curation.measures.base import Measure
from winnow.infra.registry import Registry, config_fields, unknown

_BY_SCORER = ("encoder", "digest")


def listing(what: str) -> str:
    """A plain-text table. Raises UsageError for another word."""
    tables = {
        "filters": _filters,
        "measures": _measures,
        "objectives": _objectives,
        "tasks": _tasks,
        "protocols": _protocols,
        "recipes": _recipes,
    }
    if what not in tables:
        raise unknown("list", what, tables)
    rows = tables[what]()
    return blocks(rows) if what in ("filters", "measures") else aligned(rows)


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as columns of equal width."""
    if not rows:
        return "(none)"
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def blocks(rows: Sequence[tuple[str, ...]]) -> str:
    """A paragraph a row: the first cell, then the others under it by the names that the first row has for them."""
    names, width = rows[0][1:], max(len(name) for name in rows[0])
    indent = " " * (width + 4)
    found = []
    for head, *cells in rows[1:]:
        lines = [
            textwrap.fill(f"  {name.ljust(width)}  {cell or '(none)'}", 100, subsequent_indent=indent)
            for name, cell in zip(names, cells, strict=True)
        ]
        found.append("\n".join([head, *lines]))
    return "\n\n".join(found)


def parameters(kind: Any) -> str:
    """`name=default` of a dataclass's fields; a name alone must be given. The recipe's scorer is not a parameter."""
    parts = []
    for item in fields(kind):
        if item.name in _BY_SCORER and issubclass(kind, Measure):
            continue
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        name = parameter_name(item)
        parts.append(name if default is MISSING else f"{name}={default}")
    return ", ".join(parts)


def _needs(kind: Any) -> str:
    """The columns a filter reads."""
    return ", ".join(kind(**kind.example).columns())


def _filters() -> Sequence[tuple[str, ...]]:
    from winnow.curation.filters import FILTERS

    rows = [("name", "paper", "needs", "parameters")]
    for name in FILTERS.names():
        kind = FILTERS.load(name)
        rows.append((name, kind.paper, _needs(kind), parameters(kind)))
    return rows


def _measures() -> Sequence[tuple[str, ...]]:
    from winnow.curation.measures import MEASURES

    rows = [("name", "what", "reads", "parameters")]
    for name in MEASURES.names():
        kind = MEASURES.load(name)
        files = [word for word, wanted in (("pixels", kind.pixels), ("files", kind.encoded)) if wanted]
        reads = ", ".join([*files, *kind.reads, *kind.derived])
        rows.append((name, kind.summary, reads, parameters(kind)))
    return rows


def _objectives() -> Sequence[tuple[str, ...]]:
    from winnow.pretrain.objectives import OBJECTIVES

    return [("name", "parameters", "file"), *[_objective(OBJECTIVES, name) for name in OBJECTIVES.names()]]


def _objective(registry: Registry, name: str) -> tuple[str, ...]:
    path = registry.path(name)
    return name, ", ".join(config_fields(path)), path.partition(":")[0].replace(".", "/") + ".py"


def _tasks() -> Sequence[tuple[str, ...]]:
    from winnow.evaluate.tasks.read import datacomp_tasks

    rows = [("name", "kind", "group", "metric", "classes", "scored")]
    for task in datacomp_tasks().values():
        scored = "yes" if task.scored else "no"
        rows.append((task.key, task.kind, task.group, task.metric or "", str(task.classes or ""), scored))
    return rows


def _protocols() -> Sequence[tuple[str, ...]]:
    from winnow.evaluate.protocols import PROTOCOLS

    rows = [("name", "needs", "seeds", "kinds of task")]
    for name in PROTOCOLS.table:
        protocol = PROTOCOLS.load(name)
        seeds = ", ".join(map(str, protocol.seeds))
        rows.append((name, ", ".join(sorted(protocol.needs)), seeds, ", ".join(sorted(protocol.kinds))))
    return rows


def _recipes() -> Sequence[tuple[str, ...]]:
    rows = []
    for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        rows.append((path.stem, first))
    return rows
