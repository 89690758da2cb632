"""Finds the second moments that an optimizer of Adam's kind keeps: inside wrappers, by name, on every process."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, distributed
from torch.nn import Module

from sadam_integrations import shards
from sadam_integrations.update import BIAS_CORRECTIONS, BiasCorrection

OTHERS = ("partial", "final_lr")
"""Arguments of PAdam and AdaBound, whose denominators are made otherwise of the same second moment."""


class NoSecondMomentError(TypeError):
    """An optimizer that is not of Adam's kind."""


class Entry(NamedTuple):
    """A second moment, and what turns it into the denominator of the step."""

    place: tuple[int, int]
    """The parameter's group, and its index there."""
    name: str
    second: Tensor
    """``exp_avg_sq``, or its maximum where the step uses that."""
    step: Any
    """A number, a 0-dim tensor, or None if the optimizer does not count."""
    betas: Sequence[Any]
    form: BiasCorrection
    beta: float | None
    """Of the softplus; None: the denominator is ``sqrt(v) + eps``."""
    eps: float


def unwrap(optimizer: Any) -> Any:
    """The innermost optimizer, inside those of frameworks, engines and others that keep it as an attribute."""
    return _layers(optimizer)[-1]


def entries(optimizer: Any, model: Module | None) -> list[Entry]:
    """The second moments of an optimizer, as far as this process holds them.

    Left out are parameters without a state or without coordinates, and those whose beta is not measured yet.

    Args:
        optimizer: Wrapped or not. Where it is sharded, every process must call this.
        model: Gives the parameters' names.

    Raises:
        NoSecondMomentError: If the optimizer keeps no second moment.
    """
    inner = unwrap(optimizer)
    kept = ["exp_avg_sq" in state for state in inner.state.values() if isinstance(state, Mapping) and state]
    kept = [any(rank) for rank in gather(optimizer, kept) if rank]
    ours = any("betas" in group and len(group["betas"]) == 2 for group in inner.param_groups)
    other = [key for key in OTHERS if any(key in group for group in inner.param_groups)]
    if other:
        raise NoSecondMomentError(
            f"{type(inner).__name__} has an argument {other[0]!r}: the denominator of its step is not Adam's, and its "
            f"adaptive learning rate is not known here"
        )
    if not ours or (kept and not any(kept)):
        raise NoSecondMomentError(
            f"{type(inner).__name__} keeps no second moment (exp_avg_sq), so it has no adaptive learning rate: "
            f"measure an optimizer of Adam's kind"
        )
    return list(_entries(inner, _groups(optimizer), {} if model is None else names(model)))


def gather(optimizer: Any, mine: Any) -> list[Any]:
    """What every process has, by rank, if each holds another part of the optimizer's state; else only ``mine``.

    The parts of a DTensor do not count: its own ``full_tensor()`` puts them together.
    """
    sharder = next((layer for layer in _layers(optimizer) if _is_sharder(layer)), None)
    flat = any(shards.is_of_fsdp1(p) for group in _groups(optimizer) for p in group["params"])
    if not (sharder or flat) or not (distributed.is_available() and distributed.is_initialized()):
        return [mine]
    process_group = getattr(sharder, "process_group", None) or getattr(sharder, "dp_process_group", None)
    everyone: list[Any] = [None] * distributed.get_world_size(process_group)
    distributed.all_gather_object(everyone, mine, group=process_group)
    return everyone


def _layers(optimizer: Any) -> list[Any]:
    """An optimizer and, one after the other, those it wraps."""
    found = [optimizer]
    while (inner := next(_held(found[-1]), None)) is not None and not any(inner is layer for layer in found):
        found.append(inner)
    return found


def _held(wrapper: Any) -> Iterator[Any]:
    """The optimizers among the attributes of another, whatever these are called."""
    for value in getattr(wrapper, "__dict__", {}).values():
        if hasattr(value, "param_groups"):
            yield value


def _is_sharder(optimizer: Any) -> bool:
    """Whether it is torch's ZeroRedundancyOptimizer or one of DeepSpeed's ZeRO."""
    return any(cls.__name__ in ("ZeroRedundancyOptimizer", "ZeROOptimizer") for cls in type(optimizer).__mro__)


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """The groups with all parameters; ZeroRedundancyOptimizer leaves each process's own to the optimizer inside."""
    outer, inner = (_layers(optimizer) * 2)[-2:]
    return (outer if getattr(outer, "optim", None) is inner else inner).param_groups


def names(model: Module) -> dict[Tensor, str]:
    """From parameter to name, without what DDP, torch.compile, FSDP1 and checkpointing add to it."""
    while type(model).__name__ in ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine"):
        model = model.module  # type: ignore[assignment]
    return {p: _clean(name) for name, p in model.named_parameters()}


def label(known: Mapping[Tensor, str], groups: Sequence[Mapping[str, Any]], i: int, j: int) -> str:
    """What a parameter of a group is called: its known name, the one the group was built with, or ``"group.index"``."""
    group = groups[i]
    built = group.get("param_names", ())
    given = len(built) == len(group["params"])  # ZeRO puts one flat piece in the place of many parameters
    return known.get(group["params"][j]) or (_clean(built[j]) if given else f"{i}.{j}")


def _clean(name: str) -> str:
    return re.sub(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)


def _entries(inner: Any, groups: list[dict[str, Any]], known: dict[Tensor, str]) -> Iterator[Entry]:
    listed = set()
    for i, group in enumerate(groups):
        for j, p in enumerate(group["params"]):
            listed.add(p)
            yield from _entry((i, j), label(known, groups, i, j), inner.state.get(p), group)
    rules = [[group.get(key) for key in ("betas", "beta", "eps", "bias_correction", "step")] for group in groups]
    if all(rule == rules[0] for rule in rules):  # under DeepSpeed ZeRO-3 no group lists the pieces that have a state
        for k, piece in enumerate(pieces(inner.state, listed)):
            yield from _entry((len(groups), k), f"flat.{k}", inner.state[piece], groups[0])


def pieces(state: Mapping[Any, Any], listed: Collection[Tensor]) -> list[Tensor]:
    """The tensors that have a state and are in no group; other keys of a state are its users' own."""
    return [p for p in state if isinstance(p, Tensor) and p not in listed]


def _entry(place: tuple[int, int], name: str, state: dict[str, Any] | None, group: dict[str, Any]) -> Iterator[Entry]:
    if not isinstance(state, Mapping) or "exp_avg_sq" not in state or "betas" not in group:
        return
    second = state.get("max_exp_avg_sq")
    second = state["exp_avg_sq"] if second is None else second
    form, beta = group.get("bias_correction", True), group.get("beta")
    if form not in BIAS_CORRECTIONS:  # not one of this package's
        form, beta = "inner" if form else "none", None
    elif beta == "auto":
        beta = state.get("beta", 0.0)
    if second.numel() and beta != 0:
        step = state.get("step", group.get("step"))
        yield Entry(place, name, second, step, group["betas"], form, beta, float(group.get("eps") or 0.0))
