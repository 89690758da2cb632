"""The tasks of the studies, each at three scales, and one training run.

=====  ======================================  =======================================  ==========================
Task   Model                                   Default, offline                         Full, for a GPU
=====  ======================================  =======================================  ==========================
cnn    ResNet-20 (He et al., for CIFAR)        4,000 Fashion-MNIST images at 14 x 14    CIFAR-10, 300 epochs
vit    ViT from scratch, patches of 7 or 4     4,000 Fashion-MNIST images at 28 x 28    CIFAR-10, 100 epochs
bert   MiniLM, a sentence encoder; BERT-base   800 movie review sentences, 1 epoch      GLUE SST-2, 1 epoch
=====  ======================================  =======================================  ==========================

Training, validation and test examples are always the same; the seed decides the first weights and the order.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad, relu

from sadam_integrations import alr, recipe
from sadam_integrations.augment import shift_and_flip
from sadam_integrations.factory import create_optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Setting(NamedTuple):
    """How a task is trained at one scale; ``weight_decay`` is L2, in AdamW and the W classes decoupled."""

    epochs: int
    batch: int
    train: int | None
    evaluate: int | None
    schedule: Callable[[float], float]
    weight_decay: float


def tenths(part: float) -> float:
    """The paper's schedule: a tenth of the learning rate from the middle on, a hundredth in the last quarter."""
    return 1.0 if part < 0.5 else 0.1 if part < 0.75 else 0.01


def cosine(part: float) -> float:
    """Half a cosine down to zero."""
    return 0.5 * (1 + math.cos(math.pi * part))


def linear(part: float) -> float:
    """A line down to zero."""
    return 1 - part


SETTINGS = {
    ("cnn", "smoke"): Setting(2, 128, 1000, 200, tenths, 5e-4),
    ("cnn", "default"): Setting(15, 128, None, None, tenths, 5e-4),
    ("cnn", "full"): Setting(300, 128, None, None, tenths, 5e-4),
    ("vit", "smoke"): Setting(2, 64, 1000, 200, cosine, 0.0),
    ("vit", "default"): Setting(10, 64, None, None, cosine, 0.0),
    ("vit", "full"): Setting(100, 128, None, None, cosine, 0.0),
    ("bert", "smoke"): Setting(1, 8, 64, 64, linear, 0.0),
    ("bert", "default"): Setting(1, 8, 800, None, linear, 0.0),
    ("bert", "full"): Setting(1, 32, None, None, linear, 0.0),
}
TASKS = tuple(dict.fromkeys(task for task, _ in SETTINGS))


class Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut that has no parameters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.more = outputs // inputs, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output."""
        y = self.norm2(self.conv2(relu(self.norm1(self.conv1(x)))))
        return relu(y + pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more)))


class ResNet20(nn.Module):
    """The residual network of 20 layers that He et al. (arXiv 1512.03385, section 4.2) train on CIFAR-10."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.conv = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.layers = nn.Sequential(*(Block(a, b) for a, b in itertools.pairwise(widths)))
        self.classifier = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        return self.classifier(self.layers(relu(self.norm(self.conv(x)))).mean((2, 3)))


class Logits(nn.Module):
    """A transformers model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns the logits."""
        return self.model(*inputs).logits


def images(task: str, scale: str) -> tuple[dict[str, tuple[Any, Tensor]], Callable[..., Any]]:
    """Fashion-MNIST, of which 6,000 images come along, or CIFAR-10 from the Hub, and how a batch is made of them."""
    if scale == "full":
        from datasets import load_dataset

        found = load_dataset("uoft-cs/cifar10")
        raw = {
            split: (np.stack([np.asarray(image) for image in found[split]["img"]]), np.asarray(found[split]["label"]))
            for split in ("train", "test")
        }
        mean, std, held_out, channels_last = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 5000, True
    else:
        bundled = np.load(recipe.data_file("fashion_mnist_6k.npz"))
        raw = {split: (bundled[f"x_{split}"], bundled[f"y_{split}"]) for split in ("train", "test")}
        mean, std, held_out, channels_last = (0.286,), (0.353,), 1000, False

    def prepare(pixels: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        x = torch.tensor(pixels).float() / 255
        x = x.permute(0, 3, 1, 2) if channels_last else x[:, None]
        x = (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        x = avg_pool2d(x, 2) if task == "cnn" and scale != "full" else x
        return x.to(DEVICE), torch.tensor(labels).long().to(DEVICE)

    x, y = prepare(*raw["train"])
    splits = {"train": (x[:-held_out], y[:-held_out]), "validation": (x[-held_out:], y[-held_out:])}

    def batch(x: Tensor, index: Tensor, training: bool) -> tuple[Tensor, ...]:
        x = x[index.to(x.device)]
        if training and scale == "full":  # moved by up to 4 pixels, mirrored
            x = shift_and_flip(x, np.random.default_rng(int(torch.randint(2**31, ()))), 4)
        return (x,)

    return {**splits, "test": prepare(*raw["test"])}, batch


def sentences(scale: str) -> tuple[dict[str, tuple[Any, Tensor]], Callable[..., Any]]:
    """The movie reviews that come along, or GLUE SST-2 from the Hub, and how a batch is made of them."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert_model(scale))
    splits = {}
    for split in ("train", "validation", "test"):
        if scale == "full":  # the test split of GLUE has no labels: the validation split is the test here
            part = {"train": "train[:95%]", "validation": "train[95%:]", "test": "validation"}[split]
            data = load_dataset("nyu-mll/glue", "sst2", split=part)
        else:
            file = str(recipe.data_file(f"movie_reviews_{split}.parquet"))
            data = load_dataset("parquet", data_files=file, split="train").shuffle(seed=0)
        longest = 64 if scale == "full" else 32
        tokens = tokenizer(list(data["sentence"]), truncation=True, max_length=longest)["input_ids"]
        setting = SETTINGS["bert", scale]
        order = list(range(len(tokens)))[: setting.train if split == "train" else setting.evaluate]
        order = order if split == "train" else sorted(order, key=lambda i: len(tokens[i]))  # little padding
        splits[split] = ([tokens[i] for i in order], torch.tensor(data["label"])[order].to(DEVICE))

    def batch(tokens: list[list[int]], index: Tensor, training: bool) -> tuple[Tensor, ...]:
        padded = tokenizer.pad({"input_ids": [tokens[i] for i in index.tolist()]}, return_tensors="pt")
        return padded["input_ids"].to(DEVICE), padded["attention_mask"].to(DEVICE)

    return splits, batch


