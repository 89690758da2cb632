"""The figures of the adaptive learning rate (A-LR): one run's bands over the steps, and several runs overlaid."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sadam_integrations.plots.style import BLUE, COLOURS, INK, ORANGE, label_axes, save

PANELS = 8
"""Most panels for layer groups; with more groups, neighbours share a panel."""

NAMES = {"max": "max", "q99": "99 %", "q75": "75 %", "median": "median", "q25": "25 %", "q01": "1 %", "min": "min"}
GREY = "#999999"


def alr_figure(lines: Sequence[Mapping[str, Any]], path: str | os.PathLike, title: str = "") -> None:
    """Draws a run's A-LR: its quantiles over the steps, the histogram at the end, and a panel for each layer group.

    With more than eight groups, neighbouring layers share a panel: minimum and maximum are over all of them, and each
    quantile is the geometric mean of theirs.

    Args:
        lines: What ``alr.Record.read`` returns: ``{"step": 32, "all": summary, "groups": {"layer 0": summary, ...},
            "histogram": {"edges": [...], "before": [...], "after": [...]}}``.
        path: The PNG to write.
        title: A line above all panels.
    """
    from matplotlib.figure import Figure

    groups = _panels([name for line in lines for name in line["groups"]])
    columns = len(groups) if len(groups) <= 4 else math.ceil(len(groups) / 2)
    rows = math.ceil(len(groups) / max(1, columns))
    heights = [3.6, *[0.6 + 1.6 * rows][: len(groups)]]
    figure = Figure(figsize=(9, sum(heights)), dpi=150, layout="constrained", facecolor="white")
    upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flatten()
    left, right = upper.subplots(1, 2, width_ratios=(1.4, 1))
    steps, whole = [line["step"] for line in lines], [line["all"] for line in lines]
    _draw(left, steps, whole)
    _log_axis(left, whole)
    _dress(left, steps, "A-LR (1 / denominator)", "A-LR of all coordinates, over the steps", 6)
    _name_ends(left, whole)
    _histogram(right, lines)

    for part in lower:
        grid = part.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        drawn: list[Mapping[str, float]] = []
        for axes, (name, members) in zip(grid, groups.items(), strict=False):
            own = [_merged([line["groups"].get(member, {}) for member in members]) for line in lines]
            _draw(axes, steps, own)
            drawn += own
            _dress(axes, steps, "", name, 3)
        _log_axis(grid[0], drawn, ("q01", "q99"))
        for axes in grid[len(groups) :]:
            axes.remove()
        for axes in grid[len(groups) - columns : len(groups)]:  # the lowest of each column
            axes.tick_params(labelbottom=True)
        part.suptitle("By layer, drawn to the 1 % and 99 % quantiles", fontsize=10, color=INK, x=0.01, ha="left")
        part.supxlabel("Step", fontsize=10, color=INK)
        part.supylabel("A-LR", fontsize=10, color=INK)
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    save(figure, path)


def alr_compare_figure(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike, title: str = ""
) -> None:
    """Draws the A-LR of several runs into one figure: quantiles over the steps, and the spread.

    Args:
        runs: From a run's label to its lines; see :func:`alr_figure`.
        path: The PNG to write.
        title: A line above both panels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    handles: dict[str, Any] = {}
    for i, (label, lines) in enumerate(runs.items()):
        style = {"color": COLOURS[i % 7], "linestyle": ("-", "--", ":", "-.")[i % 4]}
        own, whole = [line["step"] for line in lines], [line["all"] for line in lines]
        _draw(left, own, whole, bands=(("q25", "q75", 0.2),), **style)
        spread = _values(whole, "q99_over_q01")
        (handles[label],) = right.plot(own, spread, linewidth=2, marker=_marker(own), **style)
    summaries = [line["all"] for lines in runs.values() for line in lines]
    _log_axis(left, summaries)
    _log_axis(right, summaries, ["q99_over_q01"])
    steps = [line["step"] for lines in runs.values() for line in lines]
    _dress(left, steps, "A-LR (1 / denominator)", "Median, 25 to 75 % (band), min and max (thin)", 5)
    _dress(right, steps, "99 % quantile / 1 % quantile", "Spread of the A-LR", 5)
    columns = 3 if max(map(len, handles), default=0) < 32 else 1
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    save(figure, path)


