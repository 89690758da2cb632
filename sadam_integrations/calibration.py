"""``beta="auto"``: the softplus floor measured from each parameter's own second moment."""

from __future__ import annotations

import logging
import math
import statistics
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import is_fake
from torch.nn import Module
from torch.optim import Optimizer

from sadam_integrations import backends, moments, shards
from sadam_integrations.backends.rows import rows_of
from sadam_integrations.said import warn
from sadam_integrations.update import HALF, LN2, corrections, gradient, second_moment, widen
from sadam_integrations.watch import Watch

logger = logging.getLogger(__name__)

FLOOR = 2.0
"""The floor of the denominator, in units of the quantile below."""

QUANTILE = 0.25
"""Which quantile of a tensor's ``sqrt(v)`` the floor is measured by; the few with large gradients do not move it."""

GAIN = 1.5
"""Factor on the step. It makes up for most of what the floor takes, so that AdamW's learning rate carries over."""

MANTISSA = 3
"""Bits of the mantissa that the histogram tells apart: eight bins an octave of v."""

SETTLED = 64
"""From this step on, a parameter's beta counts as settled."""

LOOKED_AT = 10
"""The step after which a fixed beta's floor is looked at: the second moment has an order of magnitude by then, and the
shortest epochs are not over."""

FAR_BELOW = 0.02
"""A median of ``sqrt(v)`` under this part of a fixed beta's floor leaves nothing of Adam; the paper's CNN has 0.24."""

MOMENTUM_SGD = 1e-2
"""A learning rate from which on momentum SGD may be what is wanted: the published one."""


def is_due(step: int, beta: float) -> bool:
    """Whether a parameter that takes its ``step``-th step is measured: at powers of two, or when it never was."""
    return beta == 0 or step & (step - 1) == 0


def measure(histograms: Iterable[Tensor], corrections: Sequence[float]) -> list[float]:
    """The beta of each parameter, from its second moment as the coming update will use it.

    ``beta = ln 2 / (FLOOR * q)``, where ``q`` is the ``QUANTILE`` of the bias-corrected ``sqrt(v)`` over the
    coordinates that have had a gradient. Coordinates that never had one, or whose ``sqrt(v)`` is too small beside the
    largest to be told from zero in float32, do not count; neither do infinities and NaN.

    Args:
        histograms: The :func:`histogram` of each parameter's second moment (SAMSGrad: of its maximum).
        corrections: The factor that turns each parameter's ``sqrt(exp_avg_sq)`` into Adam's denominator.

    Returns:
        One beta for each parameter; 0.0 where there is nothing to measure.
    """
    quantiles = [_quantile(histogram.cpu()) for histogram in histograms]
    floors = [FLOOR * math.sqrt(q) * correction for q, correction in zip(quantiles, corrections, strict=True)]
    return [LN2 / floor if floor else 0.0 for floor in floors]


@_disable_dynamo
def _measure_untraced(histograms: Iterable[Tensor], corrections: list[float]) -> list[float]:
    """Once torch._dynamo is imported, as torch.compile does: in torch 2.6 it fails at what depends on the counts."""
    return measure(histograms, corrections)


