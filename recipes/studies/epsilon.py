"""Question 2 of the paper: how much Adam depends on epsilon, and Sadam on beta, over eight decades.

Both numbers set the smallest value that the denominator can have: epsilon itself, and ln 2 / beta. The study gives both
methods the same seven floors from 1e-8 to 1, each at two learning rates: on the CNN those that the paper uses for Adam
and for Sadam. Sadam is in the published form (the official code's bias correction). "Sadam (auto)", this package's
default, measures its floors: it is drawn as a line, at the first of the rates.

  sadam run studies/epsilon                     the CNN: 58 runs, about a quarter of an hour on two cores
  sadam run studies/epsilon bert                BERT; vit for the ViT
  sadam run studies/epsilon --smoke             a look at everything in about a minute
  sadam run studies/epsilon cnn --full --workers 4         CIFAR-10, on a GPU with room for four

Stopped at any moment, it goes on where it was. The folder then holds epsilon.json, epsilon.md and epsilon.png, which
docs/paper.md shows, and every run in runs.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _study

from sadam_integrations import plots
from sadam_integrations.update import LN2

RATES = {"cnn": (1e-3, 1e-2), "vit": (1e-3, 3e-2), "bert": (1e-4, 1e-2)}
FLOORS = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SEEDS = {"smoke": 1, "default": 2, "full": 5}
METRICS = ("validation_accuracy", "train_loss")


def cells(task: str, scale: str) -> list[tuple[str, float | None, dict[str, Any]]]:
    """What is trained on a task: the name of the curve, the floor, and the job without its seed."""
    floors = FLOORS[::3] if scale == "smoke" else FLOORS
    arguments = {
        "Adam": lambda floor: {"eps": floor},
        "Sadam": lambda floor: {"beta": LN2 / floor, "bias_correction": "outer"},
    }
    job = {"task": task, "scale": scale, "lr": RATES[task][0]}
    return [
        *(
            (f"{name}, lr {lr:g}", floor, {**job, "optimizer": name.lower(), "lr": lr, "args": chosen(floor)})
            for name, chosen in arguments.items()
            for lr in RATES[task]
            for floor in floors
        ),
        (f"Sadam (auto), lr {job['lr']:g}", None, {**job, "optimizer": "sadam", "args": {}}),
    ]


def study(names: Sequence[str], scale: str, run: _study.Runs) -> dict[str, list[dict[str, Any]]]:
    """Makes the runs and returns a row for each task, curve and floor, with a value for each seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for task in names:
        seeds = range(SEEDS[scale])
        rows = iter(run([{**job, "seed": seed} for *_, job in cells(task, scale) for seed in seeds]))
        found[task] = []
        for series, floor, _ in cells(task, scale):
            mine = [next(rows) for _ in seeds]
            values = {metric: [row[metric] for row in mine] for metric in METRICS}
            found[task].append({"series": series, "floor": floor, **values})
    return found


def table(task: str, rows: list[dict[str, Any]]) -> str:
    """A Markdown table of one task: validation accuracies, a line a floor."""
    curves = list(dict.fromkeys(row["series"] for row in rows if row["floor"]))
    cell = {(row["series"], row["floor"]): _study.shown(_study.mean(row["validation_accuracy"])) for row in rows}
    lines = [[f"{task}: smallest denominator", "beta", *curves]]
    for floor in dict.fromkeys(row["floor"] for row in rows if row["floor"]):
        lines.append([f"{floor:g}", f"{LN2 / floor:.3g}", *(cell[series, floor] for series in curves)])
    auto = rows[-1]["series"]
    lines.append([auto, "measured", cell[auto, None], *[""] * (len(curves) - 1)])
    return "\n".join(_study.markdown(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study from the command line and returns the exit code."""
    arguments = _study.parser("epsilon", __doc__, ("cnn",)).parse_args(argv)
    folder: Path = _study.place(arguments)
    run = _study.Runs(folder, arguments.workers)
    found = study(arguments.tasks, arguments.scale, run)
    text = "\n\n".join(table(task, rows) for task, rows in found.items())
    _study.finish(folder, "epsilon", found, text, run, arguments.scale)
    plots.floors_figure(found, folder / "epsilon.png")
    print(f"{text}\n-> {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
