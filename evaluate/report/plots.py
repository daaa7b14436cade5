"""Plots as inline SVG, in the fonts and colours of the page; equal numbers give equal bytes."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Drawn in these, then exchanged for the page's CSS variables, so that a plot follows light and dark.
_INK, _FAINT = "#010203", "#040506"
# Okabe and Ito's palette, which colour-blind readers can distinguish; the baseline is grey.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a800")
_GREY = "#8a8f98"


def colours(names: Sequence[str], baseline: str) -> dict[str, str]:
    """A colour for each subset, in the order given."""
    others = [name for name in names if name != baseline]
    found = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(others)}
    return found | {baseline: _GREY}


def _style() -> Any:  # rc parameters; their names are matplotlib's to check
    return {
        "svg.hashsalt": "winnow",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _FAINT,
        "axes.labelcolor": _INK,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "text.usetex": False,
        "text.parse_math": False,
    }


def _svg(figure: Any, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = text.replace(_INK, "var(--ink)").replace(_FAINT, "var(--rule)")
    text = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font-size: \1", text)
    # Scale with the page instead of a fixed size in points.
    text = re.sub(r'(<svg[^>]*?) width="([0-9.]+)pt"', r'\1 style="max-width:\2pt"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[0-9.]+pt"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{_attribute(label)}"', 1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def _shorten(text: str, limit: int = 22) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextlib.contextmanager
def _axes(width: float, height: float) -> Iterator[Any]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style()):
        yield Figure(figsize=(width, height), layout="constrained").add_subplot()


def task_bars(
    label: str, rows: Sequence[tuple[str, Mapping[str, float] | None]], chance: float | None, colour: Mapping[str, str]
) -> str:
    """Horizontal bars of one task, one a subset, with error bars of one standard error and a dashed line at chance."""
    with _axes(3.6, 0.45 + 0.24 * len(rows)) as axes:
        for at, (name, pair) in enumerate(rows):
            if pair is None:
                axes.text(0, at, " missing", va="center", fontsize=8)
                continue
            axes.barh(at, pair["value"], xerr=pair["stderr"], height=0.68, color=colour[name], ecolor=_INK, capsize=0)
            end = (pair["value"] + pair["stderr"], at)
            style = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{pair['value']:.3f}", end, xytext=(4, 0), **style)
        if chance is not None:
            axes.axvline(chance, color=_INK, linestyle=(0, (3, 2)), linewidth=0.8)
        axes.set_yticks(range(len(rows)), [_shorten(name) for name, _ in rows])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        top = max([chance or 0.0, *(pair["value"] + pair["stderr"] for _, pair in rows if pair)])
        axes.set_xlim(0, max(top * 1.22, 1e-3))
        axes.locator_params(axis="x", nbins=4)
        return _svg(axes.figure, label)


def size_scatter(
    rows: Sequence[tuple[str, int, Mapping[str, float]]], average_name: str, colour: Mapping[str, str]
) -> str:
    """Size of each subset against its average, with error bars of one standard error."""
    with _axes(5.0, 3.0) as axes:
        for name, size, pair in rows:
            style = {"fmt": "o", "markersize": 7, "color": colour[name], "elinewidth": 1.2}
            axes.errorbar(size, pair["value"], yerr=pair["stderr"], **style)
            at = (size, pair["value"])
            axes.annotate(_shorten(name, 30), at, xytext=(8, 5), textcoords="offset points", fontsize=8)
        axes.set_xlim(0, max(size for _, size, _ in rows) * 1.18 or 1)
        axes.margins(y=0.15)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel("samples in the subset")
        axes.set_ylabel(average_name)
        axes.grid(axis="y", color=_FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        return _svg(axes.figure, f"Subset size against {average_name}")