def calibrate(
    optimizer: Any,
    group: dict[str, Any],
    params: list[Tensor],
    states: list[dict[str, Any]],
    columns: list[list[Tensor]],
    memo: dict[str, Any],
    compiling: bool,
) -> None:
    """Measures beta for the parameters that are due, from the second moments that the coming update will use.

    Due are also those whose state somebody else has touched. The step counts, which may lie on a GPU, are read only
    when one of them can be due: at most one step passes at a call.

    Args:
        optimizer: One of this package's.
        group: The parameter group, as it is in effect.
        params: Its parameters that have a gradient.
        states: Their states: where beta is kept.
        columns: What beta is measured from, out of these: the second moments, the steps, and SAMSGrad's maxima.
        memo: What is kept for the group from step to step.
        compiling: Whether torch.compile traces the step.
    """
    name = type(optimizer).__name__
    if is_frozen():
        warn_frozen(name, "CUDA graph capture")
        return
    betas = [state["beta"] for state in states]
    touched: Collection[int] = ()
    if not compiling:
        same, touched = _watch(optimizer, memo).look(params, columns, optimizer.state)
        if same and not touched and 0.0 not in betas and memo.get("left"):
            memo["left"] -= 1
            return
    if not any(map(has_values, params)):
        return
    steps = [int(state["step"].item()) + 1 for state in states]
    if compiling:
        due = {i for i, beta in enumerate(betas) if not beta}
        if min(steps) <= SETTLED:
            warn_frozen(name, "torch.compile")
    else:
        due = {i for i, step in enumerate(steps) if i in touched or is_due(step, betas[i])}
        memo["settled"] = SETTLED in steps
        memo["left"] = min((1 << step.bit_length()) - step for step in steps) - 1
    if 1 in steps:
        shards.warn_flat(name, params)
    rows = [(params[i], states[i], steps[i]) for i in sorted(due) if params[i].numel() and has_values(params[i])]
    beta1, beta2 = group["betas"]
    factors = [float(corrections(step, beta1, beta2, group["bias_correction"])[1]) for *_, step in rows]
    by_kernel = backends.pick(params, group) is backends.cpu.cpu
    histograms = (_histogram_after(optimizer, group, *row, by_kernel) for row in rows)
    found = (_measure_untraced if "torch._dynamo" in sys.modules else measure)(histograms, factors)
    for (_, state, _), beta in zip(rows, found, strict=True):
        state["beta"] = beta or state["beta"]


def _watch(optimizer: Any, memo: dict[str, Any]) -> Watch:
    if "watch" not in memo:
        keys = ("exp_avg_sq", "step", *(["max_exp_avg_sq"] if optimizer._amsgrad else []))
        kept = [(p, state) for p, state in optimizer.state.items() if isinstance(state, dict)]
        memo["watch"] = Watch((p, [state[key] for key in keys]) for p, state in kept if state.keys() >= set(keys))
    return memo["watch"]


def _histogram_after(
    optimizer: Any, group: dict[str, Any], p: Any, state: dict[str, Any], step: int, by_kernel: bool
) -> Tensor:
    """The histogram of a parameter's second moment (SAMSGrad: of its maximum) as the coming step will make it."""
    beta2 = group["betas"][1]
    decay = {"weight_decay": group["weight_decay"], "decoupled": optimizer._decoupled, "maximize": group["maximize"]}
    stored = [state["exp_avg_sq"], *([state["max_exp_avg_sq"]] if optimizer._amsgrad else [])]
    rows = rows_of([p.grad], [[t] for t in (p, *stored, state["step"])])
    if by_kernel and rows.whole[0]:
        local = [column[0] for column in rows.columns[:-1]]
        counts = backends.cpu.count(*rows.grads, *local, beta2=beta2, correction=1 - beta2**step, **decay)
        if counts is not None:
            return shards.add_up(counts, p, optimizer)

    def after(p: Tensor, grad: Tensor, v: Tensor, *v_max: Tensor) -> Tensor:
        grad = gradient(widen(p), widen(grad), **decay)
        new = second_moment(widen(v), grad, beta2)
        if v.dtype in HALF:  # where the state underflows, this gradient stands for those that it could not hold
            new = torch.where(new.to(v.dtype) == 0, (1 - beta2**step) * (grad * grad), new)
        return torch.maximum(widen(v_max[0]), new) if v_max else new

    counts = histogram(after(*piece) for piece in backends.pieces([p, p.grad, *stored]))
    return counts if hasattr(p, "to_local") else shards.add_up(counts, p, optimizer)


