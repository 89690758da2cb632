"""The figure of the step's speed: every optimizer's time beside its baseline's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from sadam_integrations.plots.style import COLOURS, INK, label_axes, save


def speed_figure(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws time ratios: a panel a workload, a line an optimizer, a colour and a marker a setting.

    Args:
        rows: ``{"workload": "BERT-base", "setting": "1 thread", "optimizer": "SadamW", "ratio": 0.9, "quartiles":
            [0.88, 0.93], ...}``, the ratio being a median.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    workloads, settings, names = (
        list(dict.fromkeys(row[k] for row in rows)) for k in ("workload", "setting", "optimizer")
    )
    size = (3.6 * max(2, len(workloads)) + 1.5, 0.4 * len(names) + 1.7)
    figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor="white")
    panels = figure.subplots(1, max(1, len(workloads)), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for workload, axes in zip(workloads, panels, strict=False):
        axes.axvline(1, color=INK, linewidth=1)
        for i, setting in enumerate(settings):
            own = [row for row in rows if (row["workload"], row["setting"]) == (workload, setting)]
            ratios = [row["ratio"] for row in own]
            bars = [[abs(row["ratio"] - row["quartiles"][end]) for row in own] for end in (0, 1)]
            heights = [names.index(row["optimizer"]) + 0.3 * ((i + 0.5) / len(settings) - 0.5) for row in own]
            style = {"color": COLOURS[i % len(COLOURS)], "marker": "os^Dv"[i % 5], "linestyle": "none"}
            handles[setting] = axes.errorbar(ratios, heights, xerr=bars, capsize=2, markersize=5, **style)
        label_axes(axes, "Time of a step / baseline's", "")
        axes.set_title(workload, fontsize=10, color=INK)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0,), numticks=9))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    save(figure, path)
