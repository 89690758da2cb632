"""The figure of ``sadam calibrate``: where AdamW's denominators lie, and what each beta makes of them."""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Mapping
from typing import Any

from sadam_integrations.plots.style import BLUE, INK, ORANGE, label_axes, save
from sadam_integrations.update import LN2

GREEN = "#009E73"
BOX = {"facecolor": "#BFE7DC", "edgecolor": "none", "pad": 1}
MARKED = (50.0, 1e3, 1e4, 1e5, 1e6)
"""Fixed betas whose floors are drawn."""


def calibration_figure(advice: Mapping[str, Any], path: str | os.PathLike, title: str = "") -> None:
    """Draws the histogram of ``sqrt(v)`` with the floors on the left; floor share and learning rate on the right.

    The band holds the middle 80 % of the parameters' floors under beta="auto".

    Args:
        advice: :class:`sadam_integrations.conversion.Advice` as a dict: ``histogram``, ``betas``, ``rows``, ``lr``.
        path: The PNG to write.
        title: A line above both panels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=150, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    _histogram(left, advice)
    _settings(right, advice)
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    save(figure, path)


def _histogram(axes: Any, advice: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MultipleLocator

    edges, shares = advice["histogram"]["edges"], [100 * share for share in advice["histogram"]["shares"]]
    axes.stairs(shares, edges, fill=True, color=BLUE, zorder=2)
    top = max(shares) * 1.5
    floors = sorted(math.log10(LN2 / beta) for beta in advice["betas"].values())
    tenths = statistics.quantiles(floors, n=10) if len(floors) > 1 else floors * 2
    axes.axvspan(tenths[0] - 0.02, tenths[-1] + 0.02, color=GREEN, alpha=0.25, linewidth=0, zorder=1)
    words: dict[str, Any] = {"fontsize": 9, "fontweight": "bold", "ha": "center", "zorder": 4}
    middle = (tenths[0] + tenths[-1]) / 2
    axes.text(middle, top * 0.97, 'floors of\nbeta="auto"', color=GREEN, va="top", bbox=BOX, **words)
    reached = list(itertools.accumulate(shares))
    low, high = (next(e for e, total in zip(edges, reached, strict=False) if total >= q) for q in (0.3, 99.7))
    low, high = min(low, tenths[0]) - 0.3, max(high, tenths[-1], math.log10(LN2 / MARKED[0])) + 0.6
    for beta in MARKED:
        floor = math.log10(LN2 / beta)
        if low < floor < high:
            axes.axvline(floor, color=ORANGE, linewidth=1.4, linestyle="--", zorder=3)
            label = f"beta={beta:g}" if beta == MARKED[0] else f"$10^{{{round(math.log10(beta))}}}$"
            axes.text(floor, top * 1.01, label, color=ORANGE, va="bottom", **words)
    label_axes(axes, r"$\sqrt{v}$", "Coordinates, %")
    axes.set_xlim(low, high)
    axes.set_ylim(0, top)
    axes.xaxis.set_major_locator(MultipleLocator(1 if high - low < 6 else 2))
    axes.xaxis.set_major_formatter(lambda value, position: f"$10^{{{value:g}}}$")


def _settings(axes: Any, advice: Mapping[str, Any]) -> None:
    fixed = [row for row in advice["rows"] if not isinstance(row["beta"], str)]
    betas = [row["beta"] for row in fixed]
    other = axes.twinx()
    axes.plot(betas, [100 * row["floor_share"] for row in fixed], color=BLUE, marker="o", markersize=4)
    other.plot(betas, [row["lr_factor"] for row in fixed], color=ORANGE, marker="s", markersize=4, linestyle="--")
    label_axes(axes, "Fixed beta", "Coordinates on the floor, %")
    label_axes(other, "", "Matching learning rate / AdamW's")
    for side, colour in ((axes, BLUE), (other, ORANGE)):
        side.yaxis.label.set_color(colour)
        side.tick_params(axis="y", colors=colour)
    axes.set_xscale("log")
    axes.set_ylim(-4, 112)
    other.set_yscale("log")
    other.yaxis.set_major_formatter("{x:g}")
    other.grid(False)
    for side in (axes, other):
        side.minorticks_off()
    middle = statistics.median(advice["betas"].values())
    axes.axvline(middle, color=GREEN, linewidth=1.2, linestyle=":")
    axes.text(
        middle, 112, 'median of beta="auto"', color=GREEN, fontsize=9, fontweight="bold", ha="center", va="bottom"
    )