def histogram(pieces: Iterable[Tensor]) -> Tensor:
    """Counts the entries of a tensor by their exponent and leading mantissa bits.

    Multiplying the loss by a power of two shifts the histogram and changes nothing else. A sharded tensor (DTensor) is
    counted as a whole, by adding up the shards' small integers.

    Args:
        pieces: The tensor in one or more pieces, float32 or float64, any shapes, nothing negative.

    Returns:
        int64 of shape (2048,), or (16384,) for float64.
    """
    return torch.stack([_count(piece) for piece in pieces]).sum(0)


def _count(piece: Any) -> Tensor:
    local = piece.to_local() if hasattr(piece, "to_local") else piece
    if local.dtype == torch.float64:
        integer, shift, bins = torch.int64, 52 - MANTISSA, 2048 << MANTISSA
    else:
        integer, shift, bins = torch.int32, 23 - MANTISSA, 256 << MANTISSA
    bits = local.contiguous().view(-1).view(integer)
    return shards.add_up(torch.bincount((bits & torch.iinfo(integer).max) >> shift, minlength=bins), piece)


def _quantile(counts: Tensor) -> float:
    """The ``QUANTILE`` of the live entries of a histogram, 0.0 if there are none."""
    octave = 1 << MANTISSA
    filled = counts[octave:-octave].nonzero().flatten() + octave  # no zeros and subnormals, no infinities and NaN
    first = int(filled.max()) - 46 * octave if len(filled) else 0  # 46 octaves of v are 23 of sqrt(v): float32's digits
    live = filled[filled >= first]
    numbers = counts[live].tolist()
    rank = QUANTILE * sum(numbers)
    for i, number in zip(live.tolist(), numbers, strict=True):
        if rank <= number:
            low, high = (_lower_edge(j, len(counts)) for j in (i, i + 1))
            return low + (high - low) * rank / number
        rank -= number
    return 0.0


