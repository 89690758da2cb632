"""Train or fine-tune a Vision Transformer with Lightning and SadamW, on any image data set.

By default, and with no network, a ViT of 139 thousand parameters learns from scratch on 4,000 of the Fashion-MNIST
images that come along; 1,000 others validate it, and another 1,000 test it once, at the end.

Run it:
  sadam run vit                              the default, in runs/vit
  sadam run vit --smoke                      the same in seconds, on 1,000 images
  sadam run vit --config vit_cifar10         CIFAR-10 from scratch, from the Hub
  sadam run vit --config vit_finetune --train_folder my_images     a pretrained ViT on your images
  sadam run vit --config vit_imagenet --nproc 8                    ImageNet-1k on 8 GPUs

Every key below can stand in a YAML file (--config) or on the command line, which wins. A folder of images has a
sub-folder for each class; without validation images, a tenth of the training images is held out.

  Augmentation          --augment flip, crop or randaugment (which needs torchvision); --mixup 0.8
  Layer-wise lr decay   --layer_lr_decay 0.75: each layer learns 0.75 times as fast as the one above it.
  Averaged weights      --ema 0.9999: they are validated, tested and saved.
  GPUs                  --bf16 true --compile true; sadam run vit --nproc 4 (batch_size is per GPU).
  Accumulation          --gradient_accumulation 4: four batches a step.
  Resuming              the same command again goes on from the end of the last epoch of a run that was stopped.

The folder of a run holds result.json (metrics, config, versions, hardware, seconds), figure.png, alr.jsonl and alr.png
(the adaptive learning rates), config.yaml, log.txt, recipe.py (this file as it was) and the model. Accuracy and macro
F1 come from the ClassificationMetric of evaluate that the BERT recipe uses too: one definition for both.

Measured with the default: test accuracy 0.829, standard deviation 0.004, validation 0.855 (five seeds; a minute a run
on one thread of an AMD EPYC with torch 2.13; docs/results.md). 1,000 images each: one standard error is 1.2 points.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from torch.nn.functional import cross_entropy

from sadam_integrations import augment, recipe
from sadam_integrations import images as data
from sadam_integrations.factory import create_optimizer, trial_groups
from sadam_integrations.lightning import ALRMonitor, training
from sadam_integrations.param_groups import param_groups
from sadam_integrations.recipe import RecipeError

DEFAULT_CONFIG = Path(__file__).with_suffix(".yaml")
AUGMENT = ("none", "flip", "crop", "randaugment")
MEASUREMENTS = 30
"""About how often a run's adaptive learning rates are measured."""


