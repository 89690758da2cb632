"""From AdamW to Sadam: reads off AdamW's moments what each beta would do, and the learning rate that goes with it."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from sadam_integrations import calibration, moments
from sadam_integrations.update import LN2, corrections, softplus, widen

BETAS = (10.0, 50.0, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7)
"""The fixed betas that are always looked at: the decades, and the paper's."""

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)

LIMIT = 100_000
"""Coordinates of a parameter that are drawn at most; its beta under "auto" is measured on all of them."""

LEAST = 100
"""Live coordinates from which on a tensor has a spread."""

EPS = 1e-8
"""AdamW's epsilon, where the state does not tell."""

FOLDER_FILES = ("optimizer.pt", "optimizer.bin")
"""What the Trainer and accelerate call an optimizer's state in the folder of a checkpoint."""


@dataclass(frozen=True)
class Row:
    """What one setting would do with the gradients of a training.

    Attributes:
        beta: The sharpness of the softplus; "adamw" is AdamW itself, to compare with.
        floor: The smallest denominator: ``ln 2 / beta``, AdamW's epsilon, or the median over auto's parameters.
        floor_share: The share of the coordinates whose ``sqrt(v)`` is below the floor.
        spread: q99/q01 of the adaptive learning rate over a tensor, median over the tensors; NaN if all are tiny.
        lr_factor: The factor on AdamW's learning rate at which the root mean square of the updates is AdamW's.
        lr: The learning rate that comes to.
    """

    beta: float | Literal["adamw", "auto"]
    floor: float
    floor_share: float
    spread: float
    lr_factor: float
    lr: float


@dataclass(frozen=True)
class Advice:
    """What :func:`advise` found; ``print`` shows it as a table.

    Attributes:
        optimizer_steps: Steps taken, the most of any parameter.
        coordinates: How many numbers are trained.
        unseen_share: The share of them that never had a gradient; they do not count.
        lr: AdamW's learning rate, the base of the factors.
        quantiles: From the probability to the quantile of ``sqrt(v)``, bias-corrected, over all coordinates.
        betas: The beta that "auto" chooses, by parameter.
        rows: AdamW, "auto" and the fixed betas.
        histogram: ``{"edges": [...], "shares": [...]}`` of log10 of ``sqrt(v)``, one edge more than shares.
    """

    optimizer_steps: int
    coordinates: int
    unseen_share: float
    lr: float
    quantiles: dict[float, float]
    betas: dict[str, float]
    rows: list[Row]
    histogram: dict[str, list[float]]

    @property
    def median_beta(self) -> float:
        """The median of auto's betas, to two digits: the fixed beta that is nearest to "auto"."""
        return float(f"{statistics.median(self.betas.values()):.1e}")

    def row(self, beta: float | str) -> Row:
        """Returns the row of a beta, of "auto" or of "adamw"; a ``KeyError`` if there is none."""
        found = [row for row in self.rows if row.beta == beta]
        if not found:
            raise KeyError(f"beta={beta!r} was not looked at: give it to advise(..., betas=[...])")
        return found[0]

    def __str__(self) -> str:
        quantiles = ", ".join(f"{100 * q:g} % {value:.2g}" for q, value in self.quantiles.items())
        seen = f"{100 * (1 - self.unseen_share):.3g} % of {self.coordinates:,} coordinates"
        betas = sorted(self.betas.values())
        auto = f"{betas[0]:.2g} to {betas[-1]:.2g}, median {self.median_beta:.2g}"
        cells = [["setting", "floor", "on the floor", "spread", "lr factor", "lr"]]
        for row in self.rows:
            names = {"adamw": "AdamW", "auto": 'beta="auto"'}
            name = names[row.beta] if isinstance(row.beta, str) else f"beta={row.beta:.6g}"
            share, spread = f"{100 * row.floor_share:.3g} %", "" if math.isnan(row.spread) else f"{row.spread:.3g}"
            cells.append([name, f"{row.floor:.2g}", share, spread, f"{row.lr_factor:.3g}", f"{row.lr:.2g}"])
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        cells.insert(1, ["-" * width for width in widths])
        table = "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells)
        return (
            f"sqrt(v) after {self.optimizer_steps} steps, {seen}: {quantiles}\n"
            f'beta="auto" over {len(betas)} parameters: {auto}\n\n{table}'
        )


