"""What a parameter group may hold: every value is checked before anything is changed, and plain numbers are made."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from sadam_integrations.update import BIAS_CORRECTIONS

SMALLEST_BETA, LARGEST_BETA = 1e-30, 1e38
"""Between these ``1 / beta`` and ``beta`` are float32 numbers, with room for what they are multiplied by."""

NEGLIGIBLE = 1e-7
"""Less below zero than this is a rounding of 0, also of a float32 tensor: schedulers end at 0 and miss it by that."""

Init = TypeVar("Init", bound=Callable[..., None])


def check(source: str, group: Mapping[str, Any]) -> None:
    """Raises if a value of a parameter group is not one that the optimizers accept.

    Args:
        source: Who gave the values: the beginning of the message.
        group: A whole parameter group, its numbers :func:`plain`; keys that are not the optimizers' own are ignored.

    Raises:
        ValueError: If a value is out of its range.
        TypeError: If a value has the wrong type.
        RuntimeError: If ``fused`` is true together with ``foreach`` or ``differentiable``.
    """
    lr, betas, beta, weight_decay = group["lr"], group["betas"], group["beta"], group["weight_decay"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{source}: Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        value = _readable(lr)
        if value is not None and not -NEGLIGIBLE < value < math.inf:
            raise ValueError(f"{source}: Invalid learning rate: {value}: lr is at least 0 and finite")
        if group["foreach"] and not group["capturable"]:
            raise ValueError(
                f"{source}: lr as a Tensor is not supported for capturable=False and foreach=True: "
                f"set capturable=True, or leave foreach=None"
            )
    elif not _is_number(lr):
        raise TypeError(f"{source}: Invalid learning rate: {lr!r}: lr is a number or a 0-dim tensor")
    elif not -NEGLIGIBLE < lr < math.inf:
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
    if not -NEGLIGIBLE < weight_decay < math.inf:
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


def plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group whose numbers are Python's own, and whose ``betas``, any sequence of two, are a tuple.

    ``torch.load(weights_only=True)`` refuses other libraries' numbers. An ``lr`` that is a tensor stays what it is.
    """
    single = ["beta", "weight_decay", *(["lr"] if not isinstance(group.get("lr"), Tensor) else [])]
    found = {key: _plain(group[key]) for key in single if key in group}
    if "betas" in group and _is_sequence(group["betas"]):
        found["betas"] = tuple(map(_plain, group["betas"]))
    return {**group, **found}


def in_effect(group: Mapping[str, Any]) -> dict[str, Any]:
    """A checked group as a step computes with it: what is negative by rounding is 0."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        lr = max(lr, 0.0)
    elif (_readable(lr) or 0.0) < 0:
        lr = lr.clamp(min=0.0)
    return {**group, "lr": lr, "weight_decay": max(group["weight_decay"], 0.0)}


def explained(init: Init) -> Init:
    """Makes a constructor answer an unknown keyword with the nearest valid one, and a model with what to pass."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        for key in kwargs:
            if key not in signature.parameters:
                valid = [parameter for parameter in signature.parameters if parameter not in ("self", "params")]
                raise TypeError(f"{name} has no argument {key!r}{did_you_mean(key, valid)}")
        if isinstance(model := args[0] if args else kwargs.get("params"), nn.Module):
            raise TypeError(
                f"{name}: params is a {type(model).__name__}: pass model.parameters(), or param_groups(model) for "
                f"biases and norms without weight decay"
            )
        init(self, *args, **kwargs)

    constructor.__signature__ = signature  # type: ignore[attr-defined]
    return constructor  # type: ignore[return-value]


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """Ends a message about an unknown word: the nearest valid ones, if any is near, and the list of all."""
    hint, valid = "", list(valid)
    if word == "eps" and "beta" in valid:
        hint = " (there is no epsilon: the floor of the denominator is ln 2 / beta)"
    elif matches := difflib.get_close_matches(word.lower(), valid, n=2):
        hint = f" (did you mean {' or '.join(matches)}?)"
    return f"{hint}; the valid ones are {', '.join(valid)}"


def _plain(value: Any) -> Any:
    """A number of any library, or an array of one element, as Python's own; all else as it is."""
    if type(value) in (float, int, str):
        return value
    if _is_number(value):
        return float(value)
    return value.item() if hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1 else value


def _is_sequence(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("__len__", "__getitem__")) and not isinstance(value, (str, Mapping))


def _is_number(value: Any) -> bool:
    return type(value) is float or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def _readable(lr: Tensor) -> float | None:
    """The value of a tensor; None where reading it would wait for a device, or there is none to read."""
    return lr.item() if lr.is_cpu and type(lr) in (Tensor, nn.Parameter) else None
