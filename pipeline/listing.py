"""`winnow ls`: what is registered, read off the registries."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from winnow.infra.params import names_of
from winnow.infra.registry import unknown
from winnow.pipeline.printing import blocks, table


def listing(what: str) -> str:
    """A plain-text table. Raises UsageError for another word."""
    tables = {
        "filters": _filters,
        "measures": _measures,
        "objectives": _objectives,
        "tasks": _tasks,
        "protocols": _protocols,
        "kinds": _kinds,
        "recipes": _recipes,
    }
    if what not in tables:
        raise unknown("list", what, tables)
    rows = tables[what]()
    return blocks(rows) if what in ("filters", "measures", "kinds") else table(rows)


def parameters(kind: Any) -> str:
    """`name=default` of a dataclass's fields; a name alone must be given. The recipe's scorer is not a parameter."""
    parts = []
    for item in fields(kind):
        if item.name in getattr(kind, "filled", ()):
            continue
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        parts.append(item.name if default is MISSING else f"{item.name}={default}")
    return ", ".join(parts)


def _filters() -> Sequence[tuple[str, ...]]:
    from winnow.curation.filters import FILTERS

    rows = [("name", "paper", "needs", "parameters")]
    for name in FILTERS.names():
        kind = FILTERS.load(name)
        rows.append((name, kind.paper, ", ".join(kind(**kind.example).columns()), parameters(kind)))
    return rows


def _measures() -> Sequence[tuple[str, ...]]:
    from winnow.curation.measures import MEASURES

    rows = [("name", "what", "reads", "parameters")]
    for name in MEASURES.names():
        kind = MEASURES.load(name)
        files = [word for word, wanted in (("pixels", kind.pixels), ("files", kind.encoded)) if wanted]
        reads = ", ".join([*files, *kind.reads, *kind(**kind.example).derived()])
        rows.append((name, kind.summary, reads, parameters(kind)))
    return rows


def _objectives() -> Sequence[tuple[str, ...]]:
    from winnow.pretrain.objectives import OBJECTIVES

    rows = [("name", "parameters", "file")]
    for name in OBJECTIVES.names():
        file = OBJECTIVES.path(name).partition(":")[0].replace(".", "/") + ".py"
        rows.append((name, ", ".join(names_of(OBJECTIVES.load(name).Config)), file))
    return rows


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


def _kinds() -> Sequence[tuple[str, ...]]:
    from winnow.evaluate.protocols import KINDS, PROTOCOLS
    from winnow.evaluate.protocols.base import load_kind, load_protocol

    rows = [("name", "metric", "protocols", "what")]
    for name in KINDS.names():
        kind = load_kind(name)
        protocols = ", ".join(protocol for protocol in PROTOCOLS.table if load_protocol(protocol).applies(kind))
        rows.append((name, kind.metric or "", protocols, (inspect.getdoc(type(kind)) or "").splitlines()[0]))
    return rows


def _recipes() -> Sequence[tuple[str, ...]]:
    files = sorted((Path(__file__).parent / "recipes").glob("*.yaml"))
    return [("name", "what"), *((path.stem, path.read_text("utf-8").splitlines()[0].lstrip("# ")) for path in files)]
