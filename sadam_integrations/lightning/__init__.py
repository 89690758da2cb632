"""Lightning: callbacks to train a module you do not own, and to see the learning rates (docs/lightning.md)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

from torch.optim import Optimizer

from sadam_integrations.lightning._base import _callbacks
from sadam_integrations.lightning.monitor import ALRMonitor
from sadam_integrations.optimizer import SadamW
from sadam_integrations.param_groups import param_groups

__all__ = ["ALRMonitor", "UseOptimizer"]


class UseOptimizer(*_callbacks()):  # type: ignore[misc]
    """Trains a module that is not yours with the given optimizer, on weight-decay groups.

    While ``fit`` runs it stands in for the module's own ``configure_optimizers``, and it builds the optimizer when that
    is called: after ``configure_model``, so that sharded models work. It works with ``lightning.pytorch`` and with
    ``pytorch_lightning``. The module's own method is still called, to see what is replaced: its learning-rate
    schedulers are dropped with a warning, because they belong to its own optimizer, and more than one optimizer is an
    error. To keep a scheduler, override ``configure_optimizers`` in a subclass.

    Args:
        optimizer: Builds the optimizer from the parameter groups: a class, or a function such as
            ``lambda groups: Sadam(groups, lr=2e-4)``. None is SadamW: the groups are for its weight decay.

    Raises:
        ValueError: If the module's own ``configure_optimizers`` returns more than one optimizer, or DeepSpeed's
            configuration has an optimizer of its own; raised by ``fit``.

    Example::

        Trainer(callbacks=[UseOptimizer()]).fit(module)
    """

    # None instead of SadamW: jsonargparse would hand the weight decay of a default class on to the class given
    def __init__(self, optimizer: Callable[[Iterable], Optimizer] | None = None) -> None:
        self.optimizer = optimizer or SadamW
        self._undo = contextlib.ExitStack()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Replaces the module's ``configure_optimizers`` for the time of ``fit``."""
        if stage != "fit":
            return
        config = getattr(trainer.strategy, "config", None)  # DeepSpeedStrategy has one
        if isinstance(config, Mapping) and "optimizer" in config:
            raise ValueError(
                f'UseOptimizer: the DeepSpeed configuration has an "optimizer" section, and DeepSpeed would train with '
                f"{config['optimizer'].get('type')} without calling configure_optimizers: remove the section"
            )
        own = pl_module.configure_optimizers
        name = "configure_optimizers"
        if name in vars(pl_module):  # LightningCLI puts one on the module itself
            self._undo.callback(setattr, pl_module, name, own)
        else:
            self._undo.callback(delattr, pl_module, name)

        def configure_optimizers(module: Any) -> Optimizer:
            _check(type(module).__name__, *_parts(own()))
            return self.optimizer(param_groups(module))

        pl_module.configure_optimizers = MethodType(configure_optimizers, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Gives the module its own ``configure_optimizers`` back."""
        self._undo.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Gives it back after an error or Ctrl-C, too: ``teardown`` is not called then."""
        self._undo.close()


def _check(module: str, optimizers: list[Any], schedulers: list[Any]) -> None:
    """Says what of a module's own ``configure_optimizers`` cannot be kept."""
    if len(optimizers) > 1:
        kinds = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise ValueError(
            f"UseOptimizer: {module}.configure_optimizers returns {len(optimizers)} optimizers ({kinds}), and "
            f"UseOptimizer gives all parameters to one: override configure_optimizers in a subclass instead"
        )
    if schedulers:
        kinds = ", ".join(type(scheduler).__name__ for scheduler in schedulers)
        warnings.warn(
            f"UseOptimizer: the learning-rate scheduler of {module}.configure_optimizers ({kinds}) is dropped, because "
            f"it belongs to the optimizer that is replaced: the learning rate stays constant. To have one, override "
            f"configure_optimizers in a subclass.",
            stacklevel=3,
        )


def _parts(configured: Any) -> tuple[list[Any], list[Any]]:
    """The optimizers and schedulers in what a ``configure_optimizers`` returned, in any of the forms it may have."""
    if configured is None:
        return [], []
    if isinstance(configured, dict):
        scheduler = configured.get("lr_scheduler")
        scheduler = scheduler.get("scheduler") if isinstance(scheduler, dict) else scheduler
        return [configured["optimizer"]], [] if scheduler is None else [scheduler]
    if not isinstance(configured, (list, tuple)):
        return [configured], []
    if len(configured) == 2 and isinstance(configured[0], list):
        schedulers = configured[1] if isinstance(configured[1], list) else [configured[1]]
        return configured[0], [s["scheduler"] if isinstance(s, dict) else s for s in schedulers]
    parts = [_parts(item) for item in configured]
    return [o for optimizers, _ in parts for o in optimizers], [s for _, schedulers in parts for s in schedulers]
