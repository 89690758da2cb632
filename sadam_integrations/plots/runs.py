"""The figures of a run and of a comparison: losses and accuracies over the steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from sadam_integrations.plots.style import BLUE, COLOURS, INK, ORANGE, from_zero, label_axes, mean, save


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
        label_axes(axes, "Step", label)
        axes.set_xlim(0, last * 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    from_zero(left)
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
    save(figure, path)


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
            means, deviations = zip(*(mean(points[step]) for step in steps), strict=True) if steps else ((), ())
            style = {**styles[entry["label"]], "marker": ""}
            (handles[f"{entry['label']}, lr {entry['lr']:g}"],) = axes.plot(steps, means, linewidth=1.8, **style)
            low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    rates = sorted({entry["lr"] for entry in series})
    for label in labels:
        own = sorted((entry for entry in series if entry["label"] == label), key=lambda entry: entry["lr"])
        shift = 1.03 ** (labels.index(label) - (len(labels) - 1) / 2)  # error bars beside each other
        means, deviations = zip(*(mean(entry["final"]) for entry in own), strict=True)
        right.errorbar([entry["lr"] * shift for entry in own], means, deviations, capsize=3, **styles[label])
    for axes, x, y in (
        (left, "Step", "Training loss"),
        (middle, "Step", "Validation accuracy"),
        (right, "Learning rate", "Final validation accuracy"),
    ):
        label_axes(axes, x, y)
    from_zero(left)
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
    save(figure, path)
