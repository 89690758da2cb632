"""The figures of the studies."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sadam_integrations.plots.style import BLUE, COLOURS, INK, ORANGE, label_axes, mean, save


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


def methods_figure(tasks: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike) -> None:
    """Draws methods side by side: a panel a task, a line a method, test accuracy with its standard deviation.

    Args:
        tasks: From a task's name to its rows ``{"method": "Adam", "test_accuracy": {"mean": 0.86, "sd": 0.01, ...}}``.
            Methods of this package, those with "Sadam", "SadamW" or "SAMSGrad" in their name, are set off.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, (task, rows) in zip(panels, tasks.items(), strict=True):
        for y, row in enumerate(rows):
            ours = any(word in row["method"] for word in ("Sadam", "SAMSGrad"))
            style: dict[str, Any] = {"color": ORANGE, "marker": "s"} if ours else {"color": BLUE, "marker": "o"}
            found = row["test_accuracy"]
            if math.isnan(found["mean"]):
                continue
            deviation = 0.0 if math.isnan(found["sd"]) else found["sd"]
            axes.errorbar(found["mean"], y, xerr=deviation, capsize=3, markersize=6, **style)
        label_axes(axes, f"{task}: test accuracy", "")
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows] if axes is panels[0] else [""] * len(rows))
        axes.invert_yaxis()
        axes.margins(x=0.08)
    save(figure, path)


def floors_figure(tasks: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike) -> None:
    """Draws what the smallest denominator does: a row a task, validation accuracy beside training loss.

    Args:
        tasks: From a task's name to its points ``{"series": "Adam, lr 0.001", "floor": 1e-8, "validation_accuracy":
            [0.86, ...], "train_loss": [...]}``, one value a seed. A series whose floor is ``None`` is drawn as a line.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.1 * len(tasks) + 0.5), dpi=110, layout="constrained", facecolor="white")
    grid = figure.subplots(len(tasks), 2, squeeze=False)
    for (task, points), row in zip(tasks.items(), grid, strict=True):
        names = list(dict.fromkeys(point["series"] for point in points))
        metrics = {"validation_accuracy": "validation accuracy", "train_loss": "training loss"}
        for (metric, label), axes in zip(metrics.items(), row, strict=True):
            for name, colour, marker, line in zip(names, COLOURS, "os^Dv", ("-", "-", "--", "--", ":"), strict=False):
                curve = [point for point in points if point["series"] == name]
                middles, deviations = zip(*(mean(point[metric]) for point in curve), strict=True)
                if curve[0]["floor"] is None:
                    axes.axhline(middles[0], color=colour, linestyle=line, linewidth=1.4, label=name)
                    continue
                floors = [point["floor"] for point in curve]
                style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5}
                axes.errorbar(floors, middles, deviations, capsize=2, label=name, **style)
            label_axes(axes, "Smallest denominator: epsilon, or ln 2 / beta", f"{task}: {label}")
            axes.set_xscale("log")
        row[0].legend(fontsize=8, frameon=False)
    save(figure, path)


def bands_figure(tasks: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: str | os.PathLike) -> None:
    """Draws the adaptive learning rates of a model's coordinates over the steps: a row a task, a panel a method.

    Args:
        tasks: From a task's name to its methods, and from a method's name to its measurements ``{"step": 1, "all":
            summary}`` (:func:`sadam_integrations.alr.summary`).
        path: The PNG to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    columns = len(next(iter(tasks.values())))
    figure = Figure(figsize=(10, 2.7 * len(tasks) + 0.5), dpi=110, layout="constrained", facecolor="white")
    grid = figure.subplots(len(tasks), columns, squeeze=False, sharex="row", sharey="row")
    for i, (task, methods) in enumerate(tasks.items()):
        for j, (method, lines) in enumerate(methods.items()):
            axes = grid[i][j]
            steps = [line["step"] for line in lines]
            value = {key: [line["all"][key] for line in lines] for key in lines[0]["all"]}
            for key, word in (("max", "largest and smallest"), ("min", None)):
                axes.plot(steps, value[key], color=INK, linewidth=0.9, linestyle=":", label=word)
            axes.fill_between(steps, value["q01"], value["q99"], color=BLUE, alpha=0.18, linewidth=0, label="1 to 99 %")
            axes.fill_between(
                steps, value["q25"], value["q75"], color=BLUE, alpha=0.45, linewidth=0, label="25 to 75 %"
            )
            axes.plot(steps, value["median"], color=ORANGE, linewidth=1.8, label="median")
            label_axes(axes, "Step" if i == len(tasks) - 1 else "", "" if j else f"{task}: A-LR")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=7))
            axes.minorticks_off()
            if i == 0:
                axes.set_title(method, fontsize=10, color=INK)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    save(figure, path)
