"""Convergence under the three conditions of the theory: measured rates beside the bounds' (question 5 of the paper).

    sadam run studies/convergence            # about eight minutes on one core
    sadam run studies/convergence --smoke    # short runs, in fifteen seconds
    sadam run studies/convergence --full     # ten times as many steps, 20 seeds: two or three hours (estimated)

Three problems whose optimum and constants are known, in 24 coordinates whose scales c_i span three decades:

- nonconvex: sum of c_i (sqrt(1 + x^2) - 1 + 1.5 sin^2 x), which has many local minima.
  The error is the mean of ||grad f(x_t)||^2 over the steps;
- convex, but not strongly: sum of c_i (sqrt(1 + x^2) + 1 / sqrt(1 + x^2) - 2), which is c_i x^4 / 4 near its minimum.
  The error is the mean of f(x_t) - f* over the steps;
- Polyak-Lojasiewicz (PL), but not strongly convex: least squares with 12 equations in 24 unknowns. The error is
  f(x_T) - f* after the last step.

Each gradient has bounded noise of known variance, whose scale over the coordinates is either in proportion to c_i
("matched": small gradients have small noise) or the same scales shuffled ("shuffled"). The step sizes are the theory's:
lr / sqrt(T) for a run of T steps in the first two, lr / (1 + t / 1000) in the third. Each optimizer gets the same nine
values of lr, half a decade apart; the best on two seeds of its own at one T is used for every T and all the other
seeds. A second experiment does the same for Sadam over eight decades of beta.

Every finished cell is a line of runs/convergence/cells.jsonl; a study that was stopped goes on where it was. The tables
and the figures are those of docs/paper.md.

The bounds. The paper states convergence theorems for the three conditions in terms of bounds mu_1 <= A-LR <= mu_2. We
did not have the theorems' text, so these are the standard arguments, not quotations: for steps of A-LR times lr times
gradient, without momentum, with an A-LR that stays in [mu_1, mu_2] and does not depend on the noise of the present
gradient (in the convex case, that is constant). With L the smoothness, s^2 the variance of the noise, D = f(x_0) - f*,
R = ||x_0 - x*||, G^2 the largest mean square of a gradient and m the PL constant, at the bound's own best lr:

- nonconvex: 2 D / (lr mu_1 T) + L lr mu_2^2 s^2 / mu_1 for lr <= mu_1 / (L mu_2^2), so O(mu_2 / mu_1 / sqrt(T));
- convex: R G sqrt(mu_2 / mu_1) / sqrt(T);
- PL: max(g D, 2 L mu_2^2 s^2 / (m mu_1)^2) / (g + T) with g = 2 (L / m) (mu_2 / mu_1)^2, so O((mu_2 / mu_1)^2 / T).

Sadam's A-LR is in [1 / softplus(max |g|), beta / ln 2], Adam's in [1 / (max |g| + eps), 1 / eps], that of SGD is 1.
For Sadam (auto) these are the betas at the end of the runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from sadam_integrations import PUBLISHED, Sadam, SAMSGrad, chosen_betas, plots
from sadam_integrations.run_folder import lock, write_json
from sadam_integrations.update import LN2, softplus

SIZE = 24
SCALES = torch.logspace(0, -3, SIZE, dtype=torch.float64)
UNEQUAL = torch.tensor([0.6, 0.8], dtype=torch.float64)
DELAY = 1000
EPSILON = 1e-8
BETAS = tuple(10.0**k for k in range(-2, 7))


def nonconvex(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient; x may have leading dimensions, one point each."""
    root = (1 + x * x).sqrt()
    return (scale * (root - 1 + 1.5 * x.sin() ** 2)).sum(-1), scale * (x / root + 1.5 * (2 * x).sin())


