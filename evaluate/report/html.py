"""The comparison as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from winnow.evaluate.report.pool_view import SubsetView, funnel_rows
from winnow.evaluate.report.tables import fraction, groups_shown, notes, number
from winnow.evaluate.statistics.aggregate import headline

TEMPLATE = Path(__file__).with_name("report.html.j2")


def render(
    result: Mapping[str, Any],
    funnels: Mapping[str, Mapping[str, Any]],
    views: Mapping[str, SubsetView],
    provenance: Sequence[tuple[str, str]],
    drawn: Sequence[tuple[str, str, bytes]] = (),
) -> str:
    """The page. What comes from data (captions, class and subset names, labels) is escaped.

    Args:
        result: of `aggregate.compare`, with the `missing` of the scores.
        funnels, views: `funnel.json` of each subset; and those against their pool, where the pool is at hand.
        provenance, drawn: (what, digest); and (subset, what, PNG) of images that models have drawn.
    """
    import jinja2
    from markupsafe import Markup

    from winnow.evaluate.report import plots

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": number, "share": fraction, "count": "{:,}".format}
    names = list(funnels)
    ranked = [row["subset"] for row in result["rows"]]
    colour = plots.colours(names, result["baseline"])
    by_name = {row["subset"]: row for row in result["rows"]}
    bars = []
    for key, facts in result["tasks"].items():
        pairs = [(name, by_name[name]["tasks"].get(key)) for name in ranked]
        svg = plots.task_bars(f"{facts['name']}: {facts['metric']} of each subset", pairs, facts["chance"], colour)
        bars.append({"facts": facts, "svg": Markup(svg)})
    points = [(row["subset"], row["size"], row["average"]) for row in result["rows"] if row["average"]]
    scatter = plots.size_scatter(points, result["average"]["name"], colour) if points else ""
    noise = {name: views[name].noise() for name in ranked if name in views}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        result=result,
        headline=headline(result),
        groups=groups_shown(result),
        best={where: {key: _best(result, where, key) for key in result[where]} for where in ("groups", "tasks")},
        notes=notes(result),
        bars=bars,
        scatter=Markup(scatter),
        funnels=[{**funnels[name], "name": name, "rows": funnel_rows(funnels[name]["tree"])} for name in ranked],
        noise={name: table for name, table in noise.items() if table and table["noisy"]},
        images=[(name, views[name]) for name in ranked if name in views],
        drawn=[(name, what, base64.b64encode(png).decode()) for name, what, png in drawn],
        provenance=provenance,
        colour=colour,
    )


def _best(result: Mapping[str, Any], where: str, key: str) -> list[str]:
    """Names of the subsets with the highest value of a task or group."""
    values = {row["subset"]: row[where][key]["value"] for row in result["rows"] if key in row[where]}
    return [name for name, value in values.items() if value == max(values.values())]
