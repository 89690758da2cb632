"""What is taken over from a checkpoint, and what is not: everything is checked before anything is changed."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor

from sadam_integrations.arguments import check

IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
"""Keys of a group that say how a step is run: they keep the constructor's values."""

FOREIGN = ("eps", "amsgrad", "decoupled_weight_decay")
"""Keys of a group that torch's Adam and AdamW save and these optimizers do not have."""

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""Keys of a parameter's state without which its training starts afresh."""


def adopt(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Turns a state dict of this package, of torch's Adam or of AdamW into one that fits an optimizer.

    Args:
        optimizer: One of this package's.
        state_dict: What was saved; it is not changed.

    Returns:
        A state dict for ``torch.optim.Optimizer.load_state_dict``.

    Raises:
        ValueError: If a value in it is not valid.
    """
    name = type(optimizer).__name__
    groups = []
    for i, saved in enumerate(state_dict["param_groups"]):
        mine = optimizer.param_groups[i] if i < len(optimizer.param_groups) else optimizer.defaults
        loaded = {key: value for key, value in saved.items() if key not in FOREIGN}
        loaded |= {key: mine[key] for key in optimizer.defaults if key in IMPLEMENTATION or key not in saved}
        check(f"{name}.load_state_dict", loaded)
        for key in ("beta", "bias_correction"):
            if loaded[key] != mine[key]:
                _warn(
                    f"{name}: the checkpoint was made with {key}={loaded[key]!r} and training goes on with it, not "
                    f"with the {key}={mine[key]!r} asked for. To change it, set it in optimizer.param_groups "
                    f"after loading."
                )
        decoupled = saved.get("decoupled_weight_decay", optimizer._decoupled)
        if decoupled != optimizer._decoupled and loaded["weight_decay"]:
            form, other = ("decoupled", "coupled") if decoupled else ("coupled", "decoupled")
            _warn(
                f"{name}: the checkpoint's weight_decay={loaded['weight_decay']} was {form} and is {other} from now on."
            )
        groups.append(loaded)

    keys = (*MOMENTS, "beta", *(["max_exp_avg_sq"] if optimizer._amsgrad else []))
    state = {}
    for i, saved in state_dict["state"].items():
        if all(key in saved for key in MOMENTS):
            state[i] = {key: saved[key] for key in keys if key in saved}
            _check_state(f"{name}.load_state_dict, parameter {i}", state[i])
    if missing := len(state_dict["state"]) - len(state):
        _warn(
            f"{name}: the checkpoint has no moments of Adam's kind ({', '.join(MOMENTS)}) for {missing} parameters: "
            f"theirs start from zero."
        )
    return {**state_dict, "state": state, "param_groups": groups}


def _check_state(source: str, state: dict[str, Any]) -> None:
    step = state["step"].item() if isinstance(state["step"], Tensor) else state["step"]
    if not isinstance(step, (int, float)) or not 0 <= step < math.inf:
        raise ValueError(f"{source}: step={step!r} is not a count of steps: the checkpoint is damaged")
    for key in set(state) - {"step", "beta"}:
        if not isinstance(state[key], Tensor):
            raise ValueError(
                f"{source}: {key} is a {type(state[key]).__name__}, not a tensor: the checkpoint is damaged"
            )
    beta = state.get("beta", 0.0)
    if not isinstance(beta, (int, float)) or not 0 <= beta < math.inf:
        raise ValueError(f"{source}: beta={beta!r} is not a number of 0 or more: the checkpoint is damaged")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)  # the caller of load_state_dict
