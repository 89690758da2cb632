"""Questions 3 and 4 of the paper: Sadam and SAMSGrad beside the other adaptive methods and S-Momentum.

Every method gets the same four learning-rate trials on one seed, half a decade apart; the rate with the best validation
accuracy is then trained with three other seeds, whose test accuracy is reported. S-Momentum is torch's SGD with
momentum 0.9; PAdam, Yogi, AdaBound and AMSBound are those of the library pytorch-optimizer, which the extra "studies"
brings. "Sadam (published)" is beta=50 with the official code's bias correction, "Sadam (auto)" is this package's own
default: they are two methods.

  sadam run studies/comparison                  all three tasks: 273 runs, about an hour and a quarter on two cores
  sadam run studies/comparison cnn              ResNet-20 alone
  sadam run studies/comparison --smoke          a look at everything in about four minutes
  sadam run studies/comparison cnn --full --workers 4      the paper's CIFAR-10 setting, on a GPU with room for four

Stopped at any moment, it goes on where it was. The folder then holds comparison.json, comparison.md and comparison.png,
which docs/paper.md shows, and every run in runs.jsonl. As in the paper, weight decay is L2, 5e-4 on the CNN and none on
the others; AdamW and SadamW have their decoupled 0.01 instead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _study

from sadam_integrations import PUBLISHED, plots, recipe

LIBRARY = "pytorch_optimizer"
FIXED = {"beta": PUBLISHED["beta"], "bias_correction": PUBLISHED["bias_correction"]}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "S-Momentum": ("sgd", {"momentum": 0.9}),
    "Adam": ("adam", {}),
    "AdamW": ("adamw", {"weight_decay": 0.01}),
    "AMSGrad": ("adam", {"amsgrad": True}),
    "PAdam": (f"{LIBRARY}.PAdam", {"partial": 0.125}),  # the value its authors chose for CIFAR
    "Yogi": (f"{LIBRARY}.Yogi", {"weight_decouple": False}),
    "AdaBound": (f"{LIBRARY}.AdaBound", {"weight_decouple": False}),
    "AMSBound": (f"{LIBRARY}.AdaBound", {"weight_decouple": False, "ams_bound": True}),
    "Sadam (published)": ("sadam", FIXED),
    "SAMSGrad (published)": ("samsgrad", FIXED),
    "Sadam (auto)": ("sadam", {}),
    "SAMSGrad (auto)": ("samsgrad", {}),
    "SadamW (auto)": ("sadamw", {"weight_decay": 0.01}),
}
LADDER = tuple(float(f"{digit}e{power}") for power in range(-5, 1) for digit in (1, 3))
TRIALS = 4
FIRST = {  # the lowest of the rates that are tried, neighbours on the ladder; the paper's for the CNN are among them
    "cnn": {"S-Momentum": 1e-2, "PAdam": 1e-1, "Yogi": 3e-3, "AdaBound": 1e-3, "published": 1e-2, "Adam": 1e-3},
    "vit": {"S-Momentum": 1e-2, "PAdam": 3e-2, "Yogi": 1e-3, "AdaBound": 3e-4, "published": 1e-2, "Adam": 3e-4},
    "bert": {"S-Momentum": 3e-3, "PAdam": 1e-2, "Yogi": 3e-4, "AdaBound": 1e-4, "published": 3e-3, "Adam": 3e-5},
}
SEEDS = {"smoke": (1,), "default": (1, 2, 3), "full": (1, 2, 3, 4, 5)}

REPORTED = {  # Table 1 of the official code's README: ResNet-20 on CIFAR-10, test accuracy in per cent
    "S-Momentum": "92.73 ± 0.05",
    "Adam": "91.68 ± 0.12",
    "AMSGrad": "91.70 ± 0.12",
    "PAdam": "92.70 ± 0.10",
    "Yogi": "92.62 ± 0.17",
    "AdaBound": "91.59 ± 0.24",
    "AMSBound": "91.76 ± 0.16",
    "Sadam (published)": "93.01 ± 0.16",
    "SAMSGrad (published)": "92.88 ± 0.10",
}


def rates(task: str, method: str) -> list[float]:
    """The learning rates that are tried."""
    kind = "published" if "published" in method else method.replace("AMSBound", "AdaBound")
    first = LADDER.index(FIRST[task].get(kind, FIRST[task]["Adam"]))
    return list(LADDER[first : first + TRIALS])


def study(names: Sequence[str], scale: str, run: _study.Runs) -> dict[str, list[dict[str, Any]]]:
    """Tunes each method, trains it at the chosen rate, and returns a row for each task and method."""
    found: dict[str, list[dict[str, Any]]] = {}
    for task in names:
        jobs = {name: {"task": task, "scale": scale, "optimizer": o, "args": a} for name, (o, a) in METHODS.items()}
        tried = {(name, lr): {**job, "lr": lr, "seed": 0} for name, job in jobs.items() for lr in rates(task, name)}
        trials = dict(zip(tried, run(list(tried.values())), strict=True))
        final = []
        for name, job in jobs.items():
            own = {lr: trials[name, lr] for lr in rates(task, name)}
            lr = max(own, key=lambda rate: (own[rate]["validation_accuracy"], -finite(own[rate]["validation_loss"])))
            final += [{**job, "lr": lr, "seed": seed, "test": True} for seed in SEEDS[scale]]
        rows = run(final)
        found[task] = []
        for i, name in enumerate(METHODS):
            mine = rows[i * len(SEEDS[scale]) : (i + 1) * len(SEEDS[scale])]
            columns = ("test_accuracy", "validation_accuracy", "test_loss", "train_loss")
            lr = mine[0]["job"]["lr"]
            found[task].append(
                {
                    "method": name,
                    "lr": lr,
                    "at_edge": lr in (rates(task, name)[0], rates(task, name)[-1]),
                    "trials": {f"{rate:g}": trials[name, rate]["validation_accuracy"] for rate in rates(task, name)},
                    **{column: _study.mean([row[column] for row in mine]) for column in columns},
                }
            )
    return found


def finite(loss: float) -> float:
    """A loss that can be ordered: NaN is the worst."""
    return loss if loss == loss else float("inf")


def table(task: str, rows: list[dict[str, Any]]) -> str:
    """A Markdown table of one task; beside the CNN what the paper reports."""
    head = ["method", "learning rate", "test accuracy, %", "test loss", "training loss"]
    lines = [[task, *head[1:], *(["paper, CIFAR-10, %"] if task == "cnn" else [])]]
    for row in rows:
        percent = {
            **row["test_accuracy"],
            "mean": 100 * row["test_accuracy"]["mean"],
            "sd": 100 * row["test_accuracy"]["sd"],
        }
        cells = [row["method"], f"{row['lr']:g}{' (edge)' if row['at_edge'] else ''}", _study.shown(percent, 1)]
        cells += [_study.shown(row[column]) for column in ("test_loss", "train_loss")]
        lines.append([*cells, *([REPORTED.get(row["method"], "")] if task == "cnn" else [])])
    return "\n".join(_study.markdown(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study from the command line and returns the exit code."""
    arguments = _study.parser("comparison", __doc__).parse_args(argv)
    recipe.require(LIBRARY, extra="studies")
    folder: Path = _study.place(arguments)
    run = _study.Runs(folder, arguments.workers)
    found = study(arguments.tasks, arguments.scale, run)
    text = "\n\n".join(table(task, rows) for task, rows in found.items())
    _study.finish(folder, "comparison", found, text, run, arguments.scale)
    plots.methods_figure(found, folder / "comparison.png")
    print(f"{text}\n-> {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