def convex(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient; x may have leading dimensions, one point each."""
    root = (1 + x * x).sqrt()
    return (scale * x**4 / ((1 + root) ** 2 * root)).sum(-1), scale * (x / root) ** 3


def pl(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient; x may have leading dimensions, one point each."""
    pairs = x.unflatten(-1, (-1, 2))
    residual = (pairs * UNEQUAL).sum(-1)
    scale = scale[::2]
    return 0.5 * (scale * residual**2).sum(-1), ((scale * residual)[..., None] * UNEQUAL).flatten(-2)


@dataclass(frozen=True)
class Condition:
    """A problem, its constants, and the theory's step size for it."""

    name: str
    error: str
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    scale: Tensor
    start: float
    smoothness: float  # the largest curvature
    steepest: float  # the largest |partial derivative|; for PL, where it starts
    middle: float  # of the nine learning rates
    theory: float  # the bound's error is T to this power, as T grows

    def rate(self, lr: float, t: int, total: int) -> float:
        """The step size of step ``t`` of ``total``, counted from 0."""
        return lr / (1 + t / DELAY) if self.name == "PL" else lr / math.sqrt(total)

    def measure(self, value: Tensor, grad: Tensor) -> Tensor:
        """The error at the points that have this value and gradient; the optimal value is 0."""
        return (grad * grad).sum(-1) if self.name == "nonconvex" else value

    def bound(self, total: int, noise: Tensor, low: float, high: float) -> float:
        """The standard bound on the error after ``total`` steps with an A-LR in [``low``, ``high``]; see above."""
        start = torch.full((SIZE,), self.start, dtype=torch.float64)
        gap = float(self.function(start, self.scale)[0])
        variance = float((noise**2).sum())
        if self.name == "nonconvex":
            lr = min(
                math.sqrt(2 * gap / (self.smoothness * variance * total)) / high, low / (self.smoothness * high**2)
            )
            return 2 * gap / (lr * low * total) + self.smoothness * lr * high**2 * variance / low
        if self.name == "convex":
            square = float((self.scale**2).sum()) + variance
            return float(start.norm()) * math.sqrt(square * high / low / total)
        delay = 2 * self.smoothness / float(self.scale.min()) * (high / low) ** 2
        floor = 2 * self.smoothness * high**2 * variance / (float(self.scale.min()) * low) ** 2
        return max(delay * gap, floor) / (delay + total)

    def largest(self, noise: Tensor) -> float:
        """The largest magnitude of a coordinate of the stochastic gradient."""
        return float((self.steepest * self.scale + math.sqrt(3) * noise).max())


CONDITIONS = {
    c.name: c
    for c in (
        Condition("nonconvex", "mean of ||grad f(x_t)||²", nonconvex, SCALES, 4.0, 4.0, 2.5, 1.0, -0.5),
        Condition("convex", "mean of f(x_t) - f*", convex, SCALES, 3.0, 0.5577, 1.0, 1.0, -0.5),
        Condition("PL", "f(x_T) - f*", pl, SCALES[::2].repeat_interleave(2), 3.0, 1.0, 4.2 * 0.8, 10**-1.5, -1.0),
    )
}


def noise(name: str, condition: Condition) -> Tensor:
    """The standard deviation of each coordinate's noise."""
    if name == "matched":
        return condition.scale
    return condition.scale[torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))]


NOISES = ("matched", "shuffled")
PUBLISHED_FORM = {"bias_correction": PUBLISHED["bias_correction"], "beta": PUBLISHED["beta"]}
OPTIMIZERS: dict[str, Callable[[list[dict]], Optimizer]] = {
    "SGD with momentum": lambda groups: SGD(groups, momentum=0.9),
    "Adam": lambda groups: Adam(groups, eps=EPSILON),
    "AMSGrad": lambda groups: Adam(groups, eps=EPSILON, amsgrad=True),
    "Sadam (beta 50)": lambda groups: Sadam(groups, **PUBLISHED_FORM),
    "SAMSGrad (beta 50)": lambda groups: SAMSGrad(groups, **PUBLISHED_FORM),
    "Sadam (auto)": lambda groups: Sadam(groups),
}


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    steps: tuple[int, ...]
    tuned_at: int  # one of steps
    fitted_from: int  # the slope is of the errors from here on
    seeds: int

    @property
    def tuning_seeds(self) -> range:
        """Seeds that nothing is reported of."""
        return range(1000, 1002)


DEFAULT = Size((100, 316, 1000, 3162, 10_000, 31_623), 3162, 1000, 8)
FULL = Size((*DEFAULT.steps, 100_000, 316_228), 3162, 1000, 20)
SMOKE = Size((30, 100, 300), 100, 30, 2)


@dataclass(frozen=True)
class Run:
    """One setting of an optimizer; beta is the published form's own if None."""

    lr: float
    steps: int
    beta: float | None = None


