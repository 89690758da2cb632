"""What the recipes add to the Trainer: any optimizer by name, layer-wise rates, shown progress, exact resuming."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.training_args import OptimizerNames

import sadam_integrations.huggingface  # noqa: F401  (its import registers the names)
from sadam_integrations.factory import PEERS, create_optimizer, optimizer_class, trial_groups
from sadam_integrations.run_folder import RecipeError

logger = logging.getLogger(__name__)


def named_optimizer(args: Any, name: str, settings: Mapping[str, Any]) -> tuple[type, dict[str, Any]] | None:
    """Has the Trainer use an optimizer: by ``optim`` if that knows the name, else by ``optimizer_cls_and_kwargs``.

    Args:
        args: TrainingArguments, whose ``optim``, ``optim_args`` and betas are set.
        name: A value of ``optim``, or a name that :func:`sadam_integrations.factory.optimizer_class` finds.
        settings: The optimizer's arguments besides ``lr`` and ``weight_decay``.

    Returns:
        What the Trainer takes as ``optimizer_cls_and_kwargs``: None, or the class and its arguments.

    Raises:
        ValueError: If the name is unknown, or an argument is unknown or has a value that is not valid.
        TypeError: If an argument is unknown or has the wrong type.
    """
    if name not in PEERS and name in {member.value for member in OptimizerNames}:
        rest = dict(settings)
        args.adam_beta1, args.adam_beta2 = rest.pop("betas", (args.adam_beta1, args.adam_beta2))
        args.optim = OptimizerNames(name)
        args.optim_args = ",".join(f"{key}={value}" for key, value in rest.items()) or None
        Trainer.get_optimizer_cls_and_kwargs(args)
        return None
    cls, implied = optimizer_class(name)
    kwargs = {**implied, "lr": args.learning_rate, **settings}
    create_optimizer(name, trial_groups(), **kwargs)
    return cls, kwargs


class LayerwiseTrainer(Trainer):
    """The Trainer with a learning rate of its own for each layer.

    Args:
        scales: The factor of the learning rate for each parameter's name.

    The other arguments are the Trainer's.
    """

    def __init__(self, *args: Any, scales: Mapping[str, float], **kwargs: Any) -> None:
        self.scales = scales
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Builds the optimizer that ``TrainingArguments`` name, with a group for each layer's rate."""
        if self.optimizer is not None:
            return self.optimizer
        model: Any = self.model
        cls, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
        for name, p in parameters.items():
            groups.setdefault((self.scales[name], name in decayed), []).append(p)
        optimizer = cls(
            [
                {"params": p, "lr": settings["lr"] * scale, "weight_decay": self.args.weight_decay * decays}
                for (scale, decays), p in groups.items()
            ],
            **settings,
        )
        self.optimizer = optimizer
        return optimizer


class Progress(ProgressCallback):
    """The Trainer's progress bar with loss and accuracy at its end, instead of a line for each log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts without numbers."""
        super().on_train_begin(args, state, control, **kwargs)
        self.shown: dict[str, str] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs whenever a checkpoint is due, so that a resumed run averages the same losses as a whole one."""
        super().on_step_end(args, state, control, **kwargs)
        control.should_log |= control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows the newest training loss and validation accuracy, and writes everything into the run's log."""
        logger.info("step %d: %s", state.global_step, {k: v for k, v in logs.items() if not k.startswith("alr/")})
        if state.is_world_process_zero and self.training_bar is not None:
            for key, name in (("loss", "loss"), ("eval_accuracy", "validation")):
                if key in logs:
                    self.shown[name] = f"{logs[key]:.3f}"
            self.training_bar.set_postfix(self.shown)


class DataOrder(TrainerCallback):
    """Ties the order of data grouped by length to seed and epoch: a run resumed amid an epoch sees the rest of it.

    The Trainer's random order is tied to them already.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Seeds the sampler."""
        batches = train_dataloader.batch_sampler
        sampler = getattr(batches, "batch_sampler", batches).sampler  # several processes have a shard of the batches
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(args.seed + int(state.epoch or 0))


def last_checkpoint(folder: Path) -> str | None:
    """Returns the newest complete checkpoint, or None.

    Args:
        folder: Where the Trainer saves. Its main process writes a checkpoint's state last, so one that was cut short
            has none; the other processes write the states of their random numbers at any time until then or after.

    Raises:
        RecipeError: If a file of that checkpoint is not whole: it has been damaged since.
    """
    complete = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            step = int(json.loads(state.read_text())["global_step"])
        except (ValueError, TypeError, KeyError):
            continue
        if _has_random_states(state.parent):
            complete.append((step, state.parent))
    if not complete:
        return None
    checkpoint = max(complete)[1]
    for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.safetensors")):
        if not (zipfile.is_zipfile(file) if file.suffix == ".pt" else _is_safetensors(file)):
            raise RecipeError(f"{file} is damaged: give --overwrite true to start again, or another --output_dir")
    return str(checkpoint)


def _has_random_states(checkpoint: Path) -> bool:
    """Whether the states of the random numbers are whole, and those of all processes there."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    files = list(checkpoint.glob("rng_state*.pth"))
    alone = processes == 1 or [file.name for file in files] == ["rng_state.pth"]
    return all(map(zipfile.is_zipfile, files)) and (alone or len(files) >= processes)


def _is_safetensors(file: Path) -> bool:
    """Whether the file is as long as its header says."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def points(log_history: list[dict[str, float]]) -> dict[str, list[dict[str, float]]]:
    """Returns the training losses and the validation results over the steps.

    Args:
        log_history: The log of the Trainer's state. A loss logged out of turn, for a checkpoint, is a mean over fewer
            steps than the others: it is merged with the next one.
    """
    logged = [(int(e["step"]), e["loss"]) for e in log_history if "loss" in e]
    steps = [step for step, _ in logged]
    widths = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    train, width, total = [], 0, 0.0
    for (step, loss), own in zip(logged, widths, strict=True):
        width, total = width + own, total + own * loss
        if width >= max(widths) or step == steps[-1]:
            train.append({"step": step, "loss": total / width})
            width, total = 0, 0.0
    return {
        "train": train,
        "validation": [
            {"step": e["step"], **{key: e[f"eval_{key}"] for key in ("accuracy", "f1", "loss")}}
            for e in log_history
            if "eval_accuracy" in e
        ],
    }
