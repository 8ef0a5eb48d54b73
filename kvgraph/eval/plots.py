"""Plots of reports, as SVG text for a page: no scripts, fonts or network.

Text is drawn as shapes, so its width is the same on every machine. Text and axes take the page's own colour
(`currentColor`), so one plot works on light and dark pages. Methods differ in marker and line as well as in colour.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kvgraph.eval.stats import Interval

NARROW, WIDE = 5.2, 9.8  # inches
CHARACTERS = 58  # of tick labels side by side in a narrow figure
INK, FAINT = "#010203", "#040506"  # placeholders for the page's text colour, and for the same at FAINT_OPACITY
FAINT_OPACITY = 0.25
# Okabe and Ito's colours for colour-blind readers, without those that vanish on white or black, and three more. There
# are more colours than markers, so that methods of one colour differ in their marker.
COLORS = ("#1b81c4", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c8c8c", "#a6611a", "#8f6fd6")
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
SETTINGS: Any = {
    "svg.fonttype": "path", "svg.hashsalt": "kvgraph", "font.family": "DejaVu Sans", "font.size": 9,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": FAINT, "grid.linewidth": 0.6, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip

Point = tuple[float, Interval]


class Style(NamedTuple):
    """How a method looks, in every plot of a report."""

    color: str
    marker: str
    dashes: Any


class Panel(NamedTuple):
    """One pair of axes. series: label -> points (x, score); `lines` connects them. log: for x."""

    xlabel: str
    series: Mapping[str, Sequence[Point]]
    lines: bool = True
    log: bool = False


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A look for each label, by its place in the list; the first 32 all differ."""
    return {
        label: Style(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])
        for i, label in enumerate(labels)
    }


def svg(panels: Sequence[Panel], ylabel: str, looks: Mapping[str, Style], title: str) -> str:
    """Panels side by side over one score axis, with 95 % intervals and one legend. title: for screen readers."""
    file = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        metadata = dict.fromkeys(("Date", "Creator", "Type", "Format"))
        draw(panels, ylabel, looks).savefig(file, format="svg", transparent=True, metadata=metadata)
    return _embeddable(file.getvalue(), title)


def draw(panels: Sequence[Panel], ylabel: str, looks: Mapping[str, Style]) -> Figure:
    """The figure that `svg` writes."""
    with matplotlib.rc_context(SETTINGS):
        labels = [label for label in looks if any(panel.series.get(label) for panel in panels)]
        columns = _columns(labels, panels)
        height = 3.1 + 0.2 * -(-len(labels) // columns)
        figure = Figure(figsize=(WIDE if is_wide(panels) else NARROW, height))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw(axis, panel, looks, labels)
        axes[0].set_ylabel(ylabel)
        _score_axis(axes[0], panels)
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=columns)
    return figure


def is_wide(panels: Sequence[Panel]) -> bool:
    """Whether a figure takes the page's whole width: for two panels, or for more intervals than fit in half of it."""
    return len(panels) > 1 or sum(map(len, panels[0].series.values())) > 40


def _columns(labels: Sequence[str], panels: Sequence[Panel]) -> int:
    """Legend columns that fit: about 14 characters an inch, 6 of them for a handle."""
    return max(1, min(len(labels), int(14 * (WIDE if is_wide(panels) else NARROW)) // (6 + max(map(len, labels)))))


def _draw(axis: Any, panel: Panel, looks: Mapping[str, Style], labels: Sequence[str]) -> None:
    values = sorted({x for points in panel.series.values() for x, _ in points})
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    drawn = [label for label in labels if panel.series.get(label)]
    for i, label in enumerate(drawn):
        color, marker, dashes = looks[label]
        # Series over the same few values are shifted sideways, or their intervals would hide each other.
        aside = 0.0 if not panel.lines else 0.3 * step * ((i + 0.5) / len(drawn) - 0.5)
        points = sorted(panel.series[label], key=lambda point: point[0])
        means = [100 * score.mean for _, score in points]
        below = [max(0.0, 100 * (score.mean - score.low)) for _, score in points]
        above = [max(0.0, 100 * (score.high - score.mean)) for _, score in points]
        axis.errorbar(
            [x + aside for x, _ in points], means, (below, above), label=label, color=color, marker=marker,
            linestyle=dashes if panel.lines else "none", markersize=5, linewidth=1.3, elinewidth=0.9, capsize=2,
        )  # fmt: skip
    axis.set_xlabel(panel.xlabel)
    if panel.log:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(_number))
        axis.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
    elif panel.lines and max(map(len, map(_number, values))) < CHARACTERS * step / max(step, values[-1] - values[0]):
        axis.set_xticks(values, map(_number, values))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(FuncFormatter(_number))


def _number(value: float, _: Any = None) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _score_axis(axis: Any, panels: Sequence[Panel]) -> None:
    """From a little below the lowest interval to a little above the highest, within 0 and 100."""
    scores = [score for panel in panels for points in panel.series.values() for _, score in points]
    low, high = 100 * min(s.low for s in scores), 100 * max(s.high for s in scores)
    room = max(0.05 * (high - low), 1.0)
    axis.set_ylim(max(-1.0, low - room), min(101.0, high + room))


def _embeddable(text: str, title: str) -> str:
    """The <svg> element with the page's colours, ids of its own, and a width that follows the page."""
    element = text[text.index("<svg") :]
    own = "p" + hashlib.sha256((title + element).encode()).hexdigest()[:8] + "-"
    for before in (' id="', 'href="#', "url(#"):
        element = element.replace(before, before + own)
    element = element.replace(FAINT, f"currentColor; stroke-opacity: {FAINT_OPACITY}").replace(INK, "currentColor")
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return element.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
