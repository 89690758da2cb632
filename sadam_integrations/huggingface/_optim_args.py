"""From TrainingArguments to an optimizer's keyword arguments: ``optim_args``, typed by the class's signature."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from torch.optim import Optimizer

from sadam_integrations.arguments import check

FLAGS = {
    "lr": "learning_rate sets it",
    "betas": "adam_beta1 and adam_beta2 set them",
    "weight_decay": "weight_decay of the TrainingArguments sets it, for the parameters that the Trainer decays",
    "eps": "there is no epsilon in these optimizers, the floor of the denominator is ln 2 / beta",
    "params": "the Trainer passes the model's",
}
"""What ``optim_args`` may not hold, and what sets it instead."""


def optimizer_kwargs(name: str, cls: type[Optimizer], args: Any) -> dict[str, Any]:
    """The keyword arguments for an optimizer, checked, from the Trainer's arguments.

    Args:
        name: The optimizer's name, for messages.
        cls: Its class.
        args: TrainingArguments; ``optim_args`` is read as the user gave it.

    Returns:
        ``lr``, ``betas`` and what ``optim_args`` holds; no ``weight_decay``, which comes from the Trainer's groups.

    Raises:
        ValueError: If ``optim_args`` has an unknown key or a value that the class does not take.
    """
    source = f'optim="{name}", optim_args={args.optim_args!r}'
    parameters = inspect.signature(cls).parameters
    kwargs = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    hints = {k: v for k, v in typing.get_type_hints(cls.__init__).items() if k in parameters and k not in FLAGS}
    for key, value in _pairs(args.optim_args, source, hints):
        if key in FLAGS:
            raise ValueError(f"{source}: {key} does not belong in optim_args: {FLAGS[key]}. {_valid(hints)}")
        if key not in hints:
            near = difflib.get_close_matches(key, [*hints, *FLAGS], n=1)
            meant = f", did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{source}: {cls.__name__} has no argument {key!r}{meant} {_valid(hints)}")
        if key in kwargs:
            raise ValueError(f"{source}: {key} is given twice")
        kwargs[key] = _convert(key, value, hints[key], source)

    defaults = {k: p.default for k, p in parameters.items() if k != "params"}
    try:
        check(source, {**defaults, **kwargs, "weight_decay": args.weight_decay})
    except (TypeError, RuntimeError) as error:  # what TrainingArguments hold is a value to the user, whatever is wrong
        raise ValueError(str(error)) from error
    return kwargs


def _pairs(optim_args: Any, source: str, hints: dict[str, Any]) -> list[tuple[str, Any]]:
    """Splits ``"key=value, key=value"``; a mapping, which JSON and YAML files can hold, is taken as it is."""
    if optim_args is None:
        return []
    if isinstance(optim_args, Mapping):
        return [(str(key).strip(), value) for key, value in optim_args.items()]
    if not isinstance(optim_args, str):
        raise ValueError(f"{source}: this is not a string such as 'beta=50, foreach=false', nor a mapping")
    pairs = []
    for item in filter(None, (item.strip() for item in optim_args.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            hint = " betas is set by adam_beta1 and adam_beta2." if "betas" in optim_args else ""
            raise ValueError(f"{source}: {item!r} is not of the form key=value.{hint} {_valid(hints)}")
        pairs.append((key, value))
    return pairs


def _convert(key: str, value: Any, hint: Any, source: str) -> Any:
    """One value, read as the type that the signature gives for it."""
    words, number = _options(hint)
    text = str(value).strip()
    if text.lower() in words:
        return words[text.lower()]
    if number:
        try:
            return float(text)
        except ValueError:
            pass
    text = text if text.isprintable() else repr(text)
    raise ValueError(f"{source}: {key}={text} is not valid: {key} is {_describe(hint)}.")


def _options(hint: Any) -> tuple[dict[str, Any], bool]:
    """The words that a type accepts, with their values, and whether it takes a number."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_options(part) for part in typing.get_args(hint)]
        return {k: v for words, _ in parts for k, v in words.items()}, any(number for _, number in parts)
    if typing.get_origin(hint) is Literal:
        return {str(word).lower(): word for word in typing.get_args(hint)}, False
    if hint is bool:
        return {"true": True, "false": False}, False
    if hint is type(None):
        return {"none": None}, False
    return {}, hint is float


def _describe(hint: Any) -> str:
    words, number = _options(hint)
    return " or ".join(["a number"] * number + list(words))


def _valid(hints: dict[str, Any]) -> str:
    return "Valid in optim_args: " + "; ".join(f"{key}={_describe(hint)}" for key, hint in hints.items()) + "."
