"""The weight-decay groups of a model: biases and normalisation layers are not decayed, everything else is."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORM_TYPES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
_NORM_NAME = re.compile(r"Norm(\dd)?$")  # LlamaRMSNorm and T5LayerNorm, but not a model called Norms


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Splits a model's trainable parameters into a group with weight decay and one without.

    Not decayed are biases and the parameters of normalisation layers; embeddings are decayed, as in the Hugging Face
    Trainer. The layer that owns a parameter and the parameter's name decide, never its shape, so that the groups of a
    sharded, compiled or wrapped model are those of the model itself. The decayed group holds no ``weight_decay`` of
    its own: it takes the optimizer's. Any torch optimizer accepts the result.

    Args:
        model: The model to train. Frozen parameters (``requires_grad=False``) are left out; a parameter that several
            modules share appears once, where it comes first.

    Returns:
        The groups ``{"params": [...]}`` and ``{"params": [...], "weight_decay": 0.0}``, each in the order of
        ``model.named_parameters()``; a group without parameters is left out. They have no names, so that the groups of
        several models, one list behind the other, have none twice.

    Raises:
        TypeError: If model is not a ``torch.nn.Module``.
        ValueError: If no parameter of the model can be trained.

    Example::

        optimizer = SadamW(param_groups(model), lr=1e-3, weight_decay=0.01)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups: got {type(model).__name__}, but the layers decide which parameters are decayed: "
            f"give the model itself, a torch.nn.Module"
        )
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        is_norm = isinstance(module, _NORM_TYPES) or _NORM_NAME.search(type(module).__name__) is not None
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            if parameter.requires_grad:
                (no_decay if is_norm or "bias" in name else decay).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        reason = f"all {len(seen)} parameters are frozen (requires_grad=False)" if seen else "it has no parameters"
        raise ValueError(f"param_groups: nothing to train in {type(model).__name__}: {reason}")
    return groups