def advise(
    source: Optimizer | Mapping[str, Any] | str | Path, model: Module | None = None, betas: Sequence[float] = BETAS
) -> Advice:
    """Tells what each beta would do in a training that AdamW has begun, and the learning rate to begin it with.

    Nothing but the moments is needed: no model, no data, and the optimizer is not changed. A learning rate that
    matches the size of AdamW's update is where to begin a search, not its result.

    Args:
        source: Adam, AdamW or one of this package's optimizers after some dozens of steps, bare or wrapped by
            accelerate, Lightning or DeepSpeed; its ``state_dict()``; or the path of a checkpoint that holds it:
            the Trainer's folder ``checkpoint-64``, its ``optimizer.pt``, or Lightning's ``.ckpt``.
        model: Gives the parameters' names, if ``source`` is an optimizer.
        betas: The fixed betas to look at, beside the median of what "auto" chooses.

    Returns:
        The advice: ``print`` shows the table.

    Raises:
        ValueError: If there is no state of Adam's kind in the source, or a beta is not a positive number.
        OSError: If a file cannot be read.

    Example::

        print(advise(optimizer))
        print(advise("runs/bert/checkpoints/checkpoint-64").row("auto").lr)
    """
    if wrong := [beta for beta in betas if not (isinstance(beta, (int, float)) and 0 < beta < math.inf)]:
        raise ValueError(f"advise: beta={wrong[0]!r} is not a positive number")
    where = f"advise, {source}" if isinstance(source, (str, Path)) else "advise"
    if isinstance(source, (str, Path)):
        state_dict: Mapping[str, Any] = read_checkpoint(Path(source))
    elif isinstance(source, Mapping):
        state_dict = find_state(source, where)
    else:
        state_dict = _state_of(source, model)
    pieces = list(_pieces(state_dict, where))
    if not any(len(piece.root) for piece in pieces):
        raise ValueError(f"{where}: no coordinate has a gradient that is a number other than zero: train a few steps")
    return _summary([piece for piece in pieces if len(piece.root)], pieces, betas)


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Reads the state of an optimizer from a checkpoint, without running any code that a file may hold.

    Args:
        path: A folder of the Trainer or accelerate, its ``optimizer.pt``, Lightning's ``.ckpt``, or any file that
            ``torch.save`` made of a state dict.

    Returns:
        The state dict.

    Raises:
        ValueError: If there is none in it, or it is damaged or not safe to read.
        OSError: If there is no such file.
    """
    if path.is_dir():
        inside = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not inside:
            raise ValueError(f"{path}: the folder holds no {' or '.join(FOLDER_FILES)}: give the file itself")
        path = inside[0]
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no error of its own: pickle's, zipfile's, RuntimeError, EOFError and more
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path}: the file holds a {found[1]}, which only running its code would make, and that is not done. "
                f"Load it yourself if you trust it, and give advise() the optimizer's state dict that is in it"
            ) from None
        raise ValueError(f"{path}: not a file that torch.save made, or a damaged one") from None
    return find_state(content, str(path))


def find_state(content: Any, where: str) -> Mapping[str, Any]:
    """Returns the optimizer's state dict in what a checkpoint holds.

    Args:
        content: A state dict, or a mapping with one: Lightning's, or with the key ``optimizer``.
        where: What an error says first.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(content, Mapping):
        if isinstance(content.get("state"), Mapping) and "param_groups" in content:
            return content
        several = content.get("optimizer_states")
        if isinstance(several, Sequence) and several:
            if len(several) > 1:
                raise ValueError(
                    f"{where}: it holds {len(several)} optimizers: load it, and give advise() one of optimizer_states"
                )
            return find_state(several[0], where)
        for key in ("optimizer", "optimizer_state_dict"):
            if isinstance(content.get(key), Mapping):
                return find_state(content[key], where)
    held = ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(f"{where}: no optimizer's state dict (state and param_groups) in it, only: {held or 'nothing'}")


