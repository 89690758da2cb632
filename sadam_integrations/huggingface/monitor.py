"""The adaptive learning rates of a run of the Trainer, in its logs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.trainer_callback import CallbackHandler, TrainerCallback

from sadam_integrations.monitor import Monitor


class ALRCallback(TrainerCallback):
    """Logs the adaptive learning rates (1 / denominator of the step) of the optimizer that the Trainer uses.

    The numbers go wherever the training loss goes: TensorBoard, W&B and the other targets of ``report_to``,
    ``trainer_state.json``, the console; as ``alr/median``, ``alr/q99_over_q01``, ``alr/floor_share`` and so on. They
    are those after the step that they are logged at. Any optimizer with Adam's second moment is measured; with
    another one there is a warning, and the training goes on.

    Args:
        layers: Whether to log the median, the spread and the floor share of each parameter, too.
        every_n_steps: How often to measure: a multiple of ``logging_steps``. None is each time the loss is logged.
        folder: Where to keep ``alr.jsonl``, from which the figures of a run are drawn. None: it is not kept.

    Raises:
        ValueError: If ``every_n_steps`` is not a positive integer, or, when the training begins, not a multiple of
            ``logging_steps``.

    Example::

        Trainer(model, args, train_dataset=data, callbacks=[ALRCallback()]).train()
    """

    def __init__(
        self, layers: bool = False, every_n_steps: int | None = None, folder: str | Path | None = None
    ) -> None:
        self._monitor = Monitor("ALRCallback", layers, every_n_steps, folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks the interval; in a resumed run, drops what the record has of later steps."""
        every = self._monitor.every_n_steps
        if every is not None and args.logging_strategy != "steps":
            raise ValueError(
                f"ALRCallback: every_n_steps={every} needs logging_strategy='steps', and this is "
                f"logging_strategy={args.logging_strategy.value!r}: change it, or leave every_n_steps out"
            )
        self._monitor.start(state.global_step, state.is_world_process_zero, state.logging_steps, "logging_steps")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds the measurement to what is logged, and to the log in the Trainer's state, which is a copy."""
        if "loss" not in logs or state.global_step % (self._monitor.every_n_steps or 1):
            return  # the Trainer logs evaluations and the summary, too
        metrics = self._monitor.measure(
            [kwargs["optimizer"]], kwargs["model"], state.global_step, state.is_world_process_zero
        )
        logs.update(metrics)
        state.log_history[-1].update(metrics)


def _wrap(add_callback: Callable[..., None]) -> Callable[..., None]:
    """Puts an ALRCallback in front of the others: what it adds to the logs reaches those that come after it."""

    @functools.wraps(add_callback)
    def add_and_sort(self, callback):
        add_callback(self, callback)
        self.callbacks.sort(key=lambda added: not isinstance(added, ALRCallback))

    add_and_sort._knows_alr = True  # type: ignore[attr-defined]
    return add_and_sort


if not hasattr(CallbackHandler.add_callback, "_knows_alr"):
    CallbackHandler.add_callback = _wrap(CallbackHandler.add_callback)  # type: ignore[method-assign]
