"""What happens to images on their way into a model: cutting, moving, mirroring, mixing, normalising."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sadam_integrations.recipe import RecipeError

SMALL = 64
"""Images up to this height and width count as small: they are not cut into, but moved."""

CONSTANTS = {
    "fashion_mnist": ([0.2860], [0.3530]),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}
"""Mean and standard deviation of the channels of well-known data sets."""

PROCESSOR = "preprocessor_config.json"
BICUBIC = 3
"""PIL's number for it, which transformers' image processors have too."""


def eight_bits(image: Any) -> Any:
    """Returns a grey PIL image of 16 bits as one of 8: converted by Pillow alone, all that is above 255 would be white.

    Args:
        image: An image of mode I, I;16 or F.

    Raises:
        RecipeError: If its values do not say what white is: floats, negative ones or more than 16 bits.
    """
    from PIL import Image

    array = np.asarray(image)
    if image.mode == "F" or array.min(initial=0) < 0 or array.max(initial=0) > 65535:
        found = f"values from {array.min()} to {array.max()}"
        raise RecipeError(f"an image of mode {image.mode} holds {found}: convert it to 8 or 16 bits")
    return Image.fromarray((array.astype(np.int64) // 257).astype(np.uint8))


def middle_box(shape: tuple[int, int], size: int) -> tuple[float, float, float, float]:
    """Returns the middle square of an image: 7/8 of the shorter side, and all of it for a small result."""
    width, height = shape
    side = min(width, height) * (1.0 if size <= SMALL else 0.875)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def random_box(shape: tuple[int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Returns a random part of an image: 8 to 100 % of its area, at most a third longer than high, or the reverse."""
    width, height = shape
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = np.exp(rng.uniform(-np.log(4 / 3), np.log(4 / 3)))
        w, h = float(np.sqrt(area * ratio)), float(np.sqrt(area / ratio))
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return middle_box(shape, 0)


def shift_and_flip(images: torch.Tensor, rng: np.random.Generator, shift: int = 0, flip: bool = True) -> torch.Tensor:
    """Moves each image of a batch by up to ``shift`` pixels, over black, and mirrors half of them.

    Args:
        images: A batch of shape (images, channels, height, width), on any device.
        rng: Where the random numbers come from.
        shift: The most that an image is moved, in each direction.
        flip: Whether to mirror.
    """
    n, c, h, w = images.shape
    top, left = torch.from_numpy(rng.integers(0, 2 * shift + 1, (2, n, 1)))
    rows, columns = top + torch.arange(h), left + torch.arange(w)
    if flip:
        mirrored = torch.from_numpy(rng.random((n, 1)) < 0.5)
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = torch.nn.functional.pad(images, (shift,) * 4)
    each, channel = (torch.arange(k, device=images.device) for k in (n, c))
    return padded[each[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def mixup(
    images: torch.Tensor, labels: torch.Tensor, classes: int, alpha: float, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes each image of a batch with another, and the classes in the same proportion.

    Args:
        images: A batch of float images.
        labels: The number of each image's class.
        classes: How many classes there are.
        alpha: The proportion is drawn from Beta(alpha, alpha), once a batch.
        rng: Where the random numbers come from.

    Returns:
        The mixed images, and the probability of each class for each of them.
    """
    share = float(rng.beta(alpha, alpha))
    other = torch.from_numpy(rng.permutation(len(labels))).to(labels.device)
    targets = torch.nn.functional.one_hot(labels, classes).to(images.dtype)
    return share * images + (1 - share) * images[other], share * targets + (1 - share) * targets[other]


def torchvision_transforms() -> Any:
    """Imports torchvision's transforms.

    Raises:
        RecipeError: If it is missing or does not fit to torch.
    """
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # RuntimeError: a build for another torch
        reason = str(error).splitlines()[0]
        raise RecipeError(f"augment: randaugment needs torchvision, which cannot be imported ({reason})") from None
    return v2


def constants(model: str | None, dataset: str, channels: int) -> tuple[list[float], list[float]]:
    """Returns the mean and the standard deviation of each channel: the model's, else the data set's, else 0.5.

    Args:
        model: A pretrained model, a name on the Hub or a local folder.
        dataset: The data set.
        channels: How many there are.
    """
    found = CONSTANTS.get(dataset.split("/")[-1], ([], []))
    if model:
        from transformers.utils import cached_file

        with contextlib.suppress(OSError):  # it may have none
            saved = json.loads(Path(str(cached_file(model, PROCESSOR))).read_text(encoding="utf-8"))
            found = saved.get("image_mean", []), saved.get("image_std", [])
    return found if len(found[0]) == len(found[1]) == channels else ([0.5] * channels, [0.5] * channels)


def save_processor(folder: Path, size: int, mean: list[float], std: list[float]) -> None:
    """Writes what transformers' AutoImageProcessor needs to treat images as validation does here."""
    settings = {
        "image_processor_type": "CLIPImageProcessor",  # a ViT's own cannot cut the middle out
        "do_convert_rgb": len(mean) == 3,
        "do_resize": True,
        "size": {"shortest_edge": size if size <= SMALL else round(size / 0.875)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    (folder / PROCESSOR).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