def _state_of(optimizer: Any, model: Module | None) -> dict[str, Any]:
    """The state dict of an optimizer, with the names of its parameters where the model gives them."""
    optimizer = moments.unwrap(optimizer)
    if not hasattr(optimizer, "param_groups"):
        raise ValueError(f"advise: a {type(optimizer).__name__} is neither an optimizer nor its state dict or a path")
    names = {} if model is None else moments.names(model)
    found = optimizer.state_dict()
    groups = []
    for live, group in zip(optimizer.param_groups, found["param_groups"], strict=True):
        own = {"param_names": [names.get(p, "") for p in live["params"]]} if names else {}
        groups.append({**group, **own})
    return {**found, "param_groups": groups}


class _Piece(NamedTuple):
    """One parameter: its coordinates that have had a gradient, drawn evenly."""

    name: str
    size: int
    live: int
    step: int
    root: Tensor  # sqrt(v), bias-corrected
    mean: Tensor  # the first moment, bias-corrected
    own: Tensor  # the update that its optimizer's lr goes with: AdamW's, or that of a fixed beta
    beta: float  # auto's
    eps: float
    lr: float

    @property
    def weight(self) -> float:
        return self.live / len(self.root)


def _pieces(state_dict: Mapping[str, Any], where: str) -> Iterator[_Piece]:
    needed = ("step", "exp_avg", "exp_avg_sq")
    states, fix = state_dict["state"], "train a few steps first"
    if not states:
        raise ValueError(f"{where}: the optimizer has no state yet: {fix}")
    for key in needed:
        if not any(isinstance(state, Mapping) and key in state for state in states.values()):
            kept = sorted({str(k) for state in states.values() if isinstance(state, Mapping) for k in state})
            raise ValueError(
                f"{where}: the state has no {key}, only {', '.join(kept) or 'nothing'}: advice needs the moments of "
                f"Adam, AdamW or one of this package's optimizers"
            )
    for i, group in enumerate(state_dict["param_groups"]):
        if lacking := {"params", "lr", "betas"} - set(group):
            raise ValueError(f"{where}: group {i} has no {min(lacking)}: this is no state of Adam's kind")
        names = group.get("param_names") or [""] * len(group["params"])
        for j, (index, name) in enumerate(zip(group["params"], names, strict=True)):
            state = states.get(index, {})
            if all(key in state for key in needed):
                yield _piece(name or f"{i}.{j}", group, state, where)


def _piece(name: str, group: Mapping[str, Any], state: Mapping[str, Any], where: str) -> _Piece:
    step = float(state["step"])
    if not 1 <= step < math.inf:
        raise ValueError(f"{where}: {name}: step={step:g} is not a count of steps: train a few first")
    v, m = (_flat(state[key]) for key in ("max_exp_avg_sq" if "max_exp_avg_sq" in state else "exp_avg_sq", "exp_avg"))
    if v.shape != m.shape:
        raise ValueError(f"{where}: {name}: the two moments have {len(m)} and {len(v)} numbers: the state is damaged")
    beta1, beta2 = (float(beta) for beta in group["betas"])
    for_mean, for_root = (float(x) for x in corrections(step, beta1, beta2, "inner"))
    (auto,) = calibration.measure([calibration.histogram([v])], [for_root])
    live = (v >= torch.finfo(v.dtype).tiny) & v.isfinite() & m.isfinite()
    count = int(live.sum())
    raw, m = v[live].sqrt(), m[live]
    if count > LIMIT:
        chosen = torch.randint(count, (LIMIT,), generator=torch.Generator().manual_seed(0))
        raw, m = raw[chosen], m[chosen]
    root = raw * for_root
    eps = float(group.get("eps", EPS))
    own = m * for_mean / (root + eps)
    if group.get("beta", "auto") != "auto":  # its learning rate is no AdamW's
        a, b = (float(x) for x in corrections(step, beta1, beta2, group.get("bias_correction", "inner")))
        own = a * m / softplus(raw * b, group["beta"])
    lr = float(group.get("initial_lr", group["lr"]))
    root, mean, own = (x.float() for x in (root, m * for_mean, own))
    return _Piece(name, len(v), count, int(step), root, mean, own, auto, eps, lr)


