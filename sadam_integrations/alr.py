"""The adaptive learning rate (A-LR) of every coordinate, 1 / denominator of the step: samples, quantiles, a record."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from sadam_integrations import moments
from sadam_integrations.moments import Entry
from sadam_integrations.update import LN2, corrections, softplus, widen

QUANTILES = {"q01": 0.01, "q25": 0.25, "median": 0.5, "q75": 0.75, "q99": 0.99}
"""The quantiles of a summary."""

OF_A_LAYER = ("median", "q99_over_q01", "floor_share")
"""What is logged of each parameter, if that is wanted."""

LEAST = 1000
"""Coordinates sampled from a tensor at least, if it has as many."""

PIECE = 1 << 18
"""Elements scanned at once on a CPU, so that they stay in its cache."""

BIN = 10
"""Bins of the histogram for each power of ten."""

TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Sample(NamedTuple):
    """Coordinates of one parameter, or of the flat piece of parameters that a sharded optimizer works on.

    Attributes:
        name: The parameter's name.
        size: How many coordinates it has.
        unseen: How many of them have never had a gradient: their second moment is zero, and they do not move.
        root: float32 of shape (n,) on the CPU: the sampled ``sqrt(v)`` as the step sees it, bias-corrected where the
            step does so. Zeros, infinities and NaN are left out.
        alr: The A-LR at the same coordinates.
        floor: The smallest denominator that the rule allows: ``ln 2 / beta`` of the softplus, or Adam's epsilon.
            Coordinates with a smaller root are on the floor.
        low: Smallest root of all coordinates, sampled or not; NaN if none is alive.
        high: Largest root.
        alr_low: Smallest A-LR.
        alr_high: Largest A-LR.
    """

    name: str
    size: int
    unseen: int
    root: Tensor
    alr: Tensor
    floor: float
    low: float
    high: float
    alr_low: float
    alr_high: float

    @property
    def weight(self) -> float:
        """How many coordinates each sampled one stands for."""
        return (self.size - self.unseen) / max(1, len(self.root))


@torch.no_grad()
def sample(optimizer: Any, model: Module | None = None, limit: int = 100_000) -> list[Sample]:
    """Samples the A-LR of every parameter that an optimizer has updated.

    The denominator is that of the last step: the softplus of this package's optimizers, and ``sqrt(v) + eps`` of all
    others that keep ``exp_avg_sq`` (or ``max_exp_avg_sq``). Parameters whose beta is not measured yet are left out.

    The coordinates are the same each time, and the global random number generators are not used. Minimum, maximum and
    the number of unseen coordinates are exact. Every process must call this: FSDP2's state is gathered, tensor by
    tensor, and so are the samples of FSDP1, ZeroRedundancyOptimizer and DeepSpeed ZeRO, so each gets the whole.

    Args:
        optimizer: Wrapped or not; see :func:`sadam_integrations.moments.unwrap`.
        model: Gives the parameters' names. Without it they are those the optimizer was built with
            (``AdamW(model.named_parameters())``), or else ``"group.index"``.
        limit: About how many coordinates to take of all parameters together, spread by their sizes; but at least a
            thousand of each parameter.

    Returns:
        One sample for each parameter, in the optimizer's order; none before the first step.

    Raises:
        TypeError: If the optimizer keeps no second moment.
    """
    entries = moments.entries(optimizer, model)
    total = sum(moments.gather(optimizer, sum(entry.second.numel() for entry in entries)))
    found = [item for rank in moments.gather(optimizer, _measure(entries, limit / max(1, total))) for item in rank]
    return [one for _, one in sorted(found, key=lambda item: item[0])]


def summary(samples: Sequence[Sample]) -> dict[str, float]:
    """Quantiles of the A-LR and of sqrt(v) over the coordinates of several parameters.

    A quantile is that of the whole set of coordinates, as ``torch.quantile`` interpolates it, if every sampled one
    stood for :attr:`Sample.weight` equal ones; it is exact when all are sampled.

    Args:
        samples: What :func:`sample` returned, or some of it.

    Returns:
        ``"min"``, ``"q01"``, ``"q25"``, ``"median"``, ``"q75"``, ``"q99"``, ``"max"`` of the A-LR, its spread
        ``"q99_over_q01"``, ``"floor_share"`` (of the coordinates that move), ``"unseen_share"`` (of all), and
        ``"sqrt_v_min"``, ``"sqrt_v_q01"``, … of the root. ``{}`` for no samples, and only ``"unseen_share"`` where
        nothing has had a gradient yet.
    """
    if not samples:
        return {}
    unseen = {"unseen_share": sum(s.unseen for s in samples) / sum(s.size for s in samples)}
    live = [s for s in samples if len(s.root)]
    if not live:
        return unseen
    weights = _weights(live)
    alr = _quantiles(torch.cat([s.alr for s in live]), weights)
    root = _quantiles(torch.cat([s.root for s in live]), weights)
    floored = sum(s.weight * int((s.root < s.floor).sum()) for s in live)
    return {
        "min": min(s.alr_low for s in live),
        **alr,
        "max": max(s.alr_high for s in live),
        "q99_over_q01": alr["q99"] / alr["q01"],
        "floor_share": floored / float(weights.sum()),
        **unseen,
        "sqrt_v_min": min(s.low for s in live),
        **{f"sqrt_v_{key}": value for key, value in root.items()},
        "sqrt_v_max": max(s.high for s in live),
    }


def metrics(optimizer: Any, model: Module | None = None, layers: bool = False) -> dict[str, float]:
    """What to log of an optimizer: its :func:`summary`, each key as ``"alr/<key>"``.

    Args:
        optimizer: See :func:`sample`.
        model: See :func:`sample`.
        layers: Also ``"alr_layer/<name>/median"``, ``"…/q99_over_q01"`` and ``"…/floor_share"`` of each parameter.

    Returns:
        The numbers by name; none before the first step.

    Raises:
        TypeError: If the optimizer keeps no second moment.
    """
    return named(sample(optimizer, model), layers)


def named(samples: Sequence[Sample], layers: bool = False, prefix: str = "alr") -> dict[str, float]:
    """Names the numbers of samples that there are already.

    Args:
        samples: What :func:`sample` returned.
        layers: See :func:`metrics`.
        prefix: What the names begin with.

    Returns:
        What :func:`metrics` returns.
    """
    found = {f"{prefix}/{key}": value for key, value in summary(samples).items()}
    if layers:
        for name, own in _by(samples, {s.name: s.name for s in samples}).items():
            values = summary(own)
            found |= {f"{prefix}_layer/{name}/{key}": values[key] for key in OF_A_LAYER if key in values}
    return found


def layer_groups(names: Iterable[str]) -> dict[str, str]:
    """Sorts the parameters of a model by layer, from their names.

    Args:
        names: Of all parameters, in any order.

    Returns:
        From a parameter's name to ``"embeddings"``, ``"layer 0"``, ``"layer 1"``, … or ``"head"``. In a model without
        one main stack of numbered layers it is the first part of the name in which the names differ.
    """
    names = list(names)
    numbered = {name: match for name in names if (match := re.match(r"(?:.*?\.)??(\d+)\.(?!\d+$)", name))}
    stacks = Counter(name[: match.start(1)] for name, match in numbered.items())
    (stack, members), *_ = stacks.most_common(1) or [("", 0)]
    if members and members > 0.75 * sum(stacks.values()):
        found = {}
        for name in names:
            if name in numbered and name.startswith(stack):
                found[name] = f"layer {numbered[name][1]}"
            else:
                found[name] = "embeddings" if re.search(r"emb|patch|token|wte|wpe|pos_", name.lower()) else "head"
        return found
    parts = [name.split(".") for name in names]
    shortest = min((len(part) for part in parts), default=1)
    first = next((i for i in range(shortest - 1) if len({part[i] for part in parts}) > 1), shortest - 1)
    return {name: part[first] for name, part in zip(names, parts, strict=True)}


def histogram(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """How the coordinates spread over the powers of ten, before the floor and after it.

    Args:
        samples: What :func:`sample` returned, or some of it.

    Returns:
        ``"edges"``: log10, in steps of 0.1, one more than there are bins; ``"before"``: each bin's share of
        ``1 / sqrt(v)``; ``"after"``: its share of the A-LR. Empty lists where nothing has had a gradient yet.
    """
    live = [s for s in samples if len(s.root)]
    if not live:
        return {"edges": [], "before": [], "after": []}
    weights = _weights(live)
    before = (torch.cat([s.root for s in live]).double().log10() * -BIN).floor().long()
    after = (torch.cat([s.alr for s in live]).double().log10() * BIN).floor().long()
    low, high = int(min(before.min(), after.min())), int(max(before.max(), after.max()))
    before, after = (
        torch.bincount(bins - low, weights, minlength=high - low + 1) / weights.sum() for bins in (before, after)
    )
    edges = [edge / BIN for edge in range(low, high + 2)]
    return {"edges": edges, "before": before.tolist(), "after": after.tolist()}


class Record:
    """The file ``alr.jsonl`` of a run: a line for each measurement.

    Args:
        folder: Where the file is, or will be.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.path = Path(folder) / "alr.jsonl"

    def add(self, step: int, samples: Sequence[Sample]) -> None:
        """Appends the line of a step: ``{"step", "all", "groups", "histogram"}``.

        Args:
            step: The optimizer's steps so far.
            samples: What :func:`sample` returned.
        """
        groups = _by(samples, layer_groups(s.name for s in samples))
        line = {
            "step": step,
            "all": summary(samples),
            "groups": {group: summary(own) for group, own in groups.items()},
            "histogram": histogram(samples),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Drops the lines after a step, those of a run that goes on from an older checkpoint, and a last cut-off one.

        Args:
            step: The last step to keep.
        """
        if self.path.exists():
            kept = [json.dumps(line) + "\n" for line in self.read(self.path.parent) if line["step"] <= step]
            new = self.path.with_suffix(".new")
            new.write_text("".join(kept), encoding="utf-8")
            new.replace(self.path)

    @staticmethod
    def read(folder: str | os.PathLike) -> list[dict[str, Any]]:
        """The lines of a folder's file.

        Args:
            folder: Where the file is.

        Returns:
            The lines; none if there is no file. A last line that was cut off is not a line.

        Raises:
            ValueError: If another line is damaged.
        """
        path = Path(folder) / "alr.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = []
        for number, line in enumerate(lines, 1):
            try:
                found.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    raise ValueError(f"{path}, line {number} is not JSON: delete the line, or the file") from None
        return found


def _measure(entries: list[Entry], share: float) -> list[tuple[tuple[int, int], Sample]]:
    """Reads the tensors where they are, and computes on the CPU from the few numbers that come back."""
    ends, counts, taken, sizes = [], [], [], []
    for entry in entries:
        v: Any = entry.second
        v = widen(v.full_tensor() if hasattr(v, "full_tensor") else v).reshape(-1)
        low, high, unseen = _scan(v)
        size = len(v)
        n = max(LEAST, round(share * size))
        ends.append(torch.stack([low, high]))
        counts.append(unseen)
        taken.append(v[_positions(size, n).to(v.device)] if n < size else v)
        sizes.append(size)
    steps = [torch.as_tensor(1.0 if entry.step is None else entry.step) for entry in entries]
    steps = [step.full_tensor() if hasattr(step, "full_tensor") else step for step in steps]
    rows = zip(entries, sizes, _to_cpu(ends), _to_cpu(counts), _to_cpu(taken), _to_cpu(steps), strict=True)
    return [
        (entry.place, _compute(entry, size, int(unseen), ends, taken, 0.0 if entry.step is None else float(step)))
        for entry, size, ends, unseen, taken, step in rows
        if step >= 1
    ]


def _scan(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest live value (infinity and 0 if there is none), and the number of zeros."""
    on_cpu = v.device.type == "cpu"
    lows, highs, zeros = [], [], [torch.zeros((), dtype=torch.int64, device=v.device)]
    for piece in v.split(PIECE if on_cpu else len(v)):
        low, high = piece.aminmax()
        if not (on_cpu and low > 0 and high < math.inf):  # a GPU is not waited for
            live = (piece > 0) & (piece < math.inf)
            low, high = torch.where(live, piece, math.inf).amin(), torch.where(live, piece, 0.0).amax()
            zeros.append((piece == 0).sum())
        lows.append(low)
        highs.append(high)
    return torch.stack(lows).amin(), torch.stack(highs).amax(), torch.stack(zeros).sum()


def _positions(size: int, n: int) -> Tensor:
    """One position from each of ``n`` equal stretches of a tensor, the same ones for the same size."""
    offsets = torch.rand(n, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return ((torch.arange(n) + offsets) * (size / n)).long().clamp_(max=size - 1)


def _to_cpu(tensors: list[Tensor]) -> list[Tensor]:
    """Copies to the CPU, flat; those of one device and dtype travel together."""
    found: list[Tensor] = [torch.empty(0)] * len(tensors)
    for kind in {(t.device, t.dtype) for t in tensors}:
        own = [i for i, t in enumerate(tensors) if (t.device, t.dtype) == kind]
        flat = torch.cat([tensors[i].reshape(-1) for i in own]).cpu()
        for i, piece in zip(own, flat.split([tensors[i].numel() for i in own]), strict=True):
            found[i] = piece
    return found


def _compute(entry: Entry, size: int, unseen: int, ends: Tensor, taken: Tensor, step: float) -> Sample:
    beta1, beta2 = (float(b) for b in entry.betas[:2])
    for_root = corrections(step, beta1, beta2, entry.form)[1] if step else 1.0
    taken = taken[(taken > 0) & (taken < math.inf)]
    if not len(taken) and ends[0] < math.inf:  # few are alive, and none was drawn
        taken = ends
    root = torch.cat([ends, taken]).sqrt() * for_root
    alr = 1 / (root + entry.eps if entry.beta is None else softplus(root, entry.beta))
    root, alr = (x.float().clamp(TINY, HUGE) for x in (root, alr))
    low, high, alr_high, alr_low = [*root[:2].tolist(), *alr[:2].tolist()] if len(taken) else [math.nan] * 4
    floor = entry.eps if entry.beta is None else LN2 / entry.beta
    return Sample(entry.name, size, unseen, root[2:].clone(), alr[2:].clone(), floor, low, high, alr_low, alr_high)


def _weights(samples: Sequence[Sample]) -> Tensor:
    return torch.cat([torch.full((len(s.root),), s.weight, dtype=torch.float64) for s in samples])


def _quantiles(values: Tensor, weights: Tensor) -> dict[str, float]:
    """The :data:`QUANTILES` of values of which each stands for as many equal ones as its weight says."""
    order = values.view(torch.int32).argsort()  # positive floats are in the order of their bits, found 20 times as fast
    values, weights = values[order], weights[order]
    ends = weights.cumsum(0)  # a value takes the ranks from ends - weight to ends - 1; between ranks is a straight line
    ranks = torch.tensor(list(QUANTILES.values()), dtype=torch.float64) * (ends[-1] - 1).clamp_(min=0)
    i = torch.searchsorted(ends, ranks, right=True).clamp_(max=len(values) - 1)
    last = ends[i] - weights[i].clamp(max=1)
    part = ((ranks - last) / (ends[i] - last)).clamp_(0, 1)
    here, following = values[i].double(), values[(i + 1).clamp_(max=len(values) - 1)].double()
    found = here + (following - here) * part
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def _by(samples: Sequence[Sample], label: dict[str, str]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for one in samples:
        found.setdefault(label[one.name], []).append(one)
    return found