def _lower_edge(index: int, bins: int) -> float:
    octave = 1 << MANTISSA
    return math.ldexp(1 + index % octave / octave, index // octave - (bins // octave // 2 - 1))


def has_values(t: Tensor) -> bool:
    """Whether a tensor has values to measure: those of the meta device and fake ones have a shape alone."""
    return not (t.is_meta or is_fake(t))


def is_frozen() -> bool:
    """Whether a CUDA graph is being captured: nothing may be read from the device then, so no beta is measured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def warn_frozen(name: str, how: str) -> None:
    """Warns that a captured or compiled step keeps the betas it was built with."""
    warn(
        f'{name}: beta="auto" is not measured again under {how}: the step keeps the betas of now, and a parameter that '
        f"has none yet does not move. Take {SETTLED} ordinary steps first, or give beta a number."
    )


def warn_floor(optimizer: Optimizer) -> None:
    """Warns once of a fixed beta whose floor lies far above the gradients, while the learning rate is one for Adam.

    Looks at the moments at step ``LOOKED_AT`` alone, of a sharded parameter at this process's part. A step count that
    lies on a GPU is not read.
    """
    for beta in {group["beta"] for group in optimizer.param_groups} - {"auto"}:
        groups = [group for group in optimizer.param_groups if group["beta"] == beta and not group["differentiable"]]
        first = next((p for group in groups for p in group["params"] if p.grad is not None), None)
        step = None if first is None or not has_values(first) else optimizer.state[first]["step"]
        if step is not None and step.is_cpu and step.item() == LOOKED_AT and not is_frozen():
            _look_at_floor(optimizer, beta, groups)


def _look_at_floor(optimizer: Optimizer, beta: float, groups: Sequence[dict[str, Any]]) -> None:
    name, floor = type(optimizer).__name__, LN2 / beta
    lr = max(float(group.get("initial_lr", group["lr"])) for group in groups)  # not the low one of a warm-up
    if not shards.is_first_process() or not 0 < lr < MOMENTUM_SGD or (name, beta) in _WARNED:
        return
    found = [(group["betas"][1], optimizer.state.get(p, {})) for group in groups for p in group["params"]]
    seen = [(beta2, state) for beta2, state in found if "step" in state]
    stride = sum(state["exp_avg_sq"].numel() for _, state in seen) // 1_000_000 | 1  # odd: not one column of a matrix
    roots = []
    for beta2, state in seen:
        v: Any = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        v = widen((v.to_local() if hasattr(v, "to_local") else v).detach()).flatten()[::stride]
        roots.append((v.sqrt() * (1 - beta2 ** float(state["step"])) ** -0.5).float().cpu())
    roots = [live for root in roots if len(live := root[(root > 0) & root.isfinite()])]
    root = torch.cat(roots) if roots else torch.full((1,), math.inf)
    if (median := root.median().item()) >= FAR_BELOW * floor:
        return
    _WARNED.add((name, beta))
    share = (root < floor).float().mean().item()
    auto = statistics.median(LN2 / (FLOOR * root.quantile(QUANTILE).item()) for root in roots)
    warn(
        f"{name}: beta={beta:g} leaves {100 * share:.3g} % of the coordinates on the floor of the denominator, "
        f"ln 2 / beta = {floor:.2g}: the median of sqrt(v) is {median:.2g}. The step is momentum SGD at "
        f"{1 / floor:.3g} x lr = {lr / floor:.2g}, not Adam at lr={lr:.3g}. For Adam's learning rates give "
        f'beta="auto", or a beta of about {auto:.1g}; for momentum SGD an lr of {MOMENTUM_SGD:g} '
        f'or more. "sadam calibrate" tells which lr goes with which beta.'
    )


_WARNED: set[tuple[str, float]] = set()
"""What has been warned of in this process, where there may be an optimizer for each parameter."""


def log_settled(optimizer: Optimizer) -> None:
    """Logs one line at the step at which an optimizer's betas settle."""
    states = (optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"])
    settled = sorted(
        state["beta"] for state in states if state.get("beta") and state["step"].is_cpu and state["step"] == SETTLED
    )
    if settled:
        logger.info(
            '%s: beta="auto" settled for %d parameters: median %.3g, from %.3g to %.3g',
            type(optimizer).__name__, len(settled), statistics.median(settled), settled[0], settled[-1],
        )  # fmt: skip


def chosen_betas(optimizer: Optimizer, model: Module | None = None) -> dict[str, float]:
    """The beta that each parameter of an optimizer is trained with now.

    Args:
        optimizer: One of this package's, also inside the wrappers of accelerate, Lightning, DeepSpeed and
            ZeroRedundancyOptimizer.
        model: Gives the parameters' names. Without it they are those the optimizer was built with
            (``Sadam(model.named_parameters())``), or else ``"group.index"``; the pieces of DeepSpeed's ZeRO-3, which
            are in no group, are ``"flat.index"``.

    Returns:
        From name to beta, in the optimizer's order. Under "auto", 0.0 means not measured yet: the parameter has not
        had a gradient.

    Raises:
        TypeError: If the optimizer has no softplus beta.
    """
    optimizer = moments.unwrap(optimizer)
    if "beta" not in getattr(optimizer, "defaults", {}):
        raise TypeError(f"{type(optimizer).__name__} has no softplus beta: only this package's optimizers have one")
    names = {} if model is None else moments.names(model)
    betas, groups = {}, optimizer.param_groups
    for i, group in enumerate(groups):
        for j, p in enumerate(group["params"]):
            betas[moments.label(names, groups, i, j)] = _beta(optimizer.state.get(p, {}), group)
    listed = {p for group in groups for p in group["params"]}
    if len({group["beta"] for group in groups}) == 1:  # under DeepSpeed ZeRO-3 no group lists the pieces with a state
        for k, piece in enumerate(moments.pieces(optimizer.state, listed)):
            betas[f"flat.{k}"] = _beta(optimizer.state[piece], groups[0])
    return betas


def _beta(state: Mapping[str, Any], group: Mapping[str, Any]) -> float:
    return state.get("beta", 0.0) if group["beta"] == "auto" else float(group["beta"])
