"""Question 1 of the paper: how far apart the adaptive learning rates of a model's coordinates are while it is trained.

The adaptive learning rate (A-LR) of a coordinate is one over the denominator of its step. The study looks at all of a
model's coordinates about thirty times while a CNN, a ViT and a BERT are trained with Adam, with Sadam as published
(beta=50) and with Sadam (auto), this package's default, and draws what the paper draws: minimum, quartiles, median and
maximum. Coordinates that never had a gradient do not move and are left out.

  sadam run studies/anisotropy                  18 runs, about ten minutes on two cores
  sadam run studies/anisotropy bert             BERT alone
  sadam run studies/anisotropy --smoke          a look at everything in a minute
  sadam run studies/anisotropy cnn --full       CIFAR-10, on a GPU

Stopped at any moment, it goes on where it was. The folder then holds anisotropy.json, anisotropy.md and anisotropy.png,
which docs/paper.md shows, and every run in runs.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _study

from sadam_integrations import PUBLISHED, plots

FIXED = {"beta": PUBLISHED["beta"], "bias_correction": PUBLISHED["bias_correction"]}
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {  # the CNN's rates are the paper's
    "Adam": ("adam", {}, {"cnn": 1e-3, "vit": 1e-3, "bert": 1e-4}),
    "Sadam (published)": ("sadam", FIXED, {"cnn": 1e-2, "vit": 3e-2, "bert": 1e-2}),
    "Sadam (auto)": ("sadam", {}, {"cnn": 1e-3, "vit": 1e-3, "bert": 1e-4}),
}
SEEDS = {"smoke": 1, "default": 2, "full": 5}
MEASUREMENTS = 30


def study(names: Sequence[str], scale: str, run: _study.Runs) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Makes the runs; returns those of each task and method, one a seed."""
    cells = [(task, method) for task in names for method in METHODS]
    seeds = range(SEEDS[scale])
    jobs = []
    for task, method in cells:
        optimizer, args, lr = METHODS[method]
        job = {"task": task, "scale": scale, "optimizer": optimizer, "args": args, "lr": lr[task]}
        jobs += [{**job, "seed": seed, "measure": MEASUREMENTS} for seed in seeds]
    rows = iter(run(jobs))
    found: dict[str, dict[str, list[dict[str, Any]]]] = {task: {} for task in names}
    for task, method in cells:
        found[task][method] = [next(rows) for _ in seeds]
    return found


def table(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """A Markdown table of the last measurements, means over the seeds."""
    head = ["task", "method", "learning rate", "validation accuracy", "median A-LR", "smallest", "largest"]
    lines = [[*head, "largest / smallest", "q99 / q01", "q99 / q01 in a tensor", "on the floor"]]
    for task, methods in found.items():
        for method, rows in methods.items():
            last = [row["lines"][-1] for row in rows]
            alr = {key: sum(line["all"][key] for line in last) / len(last) for key in last[0]["all"]}
            tensor = sum(line["tensor_spread"] for line in last) / len(last)
            accuracy = _study.shown(_study.mean([row["validation_accuracy"] for row in rows]))
            values = [alr["median"], alr["min"], alr["max"], alr["max"] / alr["min"], alr["q99_over_q01"], tensor]
            numbers = [f"{value:.2g}" for value in values]
            lines.append(
                [task, method, f"{METHODS[method][2][task]:g}", accuracy, *numbers, f"{alr['floor_share']:.0%}"]
            )
    return "\n".join(_study.markdown(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study from the command line and returns the exit code."""
    arguments = _study.parser("anisotropy", __doc__).parse_args(argv)
    folder: Path = _study.place(arguments)
    run = _study.Runs(folder, arguments.workers)
    found = study(arguments.tasks, arguments.scale, run)
    _study.finish(folder, "anisotropy", found, table(found), run, arguments.scale)
    shown = {task: {name: rows[0]["lines"] for name, rows in methods.items()} for task, methods in found.items()}
    plots.bands_figure(shown, folder / "anisotropy.png")
    print(f"{table(found)}\n-> {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