def train(
    optimizer: str, condition: Condition, deviation: Tensor, runs: Sequence[Run], seeds: Sequence[int]
) -> tuple[Tensor, list[float]]:
    """Makes all runs from all seeds at once: every coordinate is updated on its own, so a batch of runs is exact.

    beta="auto" is measured over a tensor: there each run is a tensor of its own.

    Returns:
        The errors, of shape (runs, seeds), and the betas that the optimizer has at the end, if it has any.
    """
    points = torch.full((len(runs), len(seeds), SIZE), condition.start, dtype=torch.float64)
    grads = torch.zeros_like(points)
    groups = []
    for run, point, grad in zip(runs, points, grads, strict=True):
        alone = optimizer == "Sadam (auto)"
        params = list(point) if alone else [point]
        for p, g in zip(params, grad if alone else [grad], strict=True):
            p.grad = g
        groups.append({"params": params, "lr": run.lr} | ({} if run.beta is None else {"beta": run.beta}))
    stepper = OPTIMIZERS[optimizer](groups)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sums, errors = (torch.zeros(len(runs), len(seeds), dtype=torch.float64) for _ in range(2))
    for t in range(max(run.steps for run in runs)):
        if t % 256 == 0:
            uniform = torch.stack([torch.rand(256, SIZE, generator=g, dtype=torch.float64) for g in generators], dim=1)
            noises = (2 * uniform - 1) * math.sqrt(3) * deviation
        value, grad = condition.function(points, condition.scale)
        sums += condition.measure(value, grad)
        torch.add(grad, noises[t % 256], out=grads)
        for run, group in zip(runs, stepper.param_groups, strict=True):
            group["lr"] = condition.rate(run.lr, t, run.steps)
        stepper.step()
        for k, run in enumerate(runs):
            if run.steps == t + 1:
                last = condition.measure(*condition.function(points[k], condition.scale))
                errors[k] = last if condition.name == "PL" else sums[k] / run.steps
                for p in stepper.param_groups[k]["params"]:
                    p.grad = None
    return errors, list(chosen_betas(stepper).values()) if isinstance(stepper, Sadam) else []


def tune(
    optimizer: str, condition: Condition, deviation: Tensor, size: Size, betas: Sequence[float | None]
) -> list[tuple[Run, bool]]:
    """The best of the nine learning rates for each beta, and whether it is the smallest or the largest of them.

    A beta under 1 makes steps as small as itself: its learning rates are larger by that.
    """
    rates = [condition.middle * 10 ** (k / 2) for k in range(-4, 5)]
    runs = [Run(lr * (1 + LN2 / beta if beta else 1), size.tuned_at, beta) for beta in betas for lr in rates]
    errors, _ = train(optimizer, condition, deviation, runs, size.tuning_seeds)
    errors = errors.mean(1).nan_to_num(math.inf, posinf=math.inf).view(len(betas), len(rates))
    best = errors.argmin(1).tolist()
    return [(runs[i * len(rates) + k], k in (0, len(rates) - 1)) for i, k in enumerate(best)]


def cell(optimizer: str, condition: Condition, deviation: Tensor, size: Size) -> dict:
    """Tunes an optimizer on a problem, then measures its errors for every number of steps."""
    [(run, edge)] = tune(optimizer, condition, deviation, size, [None])
    errors, betas = train(optimizer, condition, deviation, [Run(run.lr, t) for t in size.steps], range(size.seeds))
    largest = condition.largest(deviation)
    low, high = 1.0, 1.0
    if betas:
        low = 1 / float(softplus(torch.tensor(largest, dtype=torch.float64), min(betas)))
        high = max(betas) / LN2
    elif "SGD" not in optimizer:
        low, high = 1 / (largest + EPSILON), 1 / EPSILON
    return {
        "lr": run.lr,
        "edge": edge,
        "errors": errors.tolist(),
        "alr": [low, high],
        "bound": [condition.bound(t, deviation, low, high) for t in size.steps],
    }


def sweep(condition: Condition, deviation: Tensor, size: Size) -> dict:
    """The error of Sadam's published form over beta, each beta with its own best learning rate."""
    chosen = tune("Sadam (beta 50)", condition, deviation, size, BETAS)
    errors, _ = train("Sadam (beta 50)", condition, deviation, [run for run, _ in chosen], range(size.seeds))
    return {
        "beta": list(BETAS),
        "lr": [run.lr for run, _ in chosen],
        "edge": [edge for _, edge in chosen],
        "errors": errors.tolist(),
    }


