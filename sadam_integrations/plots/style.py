"""What all figures look like, and how they are saved: a reader sees a whole file or none."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLUE, ORANGE = "#0072B2", "#D55E00"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, told apart by people with any colour vision; line styles and markers say the same again."""

INK, GRID = "#222222", "#DDDDDD"


def mean(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and standard deviation; not a number, which is not drawn, if a value is none."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if len(numbers) < len(values):
        return math.nan, math.nan
    return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def from_zero(axes: Any) -> None:
    """Has a loss's axis begin at zero, with room above the curves."""
    axes.autoscale_view()
    axes.set_ylim(0, axes.get_ylim()[1])


def label_axes(axes: Any, x: str, y: str) -> None:
    """Names the axes and gives them the common look."""
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Any, path: str | os.PathLike) -> None:
    """Writes a PNG in one go."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
