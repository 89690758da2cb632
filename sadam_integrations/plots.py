"""Every figure. Matplotlib is imported when one is drawn, and the user's backend and settings are left alone."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BLUE, ORANGE = "#0072B2", "#D55E00"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, told apart by people with any colour vision; line styles and markers say the same again."""

INK, GRID = "#222222", "#DDDDDD"


def training_figure(
    history: Mapping[str, Sequence[Mapping[str, float]]], path: str | os.PathLike, title: str = ""
) -> None:
    """Draws the training loss on the left and the validation accuracy on the right.

    Args:
        history: ``{"train": [{"step": 5, "loss": 0.69}, …], "validation": [{"step": 32, "accuracy": 0.71}, …]}``.
        path: The PNG to write.
        title: A line above both panels.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    panels = (
        (left, "train", "loss", "Training loss", BLUE, {"linewidth": 1.8}),
        (right, "validation", "accuracy", "Validation accuracy", ORANGE, {"linewidth": 1.8, "marker": "o"}),
    )
    last = max((point["step"] for points in history.values() for point in points), default=1)
    for axes, split, key, label, colour, style in panels:
        points = history[split]
        values = [point[key] for point in points]
        axes.plot([point["step"] for point in points], values, color=colour, **style)
        _style(axes, "Step", label)
        axes.set_xlim(0, last * 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _from_zero(left)
    if accuracies := [point["accuracy"] for point in history["validation"]]:
        low, high = min(accuracies), max(accuracies)
        room = max(0.02, 0.15 * (high - low))
        right.set_ylim(max(0, low - room), min(1, high + 2 * room))
        right.annotate(
            f"{accuracies[-1]:.3f}",
            (history["validation"][-1]["step"], accuracies[-1]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="right",
            fontsize=10,
            fontweight="bold",
            color=INK,
        )
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    _save(figure, path)


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
                    middle, deviation = _mean(curve[0][metric])
                    handles[legend] = axes.axhline(middle, color=colour, linewidth=1.2, linestyle=":")
                    axes.axhspan(middle - deviation, middle + deviation, color=colour, alpha=0.10, linewidth=0)
                    continue
                curve = sorted(curve, key=lambda point: point["setting"])
                middles, deviations = zip(*(_mean(point[metric]) for point in curve), strict=True)
                style = {"marker": "os"[series.index(name) % 2], "linestyle": ("-", "--")[series.index(name) % 2]}
                handles[legend] = axes.errorbar(
                    [point["setting"] for point in curve], middles, deviations, color=colour, capsize=2, **style
                )
            _style(axes, "Floor, in lower quartiles of sqrt(v)", f"{task}: {label}")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            if metric == "spread":
                axes.set_yscale("log", base=2)
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    _save(figure, path)


def compare_figure(series: Sequence[Mapping[str, Any]], path: str | os.PathLike, title: str = "") -> None:
    """Draws optimizers side by side: training loss and validation accuracy over the steps, accuracy over the rates.

    Args:
        series: An entry for each optimizer and learning rate: ``{"label": "sadamw", "lr": 1e-3, "chosen": True,
            "histories": [history, ...], "final": [0.82, ...]}``, one history (see :func:`training_figure`) and one
            final accuracy a seed. Curves are drawn for the chosen rates: means, with bands of a standard deviation.
        path: The PNG to write.
        title: A line above the panels.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    labels = list(dict.fromkeys(entry["label"] for entry in series))
    styles = {
        label: {"color": COLOURS[i % 7], "linestyle": ("-", "--", ":", "-.")[i % 4], "marker": "os^Dv"[i % 5]}
        for i, label in enumerate(labels)
    }
    figure = Figure(figsize=(11, 3.6), dpi=150, layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    handles: dict[str, Any] = {}
    for entry in (entry for entry in series if entry["chosen"]):
        for axes, split, key in ((left, "train", "loss"), (middle, "validation", "accuracy")):
            points: dict[float, list[float]] = {}
            for point in (point for history in entry["histories"] for point in history[split]):
                points.setdefault(point["step"], []).append(point[key])
            steps = sorted(points)
            means, deviations = zip(*(_mean(points[step]) for step in steps), strict=True) if steps else ((), ())
            style = {**styles[entry["label"]], "marker": ""}
            (handles[f"{entry['label']}, lr {entry['lr']:g}"],) = axes.plot(steps, means, linewidth=1.8, **style)
            low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    rates = sorted({entry["lr"] for entry in series})
    for label in labels:
        own = sorted((entry for entry in series if entry["label"] == label), key=lambda entry: entry["lr"])
        shift = 1.03 ** (labels.index(label) - (len(labels) - 1) / 2)  # error bars beside each other
        means, deviations = zip(*(_mean(entry["final"]) for entry in own), strict=True)
        right.errorbar([entry["lr"] * shift for entry in own], means, deviations, capsize=3, **styles[label])
    for axes, x, y in (
        (left, "Step", "Training loss"),
        (middle, "Step", "Validation accuracy"),
        (right, "Learning rate", "Final validation accuracy"),
    ):
        _style(axes, x, y)
    _from_zero(left)
    for axes in (left, middle):
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if rates[0] > 0:
        right.set_xscale("log")
        right.set_xlim(rates[0] / 1.3, rates[-1] * 1.3)
    right.set_xticks(rates, [f"{rate:g}" for rate in rates])
    right.minorticks_off()
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    _save(figure, path)


def _mean(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and standard deviation; not a number, which is not drawn, if a value is none."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if len(numbers) < len(values):
        return math.nan, math.nan
    return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def _from_zero(axes: Any) -> None:
    """Has a loss's axis begin at zero, with room above the curves."""
    axes.autoscale_view()
    axes.set_ylim(0, axes.get_ylim()[1])


def _style(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: str | os.PathLike) -> None:
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
