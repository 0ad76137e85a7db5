"""Small line charts of a run's metrics, as SVG images inside data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#1f6f8b", "#d1495b", "#edae49", "#6a7b8b", "#5b8c5a", "#8e6c8a", "#c08552", "#3d5a80")
MOST_POINTS = 800
SMOOTHED_FROM = 60
"""Points; a longer line is drawn faintly below its running mean."""

Series = Mapping[int, float]
"""Step -> value."""


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    lines: Mapping[str, Series]
    log: bool = False
    """A logarithmic axis, if all values are positive."""
    markers: frozenset[str] = field(default_factory=frozenset)
    """Lines of few points, each of which is marked."""


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def draw(chart: Chart) -> str:
    """The chart as a data URI."""
    # Text as outlines looks the same everywhere; a fixed salt makes equal charts equal files.
    with matplotlib.rc_context({"svg.hashsalt": "headwater", "font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axis = figure.add_subplot()
        for color, (label, series) in zip(COLORS * len(chart.lines), chart.lines.items(), strict=False):
            _line(axis, label, series, color, marked=label in chart.markers)
        values = [value for series in chart.lines.values() for value in series.values() if np.isfinite(value)]
        if chart.log and values and min(values) > 0:
            axis.set_yscale("log")
        axis.set_title(chart.title, loc="left")
        axis.set_xlabel("update")
        axis.set_ylabel(chart.unit)
        axis.grid(axis="y", color="#e6e9ec", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if len(chart.lines) > 1:
            axis.legend(frameon=False, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return data_uri(buffer.getvalue(), "svg+xml")


def _line(axis: Axes, label: str, series: Series, color: str, *, marked: bool) -> None:
    steps, values = np.array(list(series)), np.array(list(series.values()), float)
    steps, values = thinned(steps, MOST_POINTS), thinned(values, MOST_POINTS)
    if marked or len(values) < SMOOTHED_FROM:
        axis.plot(steps, values, color=color, lw=1.4, marker="o" if marked or len(values) < 3 else None, ms=4, label=label)
        return
    axis.plot(steps, values, color=color, lw=0.7, alpha=0.3)
    axis.plot(steps, running_mean(values, len(values) // 20), color=color, lw=1.6, label=label)


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """At most `most` means of neighbours; NaN counts for nothing, unless there is nothing else."""
    if len(values) <= most:
        return values
    parts = np.array_split(values, most)
    return np.array([part[known].mean() if (known := np.isfinite(part)).any() else np.nan for part in parts])


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Of the finite values up to `reach` away on either side."""
    known = np.isfinite(values)
    window = np.ones(2 * reach + 1)
    total = np.convolve(np.where(known, values, 0.0), window, "full")[reach : reach + len(values)]
    count = np.convolve(known, window, "full")[reach : reach + len(values)]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)
