"""The adaptive learning rates of a run of Lightning's Trainer, in its loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sadam_integrations.lightning._base import _callbacks
from sadam_integrations.monitor import Monitor


class ALRMonitor(*_callbacks()):  # type: ignore[misc]
    """Logs the adaptive learning rates (1 / denominator of the step) of the optimizers that are trained with.

    The numbers go to the Trainer's loggers (TensorBoard, CSV, W&B, …) as ``alr/median``, ``alr/q99_over_q01``,
    ``alr/floor_share`` and so on; of several optimizers as ``alr_0/median``, ``alr_1/median``, …. They are those after
    the step that they are logged at: at step 50, after fifty steps (``trainer.global_step``). Any optimizer with Adam's
    second moment is measured; with another one there is a warning, and the training goes on.

    Args:
        layers: Whether to log the median, the spread and the floor share of each parameter, too.
        every_n_steps: How often to measure: a multiple of the Trainer's ``log_every_n_steps``. None is as often as
            that.
        folder: Where to keep ``alr.jsonl``, from which the figures of a run are drawn. None: it is not kept.

    Raises:
        ValueError: If ``every_n_steps`` is not a positive integer, or, when the training begins, not a multiple of
            ``log_every_n_steps``.

    Example::

        Trainer(callbacks=[ALRMonitor()]).fit(module)
    """

    def __init__(
        self, layers: bool = False, every_n_steps: int | None = None, folder: str | Path | None = None
    ) -> None:
        self._monitor = Monitor("ALRMonitor", layers, every_n_steps, folder)
        self._step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks the interval; in a resumed run, drops what the record has of later steps."""
        own = trainer.log_every_n_steps or 1  # 0: Lightning logs nothing
        self._step = trainer.global_step
        self._monitor.start(self._step, trainer.is_global_zero, own, "log_every_n_steps")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measures and logs, if the steps taken reached a multiple of the interval."""
        n = trainer.log_every_n_steps and (self._monitor.every_n_steps or trainer.log_every_n_steps)
        before, self._step = self._step, trainer.global_step  # which moves not at all under accumulation, or by several
        if not n or before // n == self._step // n or not (trainer.loggers or self._monitor.record):
            return
        metrics = self._monitor.measure(trainer.optimizers, pl_module, self._step, trainer.is_global_zero)
        for logger in (
            trainer.loggers if metrics else ()
        ):  # not pl_module.log: it counts from 0, and logs only at Lightning's own steps
            logger.log_metrics(metrics, step=self._step)
