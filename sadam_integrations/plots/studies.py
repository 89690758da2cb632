"""The figures of the studies."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from sadam_integrations.plots.style import BLUE, ORANGE, label_axes, mean, save


def settings_figure(
    tasks: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Mapping[str, str], path: str | os.PathLike
) -> None:
    """Draws what a setting does: one row of panels a task, one panel a metric, means with standard deviations.

    Args:
        tasks: From a task's name to its points ``{"series": "Sadam (auto)", "lr": 1e-3, "setting": 2.0, metric: [0.81,
            0.82], ...}``, one value a seed. A series whose setting is ``None`` is a reference, drawn as a band.
        metrics: From a metric's key to the label of its panels; "spread" gets a logarithmic axis.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(10, 3.1 * len(tasks) + 0.5), dpi=100, layout="constrained", facecolor="white")
    grid = figure.subplots(len(tasks), len(metrics), squeeze=False)
    handles: dict[str, Any] = {}
    for (task, points), row in zip(tasks.items(), grid, strict=True):
        rates = sorted({point["lr"] for point in points})
        curves: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
        for point in points:
            curves.setdefault((point["series"], point["lr"]), []).append(point)
        series = list(dict.fromkeys(point["series"] for point in points if point["setting"] is not None))
        for (metric, label), axes in zip(metrics.items(), row, strict=True):
            for (name, lr), curve in curves.items():
                colour = (BLUE, ORANGE)[rates.index(lr) % 2]
                legend = f"{name}, {('lower', 'higher')[rates.index(lr) % 2]} lr"
                if curve[0]["setting"] is None:
                    middle, deviation = mean(curve[0][metric])
                    handles[legend] = axes.axhline(middle, color=colour, linewidth=1.2, linestyle=":")
                    axes.axhspan(middle - deviation, middle + deviation, color=colour, alpha=0.10, linewidth=0)
                    continue
                curve = sorted(curve, key=lambda point: point["setting"])
                middles, deviations = zip(*(mean(point[metric]) for point in curve), strict=True)
                style = {"marker": "os"[series.index(name) % 2], "linestyle": ("-", "--")[series.index(name) % 2]}
                handles[legend] = axes.errorbar(
                    [point["setting"] for point in curve], middles, deviations, color=colour, capsize=2, **style
                )
            label_axes(axes, "Floor, in lower quartiles of sqrt(v)", f"{task}: {label}")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            if metric == "spread":
                axes.set_yscale("log", base=2)
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    save(figure, path)
