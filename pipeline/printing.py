"""What commands print: tables, funnels, scores. Plain text where the output is not a terminal."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from winnow.infra.io.parquet import read_parquet
from winnow.infra.io.storage import join
from winnow.infra.stages.stage import need_manifest

if TYPE_CHECKING:
    from winnow.curation.algebra.funnel import NodeDecision

WIDTH = 100  # of paragraphs, characters
LONGEST = 80  # of a value in a table, characters


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows, the first of which is the header, as columns of equal width; drawn by rich on a terminal."""
    if not rows:
        return "(none)"
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        drawn, console = Table(*rows[0], box=None, pad_edge=False, header_style="bold"), Console()
        for row in rows[1:]:
            drawn.add_row(*row)
        with console.capture() as capture:
            console.print(drawn, markup=False)
        return capture.get().rstrip()
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def blocks(rows: Sequence[tuple[str, ...]]) -> str:
    """A paragraph for each row: the first cell, and below it the others with the names that the first row gives."""
    names, width = rows[0][1:], max(len(name) for name in rows[0])
    indent = " " * (width + 4)
    found = []
    for head, *cells in rows[1:]:
        lines = [
            textwrap.fill(f"  {name.ljust(width)}  {cell or '(none)'}", WIDTH, subsequent_indent=indent)
            for name, cell in zip(names, cells, strict=True)
        ]
        found.append("\n".join([head, *lines]))
    return "\n\n".join(found)


def decisions(uid: str, dropped_by: str | None, nodes: Sequence[NodeDecision]) -> str:
    """What each node of a tree decided about one sample, as an indented table below one sentence."""
    rows: list[tuple[str, ...]] = [("node", "decision", "values")]
    for node in nodes:
        facts = ", ".join(f"{name} = {_value(value)}" for name, value in node.facts.items())
        rows.append((f"{'  ' * node.depth}{node.label}", "keeps" if node.kept else "drops", facts))
    end = "kept" if dropped_by is None else f"dropped by {dropped_by}"
    return f"{uid} is {end}.\n{table(rows)}"


def funnel(counts: dict[str, Any], timings: dict[str, float]) -> str:
    """The funnel as an indented table, and below it what each filter was fitted to and the seconds that took."""
    facts: dict[str, str] = {}
    rows: list[tuple[str, ...]] = [("node", "kept", "dropped", "by it alone", "no value")]

    def walk(node: dict[str, Any], depth: int) -> None:
        cells = [f"{node[name]:,}" for name in ("kept", "dropped", "alone", "nan")]
        rows.append((f"{'  ' * depth}{node['label']}", *cells))
        if found := [f"{name} = {_value(value)}" for name, value in node.get("facts", {}).items()]:
            facts[node["label"]] = ", ".join(found)
        for child in node["children"]:
            walk(child, depth + 1)

    walk(counts["tree"], 0)
    lines = [
        f"{label}: {', '.join(filter(None, [facts.get(label), f'fitted in {seconds:.2f} s']))}"
        for label, seconds in timings.items()
        if label in facts
    ]
    return "\n".join([table(rows), *lines])


def _value(value: Any) -> str:
    if value is None:
        return "none"
    text = f"{value:.6g}" if isinstance(value, float) else f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def scores(out: str) -> str:
    """The main metrics of a finished evaluation."""
    from winnow.evaluate.history import HISTORY, earlier_states
    from winnow.evaluate.report.score_table import scores_text

    rows = read_parquet(join(out, "scores.parquet")).to_pylist()
    text = scores_text(rows, need_manifest(out, "scores").values)
    kept = [join(out, HISTORY, name) for name in earlier_states(out)]
    return "\n\n".join([text, *([f"Earlier scores of this directory are kept in {', '.join(kept)}."] if kept else [])])


def without_scores(out: str) -> list[str]:
    """Checkpoints of a finished evaluation that have no score, each with the reason."""
    scored = set(read_parquet(join(out, "scores.parquet"), ["checkpoint"])["checkpoint"].to_pylist())
    values = need_manifest(out, "scores").values
    reasons = {entry["checkpoint"]: entry["reason"] for entry in reversed(values["missing"])}
    without = [name for name in values["checkpoints"] if name not in scored and name in reasons]
    return [f"{name}: {reasons[name].rstrip('.')}" for name in without]