@dataclass
class Config:
    """Everything that can be set.

    Attributes:
        output_dir: Folder of the run.
        overwrite: Replace a finished or different run in output_dir.
        smoke: Try the recipe out in seconds: 1,000 training and 200 validation images, four epochs.
            What is given on the command line beside it still holds.
        model: A pretrained ViT, a name on the Hub or a local folder; null to train one from scratch.
        image_size: Height and width that images are resized to; null for the pretrained model's own.
        patch_size: Height and width of a patch, from scratch.
        hidden_size: Width of the layers, from scratch.
        layers: Number of layers, from scratch.
        heads: Attention heads in a layer, from scratch.
        mlp_size: Width of the layers' MLPs, from scratch.
        dropout: Dropout of the layers and of the attention.
        dataset: Name on the Hub, or fashion_mnist, of which 6,000 images come along.
        subset: The dataset's configuration on the Hub, if it has several.
        train_split: Name of the split to train on.
        validation_split: Name of the split to validate on; null holds out a tenth of the training split.
        test_split: Name of the split to test on, once, at the end; null for none.
        train_folder: A folder with a sub-folder of images for each class, to train on instead of dataset.
        validation_folder: The folder to validate on; null holds out a tenth of train_folder.
        test_folder: The folder to test on, once, at the end; null for none.
        image_column: The dataset's column with the images.
        label_column: The dataset's column with the class, a number or a text.
        train_size: Train on this many images only, the same ones whatever the seed; null for all.
        eval_size: Validate and test on at most this many images; null for all.
        augment: none; flip (mirror half of the images); crop (flip, and cut out a random part, or move images of up
            to 64 pixels); or randaugment (crop, and torchvision's RandAugment).
        mixup: Mix pairs of images in a proportion drawn from Beta(mixup, mixup); 0 for not.
        label_smoothing: Probability that is spread over all classes.
        optimizer: sadam, sadamw, samsgrad, samsgradw; torch's adam, adamw (both fused) or sgd; or the dotted path of
            any other, such as torch.optim.RMSprop.
        optimizer_args: Arguments of the optimizer, such as {beta: 1000}, or --optimizer_args.beta 1000.
        lr: Learning rate.
        weight_decay: Weight decay; biases and norms have none.
        layer_lr_decay: Factor of the learning rate from one layer to the one below it; 1 for one rate for all.
        scheduler: The learning rate's schedule, such as cosine, linear or constant.
        warmup_ratio: Part of the training in which the learning rate rises from 0.
        max_grad_norm: Clip the gradient's norm to this; 0 for no clipping.
        ema: Weight of the old values in a moving average of the weights, such as 0.9999; 0 for none.
        epochs: How often to go through the training images.
        batch_size: Training images in a batch, per process.
        gradient_accumulation: Batches that make up one step.
        bf16: Compute in bfloat16 where it is safe.
        compile: Compile the model, which takes a minute and then saves time on a GPU.
        workers: Processes that read images, for each training process; small images are read once, without them.
        monitor: Measure the adaptive learning rates as training goes: alr.jsonl, and alr.png beside figure.png.
        seed: Seed of the first weights, the order of the images, augmentation, mixup and dropout.
        threads: CPU threads. More are faster only if nothing else is running.
    """

    SMOKE: ClassVar[dict[str, Any]] = {"train_size": 1000, "eval_size": 200, "epochs": 4}

    output_dir: str
    overwrite: bool
    smoke: bool
    model: str | None
    image_size: int | None
    patch_size: int
    hidden_size: int
    layers: int
    heads: int
    mlp_size: int
    dropout: float
    dataset: str
    subset: str | None
    train_split: str
    validation_split: str | None
    test_split: str | None
    train_folder: str | None
    validation_folder: str | None
    test_folder: str | None
    image_column: str
    label_column: str
    train_size: int | None
    eval_size: int | None
    augment: str
    mixup: float
    label_smoothing: float
    optimizer: str
    optimizer_args: dict[str, Any]
    lr: float
    weight_decay: float
    layer_lr_decay: float
    scheduler: str
    warmup_ratio: float
    max_grad_norm: float
    ema: float
    epochs: int
    batch_size: int
    gradient_accumulation: int
    bf16: bool
    compile: bool
    workers: int
    monitor: bool
    seed: int
    threads: int

    def __post_init__(self) -> None:
        recipe.check(
            self,
            *((key, lambda x: x >= 0, "at least 0") for key in ("mixup", "workers")),
            *((k, lambda x: 0 <= x < 1, "at least 0 and below 1") for k in ("dropout", "label_smoothing", "ema")),
            ("augment", lambda word: word in AUGMENT, f"one of {', '.join(AUGMENT)}"),
        )
        for key in ("train_folder", "validation_folder", "test_folder"):
            if (place := getattr(self, key)) is not None and not Path(place).is_dir():
                raise ValueError(f"{key}: there is no folder {place!r}")
            if place and not self.train_folder:
                raise ValueError(f"{key}: needs a train_folder beside it")
        if self.model is None and self.image_size is None:
            raise ValueError("image_size: a model from scratch needs a number")
        for whole, part in (("image_size", "patch_size"), ("hidden_size", "heads")):
            if self.model is None and getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole}: {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}")


