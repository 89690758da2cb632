"""Hugging Face: importing this makes the optimizers' names valid for ``TrainingArguments(optim=...)`` and ``--optim``.

>>> import sadam_integrations.huggingface
>>> from transformers import TrainingArguments
>>> args = TrainingArguments("out", optim="sadamw", optim_args="beta=50", weight_decay=0.01)

Each name stands for its class with the class's defaults; ``lr`` and ``betas`` come from ``learning_rate``,
``adam_beta1`` and ``adam_beta2``, the weight decay of each parameter from the Trainer's groups, and everything else
from ``optim_args``: a string such as ``"beta=50, foreach=false"``, or a mapping.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from sadam_integrations.factory import OPTIMIZERS
from sadam_integrations.huggingface._optim_args import optimizer_kwargs

try:
    from transformers import Trainer
    from transformers.training_args import OptimizerNames
    from transformers.utils import logging
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "sadam_integrations.huggingface needs transformers, which is not installed: "
        'pip install "sadam-integrations[transformers]"'
    ) from error

from sadam_integrations.huggingface.monitor import ALRCallback

__all__ = ["ALRCallback", "load_name"]

logger = logging.get_logger("transformers.sadam_integrations")  # the Trainer's log_level governs transformers' loggers


def load_name(value: str) -> OptimizerNames:
    """Finds the member of transformers' ``OptimizerNames`` with this value, in any process.

    A pickled member (``training_args.bin``, a worker process) is a call of this function, and importing it registers
    the names. So its place, ``sadam_integrations.huggingface.load_name``, is part of a file format and never moves.

    Args:
        value: A registered name, such as ``"sadamw"``.

    Returns:
        The member of ``OptimizerNames``.
    """
    return OptimizerNames(value)


def _add_member(value: str) -> None:
    """Makes ``value`` a real member of ``OptimizerNames``, which argparse's choices and ``__post_init__`` read."""
    names: Any = OptimizerNames
    if value in names._value2member_map_:
        return
    member = str.__new__(names, value)
    member._name_, member._value_ = value.upper(), value
    member.__objclass__, member._sort_order_ = names, len(names._member_names_)
    member.__reduce_ex__ = lambda protocol: (load_name, (value,))  # a process without the names would fail to load it
    type.__setattr__(names, member._name_, member)  # EnumType's own __setattr__ guards the members there are
    names._member_map_[member._name_] = member
    names._member_names_.append(member._name_)
    names._value2member_map_[value] = member
    if isinstance(hashable := names.__dict__.get("_hashable_values_"), list):  # Python >= 3.12: `value in names`
        hashable.append(value)


def _build(args: Any) -> tuple[type[Optimizer], dict[str, Any]]:
    """What the Trainer is to call for one of our names: the class and its keyword arguments."""
    name = str(getattr(args.optim, "value", args.optim))
    cls = OPTIMIZERS[name]
    kwargs = optimizer_kwargs(name, cls, args)
    _check_offload(cls.__name__, args)
    if args.adam_epsilon != getattr(type(args), "adam_epsilon", 1e-8):
        logger.warning(
            f"adam_epsilon={args.adam_epsilon} has no effect: {cls.__name__} has no epsilon, the floor of its "
            f'denominator is ln 2 / beta. To set it, leave adam_epsilon out and give optim_args="beta=..."'
        )
    shown = {**kwargs, "beta": kwargs.get("beta", "auto"), "weight_decay": args.weight_decay}
    line = f'optim="{name}" is {cls.__name__}({", ".join(f"{k}={v!r}" for k, v in shown.items())})'
    if not args.weight_decay:
        base = name.removesuffix("w")
        line += f". {base} and {base}w are the same until weight_decay is set; the Trainer's default is 0."
    logger.info(line)
    return cls, kwargs


def _deepspeed_config(args: Any) -> Any:
    """DeepSpeed's configuration, which comes from the ``deepspeed`` argument or from ``accelerate launch``, or None."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return getattr(args, "hf_deepspeed_config", None) or getattr(plugin, "hf_ds_config", None)


def _check_offload(cls_name: str, args: Any) -> None:
    """Raises if accelerate would put DeepSpeed's own Adam in the optimizer's place, which it does without a word."""
    config = _deepspeed_config(args)
    if config is None:
        return
    device = config.get_value("zero_optimization.offload_optimizer.device", "none")
    if device not in (None, "none") and config.get_value("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"the DeepSpeed configuration offloads the optimizer (zero_optimization.offload_optimizer.device="
            f"{device!r}), and accelerate would train with DeepSpeedCPUAdam instead of {cls_name}: add "
            f'"zero_force_ds_cpu_optimizer": false to the configuration, or remove offload_optimizer from it'
        )


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    """The Trainer's look-up with our names in front; every other name is answered by the original."""

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args, model=None):
        if args.optim in OPTIMIZERS:
            return _build(args)
        return original(args, model)

    get_optimizer_cls_and_kwargs._knows_sadam = True  # type: ignore[attr-defined]
    return get_optimizer_cls_and_kwargs


def _wrap_creation(original: Callable[..., Any]) -> Callable[..., Any]:
    """The Trainer's ``create_optimizer``, which it calls before training also where DeepSpeed builds the optimizer."""

    @functools.wraps(original)
    def create_optimizer(self, *args, **kwargs):
        config = _deepspeed_config(self.args)
        if self.args.optim in OPTIMIZERS and config is not None and (section := config.get_value("optimizer")):
            name = str(getattr(self.args.optim, "value", self.args.optim))
            raise ValueError(
                f'the DeepSpeed configuration has an "optimizer" section, and DeepSpeed would train with '
                f'{section.get("type")} instead of optim="{name}": remove the section from the configuration. What it '
                f"says of lr, betas and weight_decay is said by learning_rate, adam_beta1, adam_beta2 and weight_decay"
            )
        return original(self, *args, **kwargs)

    return create_optimizer


for _name in OPTIMIZERS:
    _add_member(_name)
if not hasattr(Trainer.get_optimizer_cls_and_kwargs, "_knows_sadam"):
    Trainer.get_optimizer_cls_and_kwargs = staticmethod(_wrap(Trainer.get_optimizer_cls_and_kwargs))  # type: ignore[method-assign]
    Trainer.create_optimizer = _wrap_creation(Trainer.create_optimizer)  # type: ignore[method-assign]
