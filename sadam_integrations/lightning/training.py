"""What the recipes add to Lightning: quiet, one progress bar, exact resuming, averaged weights, whole predictions."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar

from sadam_integrations.recipe import RecipeError, layer_scales

logger = logging.getLogger(__name__)

POINTS = 5
"""Training losses that are kept of an epoch."""


def trainer_arguments(bf16: bool) -> dict[str, Any]:
    """Returns what the Trainer has to know of the machine: one device, or those of torchrun."""
    processes, here = (int(os.environ.get(key, "1")) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return {
        "accelerator": "auto" if torch.accelerator.is_available() else "cpu",
        "devices": here,
        "num_nodes": processes // here,
        "strategy": "ddp" if processes > 1 else "auto",
        "precision": "bf16-mixed" if bf16 else "32-true",
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_model_summary": False,
    }


def quiet() -> None:
    """Keeps Lightning's messages and advice off the screen; they still reach other handlers, such as files."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:
                handler.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|pytorch_lightning")


def interruptible(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a method of a Trainer; Ctrl-C stays a KeyboardInterrupt, which Lightning turns into an exit."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        return method(*args, **kwargs)
    except SystemExit:
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def rounded(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns metrics as numbers without the digits that Lightning's float32 adds."""
    return {key: round(float(value), 6) for key, value in metrics.items()}


class Seeded(Callback):
    """Ties dropout to seed, epoch and process: a resumed run draws what the whole one would have drawn.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seeds torch's generators."""
        entropy = (self.seed, trainer.current_epoch, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


class History(Callback):
    """Collects the training losses and the validation results, and keeps them in the checkpoints.

    It reads the metrics ``loss`` and ``validation_…`` that the module logs. ``points`` is what
    :func:`sadam_integrations.plots.training_figure` draws.
    """

    def __init__(self) -> None:
        self.points: dict[str, list[dict[str, float]]] = {"train": [], "validation": []}
        self._losses: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the mean loss a few times an epoch; between that nothing waits for the device."""
        self._losses.append(trainer.callback_metrics["loss"])
        batches = int(trainer.num_training_batches)
        if (batch_idx + 1) * POINTS // batches > batch_idx * POINTS // batches:
            loss = trainer.strategy.reduce(torch.stack(self._losses).mean(), reduce_op="mean")
            self._losses.clear()
            self._add("train", {"step": trainer.global_step, **rounded({"loss": loss})})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the results."""
        values = {key: trainer.callback_metrics[f"validation_{key}"] for key in ("accuracy", "f1", "loss")}
        self._add("validation", {"step": trainer.global_step, **rounded(values)})

    def _add(self, split: str, point: dict[str, float]) -> None:
        self.points[split].append(point)
        logger.info("%s: %s", split, point)

    def state_dict(self) -> dict[str, Any]:
        """Returns the points, for the checkpoint."""
        return self.points

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the points of a checkpoint."""
        self.points = {split: list(points) for split, points in state_dict.items()}


class Progress(ProgressBar):
    """One bar over all steps of the training, with the loss and the validation accuracy at its end.

    Args:
        history: Where it finds them.
    """

    def __init__(self, history: History) -> None:
        super().__init__()
        self.history = history
        self.bar: Any = None

    def disable(self) -> None:
        """Lightning calls this on the processes that show nothing."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the bar, at the step that is resumed from."""
        from tqdm.auto import tqdm

        if trainer.is_global_zero:
            self.bar = tqdm(
                total=int(trainer.estimated_stepping_batches), initial=trainer.global_step, dynamic_ncols=True
            )
            self._show()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Moves the bar on."""
        if self.bar is not None:
            self.bar.update(trainer.global_step - self.bar.n)
            self._show(refresh=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the new accuracy."""
        self._show()

    def _show(self, refresh: bool = True) -> None:
        if self.bar is not None:
            shown = (("train", "loss", "loss"), ("validation", "accuracy", "validation"))
            numbers = {n: f"{self.history.points[s][-1][key]:.3f}" for s, key, n in shown if self.history.points[s]}
            self.bar.set_postfix(numbers, refresh=refresh)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the bar."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class EpochCheckpoint(Checkpoint):
    """Saves at the end of each epoch, in one go: whoever looks finds the last whole checkpoint or none.

    Lightning's own saving moves the file there from the folder for temporary files, which copies it where that is
    another file system: a run killed during the copy would leave half a checkpoint.

    Args:
        folder: Where to save.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "last.ckpt"

    def last(self) -> Path | None:
        """Returns the checkpoint to resume from, or None; an error if the file is not whole, or holds code.

        It is read here without running any code. Lightning, which reads it again, would run it.
        """
        if not self.path.is_file():
            return None
        try:
            torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has no error of its own: pickle's, RuntimeError, EOFError and more
            what = "holds code, which is not run" if "GLOBAL" in str(error) else "is damaged"
            raise RecipeError(
                f"{self.path} {what}: give --overwrite true to start again, or another --output_dir"
            ) from None
        return self.path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves."""
        temporary = self.path.with_name("next.ckpt")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, self.path)


def averaged_weights(decay: float) -> Callback:
    """Returns Lightning's weight averaging: an exponential moving average, used for validation and in the end.

    Args:
        decay: Weight of the old average at each step, such as 0.9999.

    Raises:
        RecipeError: If Lightning is older than 2.6.
    """
    try:
        from lightning.pytorch.callbacks import WeightAveraging
    except ImportError:
        raise RecipeError(f"ema: {decay} needs lightning 2.6 or newer, this is {L.__version__}") from None
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    class AveragedWeights(WeightAveraging):
        """Gives the module the average also if a run is resumed behind its last step, where nothing is trained."""

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if stage == "fit":
                self._copy_average_to_current(pl_module)

    return AveragedWeights(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))


def gathered(module: L.LightningModule, values: torch.Tensor, size: int) -> torch.Tensor:
    """Puts together what each process computed for its part of a data set: the values in the data set's order.

    Args:
        module: The module, inside its Trainer.
        values: This process's values: of the images rank, rank + n, rank + 2 n, …, padded to the same length.
        size: Images in the data set; what the sampler put behind them is cut off.
    """
    parts: Any = module.all_gather(values)
    if module.trainer.world_size > 1:
        parts = parts.transpose(0, 1).flatten(0, 1)
    return parts[:size]


def layerwise(model: Any, groups: list[dict[str, Any]], lr: float, decay: float) -> list[dict[str, Any]]:
    """Splits parameter groups by layer, each with a learning rate of its own.

    Args:
        model: The model.
        groups: Its groups, as :func:`sadam_integrations.param_groups.param_groups` makes them.
        lr: The learning rate above the layers.
        decay: The factor from one layer to the one below it.
    """
    scales = layer_scales((name for name, _ in model.named_parameters()), decay)
    scale_of = {p: scales[name] for name, p in model.named_parameters()}
    return [
        {**group, "params": params, "name": f"{'no_' * ('weight_decay' in group)}decay {scale:.3g}", "lr": lr * scale}
        for group in groups
        for scale in sorted(set(scales.values()))
        if (params := [p for p in group["params"] if scale_of[p] == scale])
    ]
