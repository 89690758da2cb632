"""The optimizers by name: the one table that every integration reads, and the function that builds from it."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, ParamsT

from sadam_integrations.arguments import did_you_mean
from sadam_integrations.optimizer import Sadam, SadamW, SAMSGrad, SAMSGradW
from sadam_integrations.param_groups import param_groups

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sadam": Sadam,
    "samsgrad": SAMSGrad,
    "sadamw": SadamW,
    "samsgradw": SAMSGradW,
}
"""What each name stands for, wherever an optimizer is chosen by name."""

PEERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "sgd": (torch.optim.SGD, {}),
}
"""Torch's own, to compare with: the class and the arguments that make it as fast as it can be."""


def list_optimizers() -> list[str]:
    """Lists this package's names, which :func:`create_optimizer` and the integrations know."""
    return list(OPTIMIZERS)


def optimizer_class(name: str) -> tuple[type[Optimizer], dict[str, Any]]:
    """Finds the class that a name stands for.

    Args:
        name: One of :func:`list_optimizers`; ``adam``, ``adamw`` (both fused) or ``sgd`` for torch's; or the dotted
            path of any library's optimizer, such as ``torch.optim.RMSprop``.

    Returns:
        The class, and the arguments that the name implies.

    Raises:
        ValueError: If there is no such name, module or class, or the class is not a torch optimizer.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name], {}
    if name in PEERS:
        cls, implied = PEERS[name]
        return cls, dict(implied)
    module, _, attribute = name.rpartition(".")
    if not module:
        known = did_you_mean(name, [*OPTIMIZERS, *PEERS])
        raise ValueError(f"unknown optimizer {name!r}{known}, and dotted paths such as torch.optim.RMSprop")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"optimizer {name!r} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"optimizer {name!r} is not a subclass of torch.optim.Optimizer")
    return found, {}


def create_optimizer(name: str, model_or_params: nn.Module | ParamsT, **kwargs: Any) -> Optimizer:
    """Builds an optimizer by name, with weight-decay groups if it is given a model.

    =============  ===========  ===============================================  ============
    Name           Class        What it is                                       Weight decay
    =============  ===========  ===============================================  ============
    ``sadam``      `Sadam`      Adam with a softplus denominator                 L2, 0.0
    ``samsgrad``   `SAMSGrad`   the same with the largest second moment so far   L2, 0.0
    ``sadamw``     `SadamW`     Sadam as AdamW is to Adam                        decoupled, 0.01
    ``samsgradw``  `SAMSGradW`  SAMSGrad as AdamW is to Adam                     decoupled, 0.01
    =============  ===========  ===============================================  ============

    Args:
        name: One of the above, or another that :func:`optimizer_class` finds.
        model_or_params: A model, which is split by :func:`sadam_integrations.param_groups.param_groups` so that
            biases and normalisation layers are not decayed; or parameters, named parameters or parameter groups,
            which are taken as they are.
        **kwargs: Arguments of the class, such as ``lr``, ``weight_decay`` and ``beta``.

    Returns:
        The optimizer.

    Raises:
        ValueError: If the name is unknown, or a value is out of its range.
        TypeError: If the class has no argument of that name, or a value has the wrong type.

    Example::

        optimizer = create_optimizer("sadamw", model, lr=1e-3, weight_decay=0.01)
    """
    if not isinstance(name, str):
        raise TypeError(f"create_optimizer: the name comes first and is a string, not {type(name).__name__}")
    try:
        cls, implied = optimizer_class(name)
    except ValueError as error:
        raise ValueError(f"create_optimizer: {error}") from None
    valid = keywords(cls)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in valid.values())
    for key in kwargs:
        if key not in valid and not takes_any:
            raise TypeError(f"create_optimizer: {cls.__name__} has no argument {key!r}{did_you_mean(key, valid)}")
    params = param_groups(model_or_params) if isinstance(model_or_params, nn.Module) else model_or_params
    return cls(params, **{**implied, **kwargs})


def trial_groups() -> list[dict[str, Any]]:
    """Returns a bias and a weight in a group each, to see whether an optimizer can be built for a model."""
    return [{"params": [torch.zeros(*shape, requires_grad=True)]} for shape in ((1,), (1, 1))]


def keywords(cls: type[Optimizer]) -> dict[str, inspect.Parameter]:
    """Returns the arguments of an optimizer class after ``params``, by name and in order."""
    return {key: value for key, value in inspect.signature(cls).parameters.items() if key != "params"}
