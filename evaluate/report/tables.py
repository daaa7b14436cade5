"""The comparison as CSV and as a plain text table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from winnow.evaluate.statistics.aggregate import headline

WIDTH = 120  # characters; where the tasks do not fit next to the averages, they get a separate table, one row each


def comparison_csv(result: Mapping[str, Any]) -> str:
    """One row a subset, best first, then chance; scores in [0, 1], unrounded; each task followed by its error."""
    groups, tasks = list(result["groups"]), list(result["tasks"])
    header = ["rank", "subset", "size", "share", "seeds", result["average"]["name"], "stderr"]
    header += [f"difference to {result['baseline']}", "difference stderr"]
    header += [result["group_names"][group] for group in groups]
    header += [name for key in tasks for name in (key, f"{key} stderr")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for row in result["rows"]:
        line = [row["rank"], row["subset"], row["size"], row["share"], len(row["seeds"])]
        for pair in (row["average"] or {}, row["difference"] or {}):
            line += [pair.get("value"), pair.get("stderr")]
        line += [row["groups"].get(group, {}).get("value") for group in groups]
        for pair in (row["tasks"].get(key, {}) for key in tasks):
            line += [pair.get("value"), pair.get("stderr")]
        writer.writerow(line)
    chance = result["chance"]
    line = [None, "chance", None, None, None, chance["average"], None, None, None]
    line += [chance["groups"][group] for group in groups]
    writer.writerow([*line, *(cell for key in tasks for cell in (chance["tasks"][key], None))])
    return buffer.getvalue()


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def fraction(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def with_error(pair: Mapping[str, float] | None, sign: bool = False) -> str:
    """ "0.123 ± 0.004" """
    if pair is None:
        return "–"
    return f"{pair['value']:{'+' if sign else ''}.3f} ± {pair['stderr']:.3f}"


def comparison_text(result: Mapping[str, Any]) -> str:
    """A Markdown table with the headline above it and notes below."""
    tables = [_summary(result, list(result["tasks"]))]
    if len(tables[0].partition("\n")[0]) > WIDTH:
        tables = [_summary(result, []), _by_task(result)]
    return "\n\n".join([headline(result), *tables, *notes(result), *_earlier(result)]) + "\n"


def _earlier(result: Mapping[str, Any]) -> list[str]:
    """The scores of earlier states of the run, which those above have replaced."""
    header = ["state", "subset", "changed", "score", "before", "now", "difference"]
    lines = [
        [entry["state"], entry["subset"], entry["changed"], row["of"]]
        + [with_error(row[name], sign=name == "difference") for name in ("before", "now", "difference")]
        for entry in result.get("earlier", [])
        for row in entry["rows"]
    ]
    title = "Earlier states of this run, whose scores are in scores/history:"
    return [title, text_table(header, lines, left=(0, 1, 2, 3))] if lines else []


def _summary(result: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """One row a subset, then chance."""
    groups, chance = groups_shown(result), result["chance"]
    header = ["#", "subset", "size", "of pool", result["average"]["name"], f"vs {result['baseline']}"]
    header += [result["group_names"][group] for group in groups]
    header += [result["tasks"][key]["name"] for key in tasks]
    lines = []
    for row in result["rows"]:
        line = [str(row["rank"] or "–"), row["subset"], f"{row['size']:,}"]
        line += [fraction(row["share"]), with_error(row["average"]), with_error(row["difference"], sign=True)]
        line += [number(row["groups"].get(group, {}).get("value")) for group in groups]
        line += [number(row["tasks"].get(key, {}).get("value")) for key in tasks]
        lines.append(line)
    line = ["", "chance", "", "", number(chance["average"]), ""]
    line += [number(chance["groups"][group]) for group in groups]
    line += [number(chance["tasks"][key]) for key in tasks]
    return text_table(header, [*lines, line], left=(1,))


def groups_shown(result: Mapping[str, Any]) -> list[str]:
    """The aggregates that get a column: not ImageNet's, which is a task."""
    return [group for group in result["groups"] if group != "imagenet"]


def _by_task(result: Mapping[str, Any]) -> str:
    """One row a task, one column a subset."""
    header = ["task", "metric", "n", *(row["subset"] for row in result["rows"]), "chance"]
    lines = [
        [facts["name"], str(facts["metric"]), f"{facts['n']:,}"]
        + [number(row["tasks"].get(key, {}).get("value")) for row in result["rows"]]
        + [number(result["chance"]["tasks"][key])]
        for key, facts in result["tasks"].items()
    ]
    return text_table(header, lines, left=(0, 1))


def notes(result: Mapping[str, Any]) -> list[str]:
    """Sentences on what an average is over and what is missing."""
    found = []
    if result.get("protocol", "zeroshot") != "zeroshot":
        found.append(f"Scores are by {result['protocol']}.")
    names = {key: facts["name"] for key, facts in result["tasks"].items()}
    if result["average"]["name"] != "38-task average" and result["average"]["tasks"]:
        found.append(f"The average is over {', '.join(names[key] for key in result['average']['tasks'])}.")
    if result["not_averaged"]:
        found.append(f"Not in the average: {', '.join(names[key] for key in result['not_averaged'])}.")
    found += partial_note(result["tasks"])
    seen: dict[tuple[str, str], list[str]] = {}
    for entry in result.get("missing", []):
        seen.setdefault((entry["task"], entry["reason"]), []).append(entry["checkpoint"])
    found += [f"Missing: {task} ({reason}) for {', '.join(names)}." for (task, reason), names in seen.items()]
    return found


def partial_note(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence naming the tasks, as the evaluate manifest has them, whose scores are of part of their test set."""
    parts = [
        f"{facts['name']} ({facts['n']:,} of {facts['size']:,})"
        for facts in tasks.values()
        if facts.get("size") and facts["n"] < facts["size"]
    ]
    return [f"On part of the test set: {', '.join(parts)}."] if parts else []


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """A Markdown table with padded columns; numbers are right-aligned, the columns in `left` left-aligned."""
    cells = [[cell.replace("|", "¦").replace("\n", " ") for cell in line] for line in (header, *lines)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(header))]
    rule = "|".join("-" * (w + 1) + ("-" if i in left else ":") for i, w in enumerate(widths))

    def render(line: Sequence[str]) -> str:
        padded = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    return "\n".join([render(cells[0]), f"|{rule}|", *(render(line) for line in cells[1:])])
