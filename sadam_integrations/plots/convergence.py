"""The figures of the convergence study: errors over the number of steps, and over beta."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sadam_integrations.plots.style import COLOURS, INK, label_axes, save

GUIDE = "#777777"
MARKERS = "osD^vP"


def convergence_figure(
    cells: Sequence[Mapping[str, Any]],
    steps: Sequence[int],
    fitted_from: int,
    errors: Mapping[str, str],
    path: str | os.PathLike,
) -> None:
    """Draws the error over the number of steps T: one row a kind of noise, one panel a condition.

    Args:
        cells: ``{"condition": "PL", "noise": "matched", "optimizer": "Adam", "errors": [[0.81, 0.82], ...],
            "theory": -1.0}``: for each number of steps the errors of all seeds, and the bound's slope.
        steps: The numbers of steps.
        fitted_from: The guide with the bound's slope begins here.
        errors: From a condition to the label of its error.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure

    noises = list(dict.fromkeys(cell["noise"] for cell in cells))
    names = list(dict.fromkeys(cell["optimizer"] for cell in cells))
    figure = Figure(figsize=(10, 3.1 * len(noises) + 0.6), dpi=100, layout="constrained", facecolor="white")
    grid = figure.subplots(len(noises), len(errors), squeeze=False, sharex=True, sharey="col")
    handles: dict[str, Any] = {}
    for noise, row in zip(noises, grid, strict=True):
        for (condition, error), axes in zip(errors.items(), row, strict=True):
            shown = [cell for cell in cells if (cell["condition"], cell["noise"]) == (condition, noise)]
            for cell in shown:
                i = names.index(cell["optimizer"])
                width = 3.6 - 0.5 * i  # where curves lie on each other, all of them can be seen
                style = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 3.5 + width, "linewidth": width}
                middles = [statistics.mean(values) for values in cell["errors"]]
                [handles[cell["optimizer"]]] = axes.plot(steps, middles, **style)
            ends = [max(fitted_from, steps[0]), steps[-1]]
            lowest = min(statistics.mean(cell["errors"][-1]) for cell in shown)
            guide = [0.6 * lowest * (t / ends[1]) ** shown[0]["theory"] for t in ends]
            style = {"color": GUIDE, "linestyle": "--", "linewidth": 1.4}
            [handles["slope of the bound"]] = axes.plot(ends, guide, **style)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{condition}, {noise} noise", fontsize=10, color=INK)
            label_axes(axes, "number of steps T" if noise == noises[-1] else "", error)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    save(figure, path)


def sharpness_figure(
    sweeps: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
    index: int,
    errors: Mapping[str, str],
    path: str | os.PathLike,
) -> None:
    """Draws Sadam's error over beta, between those of SGD and Adam: one panel a condition.

    Args:
        sweeps: ``{"condition": "PL", "noise": "matched", "beta": [0.1, ...], "errors": [[0.81, 0.82], ...]}``, for each
            beta the errors of all seeds.
        cells: As in :func:`convergence_figure`; SGD's and Adam's are drawn as lines.
        index: Which of the numbers of steps of ``cells`` is that of ``sweeps``.
        errors: From a condition to the label of its error.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure

    noises = list(dict.fromkeys(sweep["noise"] for sweep in sweeps))
    figure = Figure(figsize=(10, 3.1 * len(noises) + 0.6), dpi=100, layout="constrained", facecolor="white")
    grid = figure.subplots(len(noises), len(errors), squeeze=False, sharex=True, sharey="col")
    handles: dict[str, Any] = {}
    for noise, row in zip(noises, grid, strict=True):
        for (condition, error), axes in zip(errors.items(), row, strict=True):
            here = {"condition": condition, "noise": noise}
            for name, colour, linestyle in (("SGD with momentum", COLOURS[0], ":"), ("Adam", COLOURS[1], "--")):
                for cell in cells:
                    if {**here, "optimizer": name}.items() <= cell.items():
                        level = statistics.mean(cell["errors"][index])
                        handles[name] = axes.axhline(level, color=colour, linestyle=linestyle, linewidth=1.8)
            for sweep in sweeps:
                if here.items() <= sweep.items():
                    middles = [statistics.mean(values) for values in sweep["errors"]]
                    style = {"color": COLOURS[3], "marker": MARKERS[3], "linewidth": 1.4}
                    [handles["Sadam (published form)"]] = axes.plot(sweep["beta"], middles, **style)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{condition}, {noise} noise", fontsize=10, color=INK)
            label_axes(axes, "beta" if noise == noises[-1] else "", error)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    save(figure, path)
