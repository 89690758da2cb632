"""What the monitors of the Trainer and of Lightning share: checking, measuring once for all uses, the run's record."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

from sadam_integrations.alr import Record, Sample, named, sample
from sadam_integrations.moments import NoSecondMomentError


class Monitor:
    """Measures the adaptive learning rates of a run's optimizers.

    Args:
        name: The callback's, for messages.
        layers: Whether each parameter has metrics of its own, too.
        every_n_steps: How often to measure, or None for each logging step.
        folder: Where to keep the record of the run, or None.

    Raises:
        ValueError: If ``every_n_steps`` is not a positive integer.
    """

    def __init__(self, name: str, layers: bool, every_n_steps: int | None, folder: str | os.PathLike | None) -> None:
        if every_n_steps is not None and (type(every_n_steps) is not int or every_n_steps < 1):
            raise ValueError(f"{name}: every_n_steps={every_n_steps!r} is not a positive whole number, nor None")
        self.name, self.layers, self.every_n_steps = name, layers, every_n_steps
        self.record = None if folder is None else Record(folder)
        self._unmeasurable: set[int] = set()
        self._unwritable = False

    def start(self, step: int, main: bool, logging_steps: int, source: str) -> None:
        """Checks the interval and has the record forget what comes after the step that is begun with.

        Args:
            step: The optimizer's steps so far: not 0 in a run that is resumed.
            main: Whether this is the process that writes.
            logging_steps: The framework's own interval.
            source: What sets it, for the message.

        Raises:
            ValueError: If ``every_n_steps`` is not a multiple of ``logging_steps``.
        """
        if self.every_n_steps is not None and self.every_n_steps % logging_steps:
            raise ValueError(
                f"{self.name}: every_n_steps={self.every_n_steps} is not a multiple of {source}={logging_steps}: "
                f"give a multiple, or leave every_n_steps out to measure at each logging step"
            )
        self._unmeasurable.clear()
        if main and self.record is not None:
            self.record.rewind(step)

    def measure(self, optimizers: Sequence[Any], model: Any, step: int, main: bool) -> dict[str, float]:
        """Measures; every process has to call it, because those of a sharded model exchange their samples.

        Args:
            optimizers: The optimizers, wrapped or not. With more than one, the metrics' ``alr`` becomes ``alr_0``,
                ``alr_1``, ….
            model: Gives the parameters' names.
            step: The optimizer's steps so far.
            main: Whether this is the process that writes.

        Returns:
            The metrics by name.
        """
        metrics: dict[str, float] = {}
        everything: list[Sample] = []
        for i, optimizer in enumerate(optimizers):
            samples = self._sample(i, optimizer, model, main)
            everything += samples
            metrics |= named(samples, self.layers, "alr" if len(optimizers) == 1 else f"alr_{i}")
        if main and self.record is not None and everything and not self._unwritable:
            try:
                self.record.add(step, everything)
            except OSError as error:  # no reason to lose a training
                self._unwritable = True
                warnings.warn(f"{self.name} writes no more of its record: {error}", stacklevel=3)
        return metrics

    def _sample(self, i: int, optimizer: Any, model: Any, main: bool) -> list[Sample]:
        """The samples of an optimizer; one that keeps no second moment has none, and a warning the first time."""
        if i in self._unmeasurable:
            return []
        try:
            return sample(optimizer, model)
        except NoSecondMomentError as error:
            self._unmeasurable.add(i)
            if main:
                warnings.warn(f"{self.name} logs nothing of this optimizer: {error}", stacklevel=4)
            return []