class ViT(L.LightningModule):
    """transformers' ViTForImageClassification, and how it is trained; pixels are normalised with mean and std."""

    def __init__(self, config: Config, model: Any, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.config, self.model = config, model
        self.shift = 0  # pixels by which training images are moved at most
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.interpolate = config.image_size not in (None, model.config.image_size)
        self.metric: Any = None
        self.results: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits for a batch of images as bytes, or as floats between 0 and 255."""
        pixels = (images / 255 - self.mean) / self.std
        return self.model(pixel_values=pixels, interpolate_pos_encoding=self.interpolate).logits

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Augments, mixes and returns the loss; the random numbers are a function of seed, epoch, batch and process."""
        images, labels = batch
        rng = np.random.default_rng((self.config.seed, self.current_epoch, batch_idx, self.global_rank))
        if self.config.augment != "none":
            images = augment.shift_and_flip(images, rng, self.shift)
        if self.config.mixup:
            images, labels = augment.mixup(images.float(), labels, self.model.config.num_labels, self.config.mixup, rng)
        loss = cross_entropy(self(images).float(), labels, label_smoothing=self.config.label_smoothing)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Keeps class, prediction and loss of each image."""
        images, labels = batch
        logits = self(images).float()
        losses = cross_entropy(logits, labels, reduction="none")
        self.results.append(torch.stack([labels.float(), logits.argmax(-1).float(), losses], dim=1))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of all images."""
        self.log_results("validation", self.trainer.val_dataloaders)

    def on_test_epoch_end(self) -> None:
        """Logs the metrics of all images."""
        self.log_results("test", self.trainer.test_dataloaders)

    def log_results(self, split: str, loader: Any) -> None:
        """Computes the metrics from the predictions of all processes, each image once."""
        labels, predictions, losses = training.gathered(self, torch.cat(self.results), len(loader.dataset)).cpu().T
        self.results.clear()
        found = self.metric.compute(predictions=predictions.long(), references=labels.long())
        found["loss"] = float(losses.double().mean())
        self.log_dict({f"{split}_{key}": value for key, value in found.items()})

    def configure_optimizers(self) -> Any:
        """Builds the optimizer by name, with decay groups, and the schedule over all steps."""
        from transformers import get_scheduler

        config, groups = self.config, param_groups(self.model)
        if config.layer_lr_decay < 1:
            groups = training.layerwise(self.model, groups, config.lr, config.layer_lr_decay)
        optimizer = make_optimizer(config, groups)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_scheduler(config.scheduler, optimizer, int(config.warmup_ratio * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        """Clips the norm; Lightning's own refuses fused optimizers under bf16, which needs no unscaling."""
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)


def make_optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Returns the optimizer that the config names."""
    settings = {"lr": config.lr, "weight_decay": config.weight_decay, **config.optimizer_args}
    return create_optimizer(config.optimizer, groups, **settings)


def run(config: Config, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Trains, evaluates, writes the run's folder and returns what ``result.json`` holds.

    The other processes of torchrun write nothing and return the metrics and the history alone.
    """
    start = time.time()
    recipe.require("transformers", "datasets", "evaluate", "sklearn", "matplotlib", "PIL")
    if (config.train_folder or config.dataset == data.BUNDLED) and (not config.model or Path(config.model).is_dir()):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # set before the imports: nothing is fetched, or waited for
    torch.set_num_threads(config.threads)
    if config.bf16:
        torch.set_float32_matmul_precision("high")

    import datasets
    import transformers

    from sadam_integrations.metrics import ClassificationMetric

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    training.quiet()

    sources = read_data(config)
    module = build(config, sources["train"])
    size, channels = config.image_size or module.model.config.image_size, module.model.config.num_channels
    loaders = {}
    for split, source in sources.items():
        train = split == "train"
        images = data.prepared(source, size, channels, config.augment if train else "none", config.seed, config.workers)
        order = data.Order(images, config.seed if train else None)
        loaders[split] = data.loader(images, config.batch_size, order, config.workers, drop_last=train)
    module.shift = loaders["train"].dataset.shift
    if config.compile:
        module.model.compile()
    averaged = [training.averaged_weights(config.ema)] if config.ema else []

    folder = recipe.open_run(config, __file__)
    module.metric = ClassificationMetric(keep_in_memory=True)
    history, checkpoint = training.History(), training.EpochCheckpoint(folder / "checkpoints")
    steps = len(loaders["train"]) * config.epochs // config.gradient_accumulation
    monitor = [ALRMonitor(folder=folder)] if config.monitor else []
    own = [training.Seeded(config.seed), history, training.Progress(history), checkpoint]
    trainer = L.Trainer(
        max_epochs=config.epochs,
        accumulate_grad_batches=config.gradient_accumulation,
        gradient_clip_val=config.max_grad_norm or None,
        log_every_n_steps=max(1, steps // MEASUREMENTS),
        callbacks=[*averaged, *own, *monitor, *callbacks],
        **training.trainer_arguments(config.bf16),
    )
    kind = config.model or f"a ViT of {sum(p.numel() for p in module.parameters()):,} parameters from scratch"
    recipe.say(
        f"{kind}: {len(sources['train'])} training and {len(sources['validation'])} validation images, {size} px"
    )
    trainer.strategy.setup_environment()  # joins the processes, so that all resume from what the main one finds
    if last := trainer.strategy.broadcast(checkpoint.last()):
        recipe.say(f"Resuming from {last}")
    with data.plain_errors():
        training.interruptible(trainer.fit, module, loaders["train"], loaders["validation"], ckpt_path=last)

    metrics = {f"validation_{key}": history.points["validation"][-1][key] for key in ("accuracy", "f1", "loss")}
    if "test" in loaders:
        tested = training.interruptible(trainer.test, module, loaders["test"], verbose=False)
        metrics |= training.rounded(tested[0])
    seconds = time.time() - start
    if not recipe.is_main_process():
        return {"metrics": metrics, "history": history.points}
    module.model.save_pretrained(folder / "model")
    augment.save_processor(folder / "model", size, module.mean.flatten().tolist(), module.std.flatten().tolist())
    name = (config.model or config.train_folder or config.dataset).rstrip("/").split("/")[-1]
    return recipe.finish(folder, "vit", name, config, metrics, history.points, seconds)


def read_data(config: Config) -> dict[str, data.Source]:
    """Returns the images to train on, to validate on and, if there are any, to test on."""

    def read(split: str, names: list[str] | None = None) -> data.Source | None:
        if config.train_folder:
            place = getattr(config, f"{split}_folder")
            return data.folder(place, f"{split}_folder", names) if place else None
        part = getattr(config, f"{split}_split")
        if part is None:
            return None
        if config.dataset == data.BUNDLED:
            return data.bundled(part)
        return data.hub(config.dataset, config.subset, part, config.image_column, config.label_column, names)

    train = read("train")
    validation, test = read("validation", train.names), read("test", train.names)
    if validation is None:
        train, validation = train.hold_out()
    sources = {"train": train.at_most(config.train_size), "validation": validation.at_most(config.eval_size)}
    return {**sources, "test": test.at_most(config.eval_size)} if test else sources


def build(config: Config, train: data.Source) -> ViT:
    """Returns the module: a pretrained model with a new head, or one from scratch."""
    from transformers import ViTConfig, ViTForImageClassification, get_scheduler

    classes = dict(enumerate(train.names))
    labels: dict[str, Any] = {"id2label": classes, "label2id": {name: i for i, name in classes.items()}}
    dropout = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    torch.manual_seed(config.seed)  # the first weights
    if config.model:
        try:
            model = ViTForImageClassification.from_pretrained(
                config.model, ignore_mismatched_sizes=True, dtype=torch.float32, **labels, **dropout
            )
        except (OSError, ValueError) as error:
            raise RecipeError(f"model: {config.model!r} cannot be loaded: {recipe.reason(error)}") from None
    else:
        shape = ViTConfig(
            image_size=config.image_size, patch_size=config.patch_size, num_channels=train.channels(),
            hidden_size=config.hidden_size, num_hidden_layers=config.layers, num_attention_heads=config.heads,
            intermediate_size=config.mlp_size, **labels, **dropout,
        )  # fmt: skip
        model = ViTForImageClassification(shape)
    key = "optimizer"
    try:
        optimizer = make_optimizer(config, trial_groups())
        key = "scheduler"
        schedule = get_scheduler(config.scheduler, optimizer, 0, 1)
        if type(schedule) is not torch.optim.lr_scheduler.LambdaLR:
            raise ValueError(f"{config.scheduler} does not follow the steps: take another, such as cosine or linear")
    except (ValueError, TypeError, RuntimeError) as error:
        raise RecipeError(f"{key}: {' '.join(str(error).split())}") from None
    name = "" if config.train_folder else config.dataset
    return ViT(config, model, *augment.constants(config.model, name, model.config.num_channels))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe from the command line and returns the exit code."""
    return recipe.main(Config, run, argv, __doc__, DEFAULT_CONFIG)


if __name__ == "__main__":
    sys.exit(main())