def study(folder: Path, size: Size) -> None:
    """Measures the cells that ``folder`` does not hold yet, then makes the tables and figures from all of them."""
    from tqdm.auto import tqdm

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    path = folder / "cells.jsonl"
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # without a last line cut short
    done = {(row["condition"], row["noise"], row["optimizer"]) for row in read(path)}
    names = [*OPTIMIZERS, "beta"]
    todo = [key for c in CONDITIONS for n in NOISES for o in names if (key := (c, n, o)) not in done]
    for name, kind, optimizer in tqdm(todo, unit="cell"):
        start = time.perf_counter()
        condition = CONDITIONS[name]
        deviation = noise(kind, condition)
        row = sweep(condition, deviation, size) if optimizer == "beta" else cell(optimizer, condition, deviation, size)
        key = {"condition": name, "noise": kind, "optimizer": optimizer}
        seconds = round(time.perf_counter() - start, 1)
        with path.open("a") as file:
            print(json.dumps({**key, **row, "seconds": seconds}), file=file)
    rows = read(path)
    cells = [summary(row, size) for row in rows if row["optimizer"] != "beta"]
    sweeps = [row for row in rows if row["optimizer"] == "beta"]
    print(table(cells, size), sweep_table(sweeps), sep="\n\n")
    result = {"steps": size.steps, "tuned_at": size.tuned_at, "fitted_from": size.fitted_from, "seeds": size.seeds}
    write_json(folder / "convergence.json", {**result, "cells": cells, "sweeps": sweeps})
    labels = {name: condition.error for name, condition in CONDITIONS.items()}
    plots.convergence_figure(cells, size.steps, size.fitted_from, labels, folder / "convergence.png")
    plots.sharpness_figure(sweeps, cells, size.steps.index(size.tuned_at), labels, folder / "convergence_beta.png")


def read(path: Path) -> list[dict]:
    """The finished cells of a file, none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def slope(errors: Sequence[float], size: Size) -> float:
    """The exponent r of the power law T^r through the errors from ``fitted_from`` steps on, by least squares."""
    points = [(math.log(t), math.log(e)) for t, e in zip(size.steps, errors, strict=True) if t >= size.fitted_from]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def summary(row: dict, size: Size) -> dict:
    """A cell with the slope of each seed, their mean and its standard error, and the bound's."""
    slopes = [slope(curve, size) for curve in zip(*row["errors"], strict=True)]
    return {
        **row,
        "slopes": slopes,
        "slope": statistics.mean(slopes),
        "slope_se": error(slopes),
        "theory": CONDITIONS[row["condition"]].theory,
    }


def table(cells: list[dict], size: Size) -> str:
    """A Markdown table of the rates."""
    last = f"error at T = {size.steps[-1]:,}"
    heads = ["problem", "noise", "optimizer", "lr", "slope", "bound's slope", last, "bound there"]
    lines = [heads, ["---"] * len(heads)]
    for c in cells:
        lr = f"{c['lr']:.2g}" + (" (edge)" if c["edge"] else "")
        slopes = f"{c['slope']:.2f} ± {c['slope_se']:.2f}", f"{c['theory']:g}"
        shown = mean(c["errors"][-1]), f"{c['bound'][-1]:.1e}"
        lines.append([c["condition"], c["noise"], c["optimizer"], lr, *slopes, *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sweep_table(sweeps: list[dict]) -> str:
    """A Markdown table of the errors over beta."""
    heads = ["problem", "noise", *(f"beta {beta:g}" for beta in BETAS)]
    lines = [heads, ["---"] * len(heads)]
    for row in sweeps:
        shown = (mean(e) + (" (edge)" if edge else "") for e, edge in zip(row["errors"], row["edge"], strict=True))
        lines.append([row["condition"], row["noise"], *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean(values: Sequence[float]) -> str:
    """Mean over the seeds and its standard error, two digits."""
    return f"{statistics.mean(values):.2g} ± {error(values):.1g}"


def error(values: Sequence[float]) -> float:
    """The standard error of a mean; NaN if a run diverged."""
    return statistics.stdev(values) / math.sqrt(len(values)) if all(map(math.isfinite, values)) else math.nan


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study from the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="sadam run studies/convergence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/convergence"), help="where the cells and figures go"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--smoke", action="store_true", help="short runs, to see that it works")
    sizes.add_argument("--full", action="store_true", help="ten times as many steps, and more seeds")
    arguments = parser.parse_args(argv)
    folder = arguments.output_dir
    if arguments.smoke:
        study(folder / "smoke", SMOKE)
    elif arguments.full:
        study(folder / "full", FULL)
    else:
        study(folder, DEFAULT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
