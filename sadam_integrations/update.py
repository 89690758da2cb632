"""The specification: one Sadam or SAMSGrad update of one tensor, as pure functions in plain torch.

Every backend is tested against this file, and this file against an independent transcription of the published formulas
(Tong, Liang, Bi, "Calibrating the Adaptive Learning Rate to Improve Convergence of ADAM", arXiv 1908.00700).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BiasCorrection = Literal["inner", "outer", "none"]
BIAS_CORRECTIONS: tuple[BiasCorrection, ...] = ("inner", "outer", "none")
LN2 = math.log(2.0)
HALF = (torch.float16, torch.bfloat16)


class Moments(NamedTuple):
    """The tensors an update returns, each with the shape and dtype of its input."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None


def softplus(x: Tensor, beta: float) -> Tensor:
    r"""Sadam's denominator, :math:`\log(1 + e^{\beta x}) / \beta`, for :math:`x \ge 0`.

    Written as :math:`x + \log(1 + e^{-\beta x}) / \beta`, which cannot overflow. Unlike
    :func:`torch.nn.functional.softplus` it has no switch to the identity at ``beta * x > 20``; the two differ by less
    than ``2.1e-9 / beta``.

    Args:
        x: Any shape, not negative: the square root of the second moment.
        beta: Sharpness, positive. The result is never below the floor ``ln 2 / beta``. Zero is the limit of an
            infinite floor: the result is infinite, so a parameter divided by it does not move.
    """
    if beta == 0:
        return torch.full_like(x, math.inf)
    return x + torch.log1p(torch.exp(x * -beta)) / beta


def widen(t: Tensor) -> Tensor:
    """What the arithmetic works on: half precision as float32, complex numbers as pairs of real ones."""
    t = torch.view_as_real(t) if torch.is_complex(t) else t
    return t.float() if t.dtype in HALF else t


def gradient(param: Tensor, grad: Tensor, *, weight_decay: float, decoupled: bool, maximize: bool) -> Tensor:
    """The gradient that enters the moments: negated when maximising, with coupled weight decay added as in Adam."""
    if maximize:
        grad = -grad
    if weight_decay and not decoupled:
        grad = grad + weight_decay * param
    return grad


def second_moment(exp_avg_sq: Tensor, grad: Tensor, beta2: float) -> Tensor:
    """The running mean of the squared gradient after this step."""
    return exp_avg_sq * beta2 + ((1 - beta2) * grad) * grad


def corrections(
    step: float | Tensor, beta1: float, beta2: float, bias_correction: BiasCorrection
) -> tuple[float | Tensor, float | Tensor]:
    """What the bias corrections multiply: the learning rate, and the square root of the second moment.

    With ``c1 = 1 - beta1**step`` and ``c2 = 1 - beta2**step``: ``"inner"`` (Adam's own place) gives
    ``(1 / c1, 1 / sqrt(c2))``, ``"outer"`` (the official code) ``(sqrt(c2) / c1, 1)``, ``"none"`` (the paper's
    pseudo-code) ``(1, 1)``.
    """
    if bias_correction == "none":
        return 1.0, 1.0
    if isinstance(step, Tensor) and step.device.type not in ("mps", "xpu"):
        step = step.double()  # in float32, 1 - beta2**step is wrong by 6e-5 at the first step
    c1, root_c2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    return (root_c2 / c1, 1.0) if bias_correction == "outer" else (1 / c1, 1 / root_c2)


def update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    step: float | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    beta: float,
    weight_decay: float,
    decoupled: bool,
    bias_correction: BiasCorrection,
    maximize: bool,
    gain: float = 1.0,
) -> Moments:
    """One step of Sadam, or of SAMSGrad when ``max_exp_avg_sq`` is given, without changing its inputs.

    Half-precision tensors are computed in float32 and rounded once, at the end. Complex tensors are updated as pairs of
    real numbers. Of float32 tensors, a backend may take what is smaller than 1.2e-38 (subnormal) for zero.

    Args:
        param: The parameter, any shape and any floating or complex dtype.
        grad: Its gradient, same shape.
        exp_avg: First moment, same shape.
        exp_avg_sq: Second moment, same shape.
        max_exp_avg_sq: Largest second moment so far, same shape; ``None`` for Sadam. The maximum is of the raw second
            moment and is corrected afterwards, as in torch's AMSGrad and in the official code.
        step: How many steps this parameter has taken, this one included (a number, or a 0-dim tensor).
        lr: Learning rate.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        beta: Sharpness of the softplus; see :func:`softplus`.
        weight_decay: Weight decay coefficient.
        decoupled: Shrink the parameter by ``1 - lr * weight_decay`` (AdamW) instead of adding to the gradient (Adam).
        bias_correction: See :func:`corrections`.
        maximize: Ascend instead of descend.
        gain: Factor on the step, but not on decoupled weight decay; beta="auto" has one, a fixed beta has not.
    """
    p, g, m, v = widen(param), widen(grad), widen(exp_avg), widen(exp_avg_sq)
    g = gradient(p, g, weight_decay=weight_decay, decoupled=decoupled, maximize=maximize)
    m = m.lerp(g, 1 - beta1)
    v = second_moment(v, g, beta2)
    v_max = None if max_exp_avg_sq is None else torch.maximum(widen(max_exp_avg_sq), v)

    for_lr, for_root = corrections(step, beta1, beta2, bias_correction)
    denominator = softplus((v if v_max is None else v_max).sqrt() * for_root, beta)
    if decoupled:
        p = p * (1 - lr * weight_decay)
    p = p - (gain * lr * for_lr) * (m / denominator)
    return Moments(
        _leave(p, param),
        _leave(m, exp_avg),
        _leave(v, exp_avg_sq),
        None if v_max is None else _leave(v_max, exp_avg_sq),
    )


def _leave(new: Tensor, old: Tensor) -> Tensor:
    return torch.view_as_complex(new) if torch.is_complex(old) else new.to(old.dtype)