def _values(summaries: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """One number of each summary; what a logarithmic axis cannot show is not a number, and leaves a gap."""
    found = (summary.get(key) for summary in summaries)
    return [value if value is not None and 0 < value < math.inf else math.nan for value in found]


def _short(value: float) -> str:
    """A number as people write it."""
    return f"{float(f'{value:.3g}'):,.0f}" if 100 <= value < 1e5 else f"{value:.2g}"


def _marker(steps: Sequence[int]) -> str:
    """A line needs two points; a single one is marked."""
    return "o" if len(steps) == 1 else ""


def _draw(
    axes: Any,
    steps: Sequence[int],
    summaries: Sequence[Mapping[str, Any]],
    bands: Sequence[tuple[str, str, float]] = (("q01", "q99", 0.15), ("q25", "q75", 0.3)),
    color: str = BLUE,
    linestyle: str = "-",
) -> None:
    """Quantiles as bands, minimum and maximum as thin lines, the median as a thick one."""
    for low, high, alpha in bands:
        edges = _values(summaries, low), _values(summaries, high)
        axes.fill_between(steps, *edges, color=color, alpha=alpha, linewidth=0)
    for key, width in (("min", 0.9), ("max", 0.9), ("median", 2.2)):
        style = {"linewidth": width, "linestyle": linestyle, "marker": _marker(steps), "markersize": 2 * width}
        axes.plot(steps, _values(summaries, key), color=color, **style)


def _log_axis(axes: Any, summaries: Sequence[Mapping[str, Any]], keys: Iterable[str] = tuple(NAMES)) -> None:
    """Has the y axis show all values and at least two powers of ten, the only ones that are labelled."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = [math.log10(value) for key in keys for value in _values(summaries, key) if value > 0]
    low, high = (min(values) - 0.1, max(values) + 0.1) if values else (0, 1)
    while math.floor(high) - math.ceil(low) < 1:  # to the nearer power of ten
        below, above = math.ceil(low) - 1, math.floor(high) + 1
        low, high = (below, high) if low - below <= above - high else (low, above)
    axes.set_yscale("log")
    axes.set_ylim(10.0**low, 10.0**high)
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _dress(axes: Any, steps: Sequence[int], label: str, title: str, ticks: int) -> None:
    """Gives a panel over the steps its axes and title; one without a label shares those of others."""
    from matplotlib.ticker import MaxNLocator

    label_axes(axes, "Step" if label else "", label)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlim(0, max(steps, default=0) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))


def _name_ends(axes: Any, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Names the lines and the edges of the bands at their right ends, one label above the other."""
    low, high = map(math.log10, axes.get_ylim())
    ends = {key: value for key in NAMES for value in _values(summaries[-1:], key) if value > 0}
    places = {key: (math.log10(value) - low) / (high - low) for key, value in ends.items()}
    shown: list[float] = []
    for place in places.values():  # from the top down, each a line or more below the one before it
        shown.append(min(place, shown[-1] - 0.065 if shown else 1.0))
    for i in reversed(range(len(shown))):  # and none below the axis
        shown[i] = max(shown[i], shown[i + 1] + 0.065 if i + 1 < len(shown) else 0.0)
    for (key, place), height in zip(places.items(), shown, strict=True):
        axes.annotate(
            f"{NAMES[key]}: {_short(ends[key])}",
            (1, place),
            (1.05, height),
            xycoords="axes fraction",
            va="center",
            fontsize=9,
            fontweight="bold" if key == "median" else "normal",
            color=INK,
            arrowprops={
                "arrowstyle": "-",
                "color": GREY,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 1,
            },
        )


def _histogram(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    """The last histogram: the A-LR that Adam without epsilon would use, the one that is used, and its largest."""
    label_axes(axes, "A-LR", "Coordinates, %")
    axes.set_title("A-LR before and after calibration", fontsize=10, color=INK, loc="left")
    axes.set_xscale("log")
    last = next((line for line in reversed(lines) if sum(line["histogram"]["after"]) > 0), None)
    if last is None:
        return
    histogram, edges = last["histogram"], [10**edge for edge in last["histogram"]["edges"]]
    for key, label, colour, style in (
        ("after", "the A-LR used", BLUE, "-"),
        ("before", "1 / sqrt(v): Adam with epsilon 0", ORANGE, "--"),
    ):
        shares = [100 * share for share in histogram[key]]
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.2)
        axes.stairs(shares, edges, color=colour, linewidth=1.5, linestyle=style, label=label)
    tops = [max(pair) for pair in zip(histogram["before"], histogram["after"], strict=True)]
    seen = [i for i, top in enumerate(tops) if top >= min(0.001, max(tops))]
    low, high = edges[max(0, seen[0] - 1)], edges[min(len(tops), seen[-1] + 2)]
    (largest,) = _values([last["all"]], "max")
    if low < largest < high:
        axes.axvline(
            largest, ymax=0.65, color=INK, linewidth=1.2, linestyle=":", label=f"largest used: {_short(largest)}"
        )
    axes.set_xlim(low, high)
    axes.set_ylim(0, 100 * max(tops) / 0.65)  # the legend fits in above
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 105 * max(tops)])
    title = f"At step {last['step']:,}"
    axes.legend(fontsize=9, loc="upper right", title=title, title_fontsize=9, framealpha=1, edgecolor="white")


def _panels(names: Iterable[str]) -> dict[str, list[str]]:
    """From the name of a panel to its groups: embeddings first, then the layers by number, then the rest."""
    names = list(dict.fromkeys(names))
    numbers = {name: int(name.removeprefix("layer ")) for name in names if re.fullmatch(r"layer \d+", name)}
    others = [name for name in names if name not in numbers]
    layers, room = sorted(numbers, key=lambda name: numbers[name]), PANELS - len(others)
    if not layers or room < 1:
        layers, others, room = names, [], PANELS
    count = min(room, len(layers))
    merged = [layers[i * len(layers) // count : (i + 1) * len(layers) // count] for i in range(count)]
    before, after = ([[name] for name in others if (name == "embeddings") == first] for first in (True, False))
    panels = {}
    for members in (*before, *merged, *after):
        first, last = members[0], members[-1]
        numbered = f"layers {numbers[first]} to {numbers[last]}" if first in numbers and last in numbers else None
        panels[first if first == last else numbered or f"{first} to {last}"] = members
    return panels


def _merged(summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The summary of several groups: exact extremes, and the geometric means of their quantiles."""
    merged = {}
    for key in NAMES:
        values = [value for value in _values(summaries, key) if value > 0]
        if values:
            extreme = {"min": min, "max": max}.get(key)
            merged[key] = extreme(values) if extreme else statistics.geometric_mean(values)
    return merged
