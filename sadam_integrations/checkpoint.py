"""What is taken over from a checkpoint, and what is not: everything is checked before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sadam_integrations.arguments import check, plain
from sadam_integrations.said import warn

IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
"""Keys of a group that say how a step is run: they keep the constructor's values."""

FOREIGN = ("eps", "amsgrad", "decoupled_weight_decay")
"""Keys of a group that torch's Adam and AdamW save and these optimizers do not have."""

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""Keys of a parameter's state without which its training starts afresh."""

MAXIMUM = "max_exp_avg_sq"
"""The key that AMSGrad has beside these."""


def adopt(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Turns a state dict of this package, of torch's Adam or of AdamW into one that fits an optimizer.

    What others keep in a state, in a group or beside them comes along as it was saved.

    Args:
        optimizer: One of this package's.
        state_dict: What was saved; it is not changed.

    Returns:
        A state dict for ``torch.optim.Optimizer.load_state_dict``.

    Raises:
        ValueError: If it is no optimizer's state dict, or a value in it is not valid.
        TypeError: If a value in it has the wrong type.
    """
    name = type(optimizer).__name__
    check_form(f"{name}.load_state_dict", state_dict)
    groups = []
    for i, saved in enumerate(state_dict["param_groups"]):
        mine = optimizer.param_groups[i] if i < len(optimizer.param_groups) else optimizer.defaults
        loaded = plain({key: value for key, value in saved.items() if key not in FOREIGN})
        loaded |= {key: mine[key] for key in optimizer.defaults if key in IMPLEMENTATION or key not in saved}
        check(f"{name}.load_state_dict", loaded)
        for key in ("beta", "bias_correction"):
            if loaded[key] != mine[key]:
                warn(
                    f"{name}: the checkpoint was made with {key}={loaded[key]!r} and training goes on with it, not "
                    f"with the {key}={mine[key]!r} asked for. To change it, set it in optimizer.param_groups "
                    f"after loading."
                )
        decoupled = saved.get("decoupled_weight_decay", optimizer._decoupled)
        if decoupled != optimizer._decoupled and loaded["weight_decay"]:
            form, other = ("decoupled", "coupled") if decoupled else ("coupled", "decoupled")
            warn(
                f"{name}: the checkpoint's weight_decay={loaded['weight_decay']} was {form} and is {other} from now on."
            )
        groups.append(loaded)

    known = {i for group in groups for i in group["params"]}
    state, missing = dict(state_dict["state"]), 0
    for i, saved in state_dict["state"].items():
        if i not in known:
            continue
        _check_state(f"{name}.load_state_dict, parameter {i}", saved)
        whole = all(key in saved for key in MOMENTS)
        missing += bool(saved) and not whole
        dropped = {*(() if whole else (*MOMENTS, "beta")), *(() if whole and optimizer._amsgrad else (MAXIMUM,))}
        numbers = {key: float(saved[key]) for key in ("step", "beta") if key in saved}  # torch casts tensors
        state[i] = {key: value for key, value in {**saved, **numbers}.items() if key not in dropped}
    if missing:
        warn(
            f"{name}: the checkpoint has no moments of Adam's kind ({', '.join(MOMENTS)}) for {missing} parameters: "
            f"theirs start from zero."
        )
    return {**state_dict, "state": state, "param_groups": groups}


def make_portable(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Changes a state dict, not the optimizer, to what others can take along: plain numbers, betas as tensors."""
    state_dict["param_groups"] = list(map(plain, state_dict["param_groups"]))
    for i, saved in state_dict["state"].items():
        if isinstance(saved, dict) and isinstance(beta := saved.get("beta"), float):
            state_dict["state"][i] = {**saved, "beta": torch.tensor(beta, dtype=torch.float64, device="cpu")}


def check_shapes(name: str, groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> None:
    """Raises if the moments of a parameter do not have its shape: those of another model, in most cases.

    Args:
        name: The optimizer's class.
        groups: Its parameter groups.
        state: The state that each of their parameters is about to get.

    Raises:
        ValueError: If one does not fit.
    """
    for i, p in enumerate(p for group in groups for p in group["params"]):
        for key, value in state.get(p, {}).items():
            if key not in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") or not isinstance(value, Tensor):
                continue
            if value.layout != torch.strided:
                raise ValueError(
                    f"{name}: {key} of parameter {i} is a tensor of layout {value.layout}, not a dense one"
                )
            if value.shape != p.shape:
                raise ValueError(
                    f"{name}: {key} of parameter {i} has the shape {tuple(value.shape)} and the parameter "
                    f"{tuple(p.shape)}: the checkpoint is of another model, or its parameters are in another order"
                )


def check_form(source: str, state_dict: Any) -> None:
    """Raises a ValueError if something is no optimizer's state dict."""
    if not (isinstance(state_dict, Mapping) and {"state", "param_groups"} <= set(state_dict)):
        held = ", ".join(map(str, list(state_dict)[:6])) if isinstance(state_dict, Mapping) else ""
        raise ValueError(
            f"{source}: a {type(state_dict).__name__} ({held or 'nothing in it that is known'}) is not an optimizer's "
            f"state dict, which has state and param_groups: it may be one part of what was saved"
        )
    groups, states = state_dict["param_groups"], state_dict["state"]
    if not isinstance(states, Mapping):
        raise ValueError(f"{source}: state is a {type(states).__name__}, not a dict: the checkpoint is damaged")
    if not isinstance(groups, (list, tuple)) or not all(
        isinstance(group, Mapping)
        and isinstance(group.get("params"), (list, tuple))
        and all(isinstance(i, (int, str)) for i in group["params"])
        for group in groups
    ):
        raise ValueError(f"{source}: param_groups is not a list of groups with params: the checkpoint is damaged")


def _check_state(source: str, state: Any) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"{source}: a {type(state).__name__} is not its state: the checkpoint is damaged")
    step, beta = _number(state.get("step", 0)), _number(state.get("beta", 0))
    if not isinstance(step, (int, float)) or not 0 <= step < 2**63:
        raise ValueError(f"{source}: step={step!r} is not a count of steps: the checkpoint is damaged")
    for key in {*MOMENTS, MAXIMUM} & set(state) - {"step"}:
        if not isinstance(state[key], Tensor):
            raise ValueError(
                f"{source}: {key} is a {type(state[key]).__name__}, not a tensor: the checkpoint is damaged"
            )
    if not isinstance(beta, (int, float)) or not 0 <= beta < math.inf:
        raise ValueError(f"{source}: beta={beta!r} is not a number of 0 or more: the checkpoint is damaged")


def _number(value: Any) -> Any:
    """A tensor of one element as a number; all else as it is."""
    one = isinstance(value, Tensor) and value.layout == torch.strided and value.numel() == 1
    return value.item() if one else value