def _flat(t: Tensor) -> Tensor:
    t = t.full_tensor() if hasattr(t, "full_tensor") else t
    return widen(t.detach()).flatten().cpu()


def _summary(pieces: list[_Piece], everything: list[_Piece], betas: Sequence[float]) -> Advice:
    root = torch.cat([piece.root for piece in pieces])
    weight = torch.cat([torch.full_like(piece.root, piece.weight) for piece in pieces]).double()
    found = {piece.name: piece.beta for piece in pieces}
    middle = float(f"{statistics.median(found.values()):.1e}")

    total = float(weight.sum())
    size = math.sqrt(_squares(pieces, [p.mean / (p.root + p.eps) for p in pieces]) / total)
    own = math.sqrt(_squares(pieces, [p.own for p in pieces]) / total)
    lr = max(piece.lr for piece in pieces) * (own / size if size else 1.0)
    spread_over = [p for p in pieces if p.live >= LEAST]
    tails = [torch.quantile(p.root.double(), torch.tensor([0.01, 0.99]).double()) for p in spread_over]

    def row(beta: Any, floors: list[float], denominators: list[Any], gain: float = 1.0) -> Row:
        updates = [gain * p.mean / by(p.root) for p, by in zip(pieces, denominators, strict=True)]
        other = math.sqrt(_squares(pieces, updates) / total)
        below = sum(p.weight * int((p.root < floor).sum()) for p, floor in zip(pieces, floors, strict=True)) / total
        rules = [by for p, by in zip(pieces, denominators, strict=True) if p.live >= LEAST]
        ends = [by(tail) for by, tail in zip(rules, tails, strict=True)]
        spread = statistics.median([float(end[1] / end[0]) for end in ends]) if ends else math.nan
        factor = size / other if other else math.nan
        return Row(beta, statistics.median(floors), below, spread, factor, lr * factor)

    def soft(beta: float) -> Any:
        return lambda x: softplus(x, beta)

    rows = [row("adamw", [p.eps for p in pieces], [lambda x, eps=p.eps: x + eps for p in pieces])]
    own_betas = [p.beta for p in pieces]
    rows.append(row("auto", [LN2 / b for b in own_betas], [soft(b) for b in own_betas], calibration.GAIN))
    for beta in sorted({float(beta) for beta in (*betas, middle)}):
        rows.append(row(beta, [LN2 / beta] * len(pieces), [soft(beta)] * len(pieces)))
    size_of_all = sum(piece.size for piece in everything)
    return Advice(
        optimizer_steps=max(piece.step for piece in everything),
        coordinates=size_of_all,
        unseen_share=1 - sum(piece.live for piece in everything) / size_of_all,
        lr=lr,
        quantiles=dict(zip(QUANTILES, _quantiles(root, weight), strict=True)),
        betas=found,
        rows=rows,
        histogram=_histogram(root.double().log10(), weight),
    )


def _squares(pieces: list[_Piece], values: list[Tensor]) -> float:
    """The sum of squares over all live coordinates, from those sampled."""
    return sum(p.weight * float(x.double().square().sum()) for p, x in zip(pieces, values, strict=True))


def _quantiles(values: Tensor, weight: Tensor) -> list[float]:
    values, order = values.sort()
    position = weight[order].cumsum(0) - weight[order] / 2
    ranks = torch.tensor(QUANTILES, dtype=torch.double) * weight.sum()
    return values[torch.searchsorted(position, ranks).clamp(max=len(values) - 1)].tolist()


def _histogram(values: Tensor, weight: Tensor, bins: int = 120) -> dict[str, list[float]]:
    low, high = math.floor(float(values.min())), math.floor(float(values.max())) + 1
    index = ((values - low) / (high - low) * bins).long().clamp(max=bins - 1)
    shares = torch.bincount(index, weight, bins) / weight.sum()
    return {"edges": [low + (high - low) * i / bins for i in range(bins + 1)], "shares": shares.tolist()}