def bert_model(scale: str) -> str:
    """Where the encoder is loaded from: the package that the demo uses, or the Hub."""
    bert = recipe.load(Path(__file__).parents[1] / "bert.py")
    return "google-bert/bert-base-uncased" if scale == "full" else bert.locate_model(bert.DEMO_MODEL)


@functools.lru_cache(maxsize=1)
def read(task: str, scale: str) -> tuple[dict[str, tuple[Any, Tensor]], Callable[..., Any]]:
    """The splits of a task, cut to the size of its scale, and the function that makes a batch."""
    splits, batch = sentences(scale) if task == "bert" else images(task, scale)
    setting = SETTINGS[task, scale]
    sizes = {"train": setting.train, "validation": setting.evaluate, "test": setting.evaluate}
    return {split: (x[: sizes[split]], y[: sizes[split]]) for split, (x, y) in splits.items()}, batch


def build(task: str, scale: str) -> nn.Module:
    """A new model; torch's seed decides its weights."""
    channels, size = (3, 32) if scale == "full" else (1, 28)
    if task == "cnn":
        return ResNet20(channels)
    if task == "vit":
        from transformers import ViTConfig, ViTForImageClassification

        width = 192 if scale == "full" else 64
        shape = ViTConfig(
            image_size=size, num_channels=channels, patch_size=4 if scale == "full" else 7, hidden_size=width,
            num_hidden_layers=6 if scale == "full" else 4, num_attention_heads=4, intermediate_size=2 * width,
            num_labels=10,
        )  # fmt: skip
        return Logits(ViTForImageClassification(shape))
    from transformers import AutoModelForSequenceClassification

    return Logits(AutoModelForSequenceClassification.from_pretrained(bert_model(scale), num_labels=2))


def train(job: Mapping[str, Any]) -> dict[str, Any]:
    """Makes one run.

    Args:
        job: ``task``, ``scale``, ``seed``, ``optimizer`` (a name that :func:`create_optimizer` knows), ``args`` (its
            arguments) and ``lr``; ``measure``, if the adaptive learning rate is to be looked at, for about how many
            times (the measurements come back as ``lines``); ``test``, to look at the test split, too.

    Returns:
        Accuracy, loss and seconds. A run whose loss is not finite ends there, with the accuracy of its last weights.
    """
    if job["scale"] != "full":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # set before the imports: nothing is fetched, or waited for
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    start, setting = time.perf_counter(), SETTINGS[job["task"], job["scale"]]
    splits, batch = read(job["task"], job["scale"])
    torch.manual_seed(job["seed"])
    model = build(job["task"], job["scale"]).to(DEVICE)
    decay = {"weight_decay": setting.weight_decay}
    optimizer = create_optimizer(job["optimizer"], model.parameters(), **{"lr": job["lr"], **decay, **job["args"]})
    x, y = splits["train"]
    steps = setting.epochs * (len(y) // setting.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: setting.schedule(step / steps))
    count = job.get("measure", 0)
    watched = {max(1, round(steps ** (i / count))) for i in range(count + 1)} if count else ()
    losses: list[float] = []
    lines: list[dict[str, Any]] = []
    while len(losses) < steps and (not losses or math.isfinite(losses[-1])):
        for index in torch.randperm(len(y))[: len(y) // setting.batch * setting.batch].split(setting.batch):
            loss = cross_entropy(model(*batch(x, index, True)), y[index.to(y.device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            if len(losses) in watched:
                lines.append(line(len(losses), alr.sample(optimizer, model)))
    found: dict[str, Any] = {"train_loss": statistics.mean(losses[-max(1, steps // 10) :]), "steps": len(losses)}
    for split in ("validation", "test") if job.get("test") else ("validation",):
        accuracy, loss_there = evaluate(model, splits[split], batch)
        found |= {f"{split}_accuracy": accuracy, f"{split}_loss": loss_there}
    if lines:
        found["lines"] = lines
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def line(step: int, samples: list[alr.Sample]) -> dict[str, Any]:
    """One measurement: over all coordinates, and the spread over each tensor of at least 100 that have moved."""
    spreads = [alr.summary([s])["q99_over_q01"] for s in samples if s.size - s.unseen >= 100]
    return {"step": step, "all": alr.summary(samples), "tensor_spread": statistics.median(spreads)}


@torch.no_grad()
def evaluate(model: nn.Module, split: tuple[Any, Tensor], batch: Callable[..., Any]) -> tuple[float, float]:
    """Accuracy and mean loss."""
    x, y = split
    model.eval()
    logits = torch.cat([model(*batch(x, index, False)).float() for index in torch.arange(len(y)).split(64)])
    model.train()
    return (logits.argmax(1) == y).float().mean().item(), cross_entropy(logits, y).item()
