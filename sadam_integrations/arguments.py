"""What a parameter group may hold: every value is checked before anything is changed."""

from __future__ import annotations

import math
import numbers
from typing import Any

from torch import Tensor

from sadam_integrations.update import BIAS_CORRECTIONS

SMALLEST_BETA, LARGEST_BETA = 1e-30, 1e38
"""Between these ``1 / beta`` and ``beta`` are float32 numbers, with room for what they are multiplied by."""


def check(source: str, group: dict[str, Any]) -> None:
    """Raises if a value of a parameter group is not one that the optimizers accept.

    Args:
        source: Who gave the values: the beginning of the message.
        group: A whole parameter group; keys that are not the optimizers' own are ignored.

    Raises:
        ValueError: If a value is out of its range.
        TypeError: If a value has the wrong type.
        RuntimeError: If ``fused`` is true together with ``foreach`` or ``differentiable``.
    """
    lr, betas, beta, weight_decay = group["lr"], group["betas"], group["beta"], group["weight_decay"]
    if isinstance(lr, Tensor):
        if lr.dim():
            raise ValueError(f"{source}: Tensor lr must be 1-element and 0-dim, got shape {tuple(lr.shape)}")
        if lr.device.type == "cpu" and not 0 <= lr.item() < math.inf:  # elsewhere, reading it would wait for the device
            raise ValueError(f"{source}: Invalid learning rate: {lr.item()}: lr is at least 0 and finite")
        if group["foreach"] and not group["capturable"]:
            raise ValueError(
                f"{source}: lr as a Tensor is not supported for capturable=False and foreach=True: "
                f"set capturable=True, or leave foreach=None"
            )
    elif not _is_number(lr):
        raise TypeError(f"{source}: Invalid learning rate: {lr!r}: lr is a number or a 0-dim tensor")
    elif not 0 <= lr < math.inf:
        raise ValueError(f"{source}: Invalid learning rate: {lr}: lr is at least 0 and finite")

    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{source}: betas={betas!r} is not a pair of numbers such as (0.9, 0.999)")
    for i, rate in enumerate(betas):
        if not _is_number(rate):
            raise TypeError(f"{source}: Invalid beta parameter at index {i}: {rate!r}: betas are two plain numbers")
        if not 0 <= rate < 1:
            raise ValueError(f"{source}: Invalid beta parameter at index {i}: {rate}: each of betas is in [0, 1)")

    if isinstance(beta, (tuple, list)):
        raise TypeError(
            f"{source}: beta={beta!r} is a pair: did you mean betas={tuple(beta)!r}? beta is the sharpness of the "
            f'softplus, a positive number or "auto"'
        )
    if not (beta == "auto" if isinstance(beta, str) else _is_number(beta)):
        raise TypeError(f'{source}: Invalid beta: {beta!r}: beta is a positive number or "auto"')
    if beta != "auto" and not SMALLEST_BETA <= beta < LARGEST_BETA:
        raise ValueError(
            f'{source}: Invalid beta: {beta}: beta is at least {SMALLEST_BETA:g} and below {LARGEST_BETA:g}, or "auto"'
        )

    if not _is_number(weight_decay):
        raise TypeError(f"{source}: Invalid weight_decay value: {weight_decay!r}: weight_decay is a number")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"{source}: Invalid weight_decay value: {weight_decay}: weight_decay is at least 0 and finite")

    form = group["bias_correction"]
    if form not in BIAS_CORRECTIONS:
        raise ValueError(f"{source}: Invalid bias_correction: {form!r}: it is one of {', '.join(BIAS_CORRECTIONS)}")
    if beta == "auto" and form != "inner":
        raise ValueError(
            f'{source}: beta="auto" measures the corrected denominator and needs bias_correction="inner", '
            f"not {form!r}: give beta a number (the paper's is 50)"
        )
    for flag in ("maximize", "foreach", "fused", "capturable", "differentiable"):
        if not (group[flag] is None or isinstance(group[flag], bool)):
            raise TypeError(f"{source}: {flag}={group[flag]!r} is not True or False")
    if group["foreach"] and group["differentiable"]:
        raise ValueError(f"{source}: foreach=True cannot be differentiated through: leave foreach=None")
    if group["fused"] and group["foreach"]:
        raise RuntimeError(f"{source}: fused=True and foreach=True exclude each other: leave one of them None")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError(f"{source}: fused=True cannot be differentiated through: leave fused=None")


def plain(value: Any) -> Any:
    """Numbers of other libraries as Python's own, also in a pair: ``torch.load(weights_only=True)`` refuses NumPy's."""
    if isinstance(value, (tuple, list)):
        return type(value)(plain(item) for item in value)
    return float(value) if _is_number(value) and type(value) is not int else value


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
