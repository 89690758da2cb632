"""A recipe of one's own: a straight line through points, with a checkpoint after every epoch; quick, for tests."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from sadam_integrations import create_optimizer, recipe

DEFAULT_CONFIG = Path(__file__).with_suffix(".yaml")


@dataclass
class Config:
    """Everything that can be set.

    Attributes:
        output_dir: Folder of the run.
        overwrite: Replace what is there.
        smoke: One epoch.
        optimizer: Its name.
        optimizer_args: Its arguments.
        lr: Learning rate.
        seed: Seed of the data.
        epochs: Number of epochs.
        fails_at: The seed with which it fails.
        pause: Seconds to wait after an epoch.
    """

    SMOKE: ClassVar[dict[str, Any]] = {"epochs": 1}

    output_dir: str
    overwrite: bool
    smoke: bool
    optimizer: str
    optimizer_args: dict[str, Any]
    lr: float
    seed: int
    epochs: int
    fails_at: int | None
    pause: float


def run(config: Config) -> None:
    folder = recipe.open_run(config, __file__)
    if config.seed == config.fails_at:
        raise recipe.RecipeError(f"seed: {config.seed} fails")
    torch.manual_seed(config.seed)
    recipe.say(f"{os.environ.get('WORLD_SIZE', 1)} processes")
    x = torch.randn(32, 1)
    model = torch.nn.Linear(1, 1)
    optimizer = create_optimizer(config.optimizer, model, lr=config.lr, **config.optimizer_args)
    saved, history, first = folder / "checkpoints" / "last.pt", {"train": [], "validation": []}, 0
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, first = state["history"], state["epoch"]
        recipe.say(f"Resuming at {first}")
    for epoch in range(first, config.epochs):
        loss = (model(x) - 2 * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history["train"].append({"step": epoch + 1, "loss": loss.item()})
        history["validation"].append({"step": epoch + 1, "accuracy": 1 / (1 + loss.item())})
        if recipe.is_main_process():
            saved.parent.mkdir(exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
            torch.save({**state, "epoch": epoch + 1}, saved.with_suffix(".new"))
            os.replace(saved.with_suffix(".new"), saved)
        time.sleep(config.pause)
    if recipe.is_main_process():
        (folder / "model").mkdir(exist_ok=True)
        metrics = {"validation_accuracy": history["validation"][-1]["accuracy"], "validation_loss": loss.item()}
        recipe.finish(folder, "toy", "A line", config, metrics, history, 0.0)


def main(argv=None) -> int:
    return recipe.main(Config, run, argv, __doc__, DEFAULT_CONFIG)


if __name__ == "__main__":
    sys.exit(main())
