"""Images to classify: the bundled set, a data set of the Hub or a local folder, loaded, decoded, augmented, mixed."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from sadam_integrations import recipe
from sadam_integrations.augment import BICUBIC, SMALL, eight_bits, middle_box, random_box, torchvision_transforms
from sadam_integrations.recipe import RecipeError

BUNDLED = "fashion_mnist"
BUNDLED_SPLITS = {"train": ("train", slice(0, 4000)), "validation": ("train", slice(4000, None)), "test": ("test", ...)}
CLOTHES = ["T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
CHECKED = 10_000
"""Of a folder with more files than this, only so many are looked into before the training."""

IN_MEMORY = 2**30
"""Small images are decoded once, if those of a split fit into so many bytes."""


# ---------------------------------------------------------------- where they come from


@dataclass
class Source:
    """Images and their classes.

    Attributes:
        images: A PIL image for each index, read when it is asked for.
        labels: The number of each image's class.
        names: The classes.
        where: What it was read from, for messages.
    """

    images: Any
    labels: np.ndarray
    names: list[str]
    where: str

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray) -> Source:
        """Returns the images with these indices."""
        return Source(Subset(self.images, indices.tolist()), self.labels[indices], self.names, self.where)

    def at_most(self, size: int | None) -> Source:
        """Returns that many images, always the same ones; all of them for ``None``."""
        if size is None or size >= len(self):
            return self
        return self.select(np.sort(np.random.default_rng(0).permutation(len(self))[:size]))

    def hold_out(self) -> tuple[Source, Source]:
        """Splits off a tenth, always the same one: the images to train on, and those to validate on."""
        if len(self) < 10:
            raise RecipeError(
                f"{self.where}: {len(self)} images are too few to hold out a tenth for validation: name others"
            )
        order = np.random.default_rng(0).permutation(len(self))
        return self.select(np.sort(order[len(self) // 10 :])), self.select(np.sort(order[: len(self) // 10]))

    def channels(self) -> int:
        """Returns 1 if all images are grey, as a sample of them shows, else 3."""
        sample = np.unique(np.linspace(0, len(self) - 1, 100).astype(int))
        return 1 if {self.images[int(i)].mode for i in sample} <= {"1", "L", "I", "I;16", "F"} else 3


class _Arrays:
    """Images that are an array already."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return Image.fromarray(self.array[index])


class _Files:
    """Image files; the names are one array of bytes, which workers share, as they would not a list of strings."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self.folder, self.files = folder, np.array([os.fsencode(file) for file in files])

    def path(self, index: int) -> Path:
        return self.folder / os.fsdecode(self.files[index])

    def __getitem__(self, index: int) -> Any:
        return _opened(self.path(index))


class _Column:
    """The images of a data set of the ``datasets`` library."""

    def __init__(self, dataset: Any, column: str, where: str) -> None:
        self.dataset, self.column, self.where = dataset, column, where

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[int(index)][self.column]
        except Exception as error:  # whatever the decoder raises
            raise RecipeError(f"{self.where}: image {index} cannot be read: {error}") from None


def _opened(path: Path, decode: bool = True) -> Any:
    """Reads an image file, or its header alone."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata
            with Image.open(path) as image:
                if not decode:
                    return image
                image.load()
                return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).replace(f" {str(path)!r}", "")
        raise RecipeError(f"{path} cannot be read as an image ({reason}): remove it, or put it right") from None


def bundled(split: str) -> Source:
    """Returns 4,000 (train), 1,000 (validation) or another 1,000 (test) images of Fashion-MNIST.

    Args:
        split: One of train, validation and test.

    Raises:
        RecipeError: If it is none of these.
    """
    if split not in BUNDLED_SPLITS:
        raise RecipeError(f"dataset: {BUNDLED} has no split {split!r}, only {', '.join(BUNDLED_SPLITS)}")
    part, where = BUNDLED_SPLITS[split]
    with np.load(recipe.data_file(f"{BUNDLED}_6k.npz")) as data:
        images, labels = data[f"x_{part}"][where], data[f"y_{part}"][where].astype(np.int64)
    return Source(_Arrays(images), labels, CLOTHES, f"{BUNDLED}, split {split}")


def folder(path: str, key: str, names: list[str] | None = None) -> Source:
    """Returns the images of a folder that has a sub-folder for each class.

    Args:
        path: The folder.
        key: The config's key that names it, for messages.
        names: The classes of the training images, if these are others.

    Raises:
        RecipeError: If there is no such folder, it holds fewer than two classes or a class that is not in ``names``,
            or a file is not an image.
    """
    root = Path(path)
    if not root.is_dir():
        raise RecipeError(f"{key}: there is no folder {path!r}")
    found = {entry.name: _image_files(root, entry.name) for entry in sorted(root.iterdir()) if _is_class(entry)}
    found = {name: files for name, files in found.items() if files}
    if not found:
        raise RecipeError(f"{key}: {path} holds no images in sub-folders: it needs a sub-folder for each class")
    if names is None and len(found) < 2:
        raise RecipeError(
            f"{key}: {path} has one class only, {next(iter(found))!r}: it needs a sub-folder for each class"
        )
    names = names or list(found)
    if unknown := [name for name in found if name not in names]:
        raise RecipeError(
            f"{key}: the sub-folder {unknown[0]!r} of {path} is none of the training classes {names[:10]}"
        )
    files = _Files(root, [file for name in found for file in found[name]])
    labels = np.concatenate([np.full(len(found[name]), names.index(name)) for name in found])
    for index in np.unique(np.linspace(0, len(labels) - 1, CHECKED).astype(int)):
        _opened(files.path(index), decode=False)
    return Source(files, labels, names, path)


def _is_class(entry: Path) -> bool:
    """Whether it is a folder that shows: not .ipynb_checkpoints."""
    return entry.is_dir() and not entry.name.startswith(".")


def _image_files(root: Path, name: str) -> list[str]:
    """Returns the image files below a sub-folder, hidden ones aside, relative to the folder, in order."""
    return sorted(
        os.path.relpath(os.path.join(place, file), root)
        for place, _, files in os.walk(root / name)
        if not any(part.startswith(".") for part in Path(place).relative_to(root).parts)
        for file in files
        if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith(".")
    )


def hub(
    name: str, subset: str | None, split: str, image_column: str, label_column: str, names: list[str] | None = None
) -> Source:
    """Returns a split of a data set of the Hub, or of a folder that the ``datasets`` library reads.

    Args:
        name: The data set.
        subset: Its configuration, if it has several.
        split: The split.
        image_column: The column with the images.
        label_column: The column with the classes: numbers or texts.
        names: The classes of the training images, if these are others.

    Raises:
        RecipeError: If it cannot be read, has no such column, or the column holds something else.
    """
    import datasets

    where = f"{name}, split {split}"
    try:
        data = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # whatever the readers of the formats raise
        raise RecipeError(f"dataset: {where} cannot be read: {recipe.reason(error)}") from None
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in data.column_names:
            raise RecipeError(f"{key}: {where} has no column {column!r}, only {data.column_names}")
    if not isinstance(data.features[image_column], datasets.Image):
        raise RecipeError(f"image_column: {image_column!r} of {where} holds {data.features[image_column]}, not images")
    kind = data.features[label_column]
    found = data.unique(label_column) if isinstance(kind, datasets.Value | datasets.ClassLabel) else [kind]
    if not all(isinstance(label, int | str) for label in found):
        raise RecipeError(f"label_column: {label_column!r} of {where} holds {found[:3]}, not classes, none missing")
    declared = getattr(kind, "names", None)
    numbers: dict[Any, int] = {i if declared else v: i for i, v in enumerate(declared or sorted(found))}
    if not declared and names:
        numbers = {value: names.index(str(value)) for value in found if str(value) in names}
    if unknown := [label for label in found if label not in numbers]:
        hint = ": a split without labels cannot be evaluated, set test_split to null" if unknown == [-1] else ""
        raise RecipeError(f"label_column: {unknown[0]!r} in {where} is none of the training data's classes{hint}")
    names = names or [str(value) for value in (declared or sorted(found))]
    if len(names) < 2:
        raise RecipeError(f"label_column: {label_column!r} of {where} has one class only, {names[0]!r}")
    labels = np.array([numbers[label] for label in data[label_column]], dtype=np.int64)
    return Source(_Column(data, image_column, where), labels, names, where)


# ---------------------------------------------------------------- from images to batches


class DecodedImages(Dataset):
    """Reads, cuts out and resizes an image when a worker asks for it; a tensor of bytes, channels first.

    Args:
        source: The images.
        size: Height and width of the result.
        channels: 1 for grey, 3 for RGB.
        crop: Cut a random part out, as in training; otherwise the middle.
        rand_augment: Apply torchvision's RandAugment too.
        seed: Together with the epoch and the image's index it gives the random numbers.
    """

    shift = 0

    def __init__(
        self, source: Source, size: int, channels: int, crop: bool = False, rand_augment: bool = False, seed: int = 0
    ) -> None:
        self.source, self.size, self.mode = source, size, {1: "L", 3: "RGB"}[channels]
        self.crop, self.seed = crop, seed
        self.rand_augment = torchvision_transforms().RandAugment() if rand_augment else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        """Returns an image and its class; the key is the epoch and the index."""
        epoch, index = key
        image = self.source.images[index]
        if image.mode == "F" or image.mode.startswith("I"):
            image = eight_bits(image)
        if image.mode == "P":
            image = image.convert("RGBA")  # a palette may hold transparency
        image = image.convert(self.mode)
        rng = np.random.default_rng((self.seed, epoch, index))
        box = random_box(image.size, rng) if self.crop else middle_box(image.size, self.size)
        if (self.size, self.size) != image.size or box != (0, 0, *image.size):
            image = image.resize((self.size, self.size), BICUBIC, box)
        if self.rand_augment is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(rng.integers(2**62)))
                image = self.rand_augment(image)
        array = np.array(image)
        return torch.from_numpy(array.reshape(self.size, self.size, -1)).permute(2, 0, 1), int(
            self.source.labels[index]
        )


class TensorImages(Dataset):
    """A small data set, decoded once and served batch by batch.

    Args:
        images: Bytes, of shape (images, channels, size, size).
        labels: The number of each image's class.
        shift: By how many pixels the training moves them at most.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, shift: int = 0) -> None:
        self.images, self.labels, self.shift = images, labels, shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a batch; each key is the epoch and the index."""
        indices = torch.tensor([index for _, index in keys])
        return self.images[indices], self.labels[indices]


def prepared(
    source: Source, size: int, channels: int, augment: str = "none", seed: int = 0, workers: int = 0
) -> DecodedImages | TensorImages:
    """Returns what :func:`loader` loads: small images decoded at once, others when they are asked for.

    Args:
        source: The images.
        size: Height and width of the result.
        channels: 1 for grey, 3 for RGB.
        augment: none, flip, crop or randaugment.
        seed: Seed of the augmentation.
        workers: Processes that read, if there are many images to decode at once.
    """
    if size > SMALL or len(source) * channels * size**2 > IN_MEMORY or augment == "randaugment":
        crop = augment in ("crop", "randaugment")
        return DecodedImages(source, size, channels, crop, augment == "randaugment", seed)
    data = DecodedImages(source, size, channels)
    with plain_errors():
        batches = list(loader(data, 256, Order(data, shared=False), workers if len(data) > 10_000 else 0))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return TensorImages(images, labels, shift=size // 8 if augment == "crop" else 0)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Frees a RecipeError from the stack trace that a worker puts before its message."""
    try:
        yield
    except RecipeError as error:
        last = str(error).strip().splitlines()[-1]
        raise RecipeError(last.rpartition("RecipeError: ")[2]) from None


class Order(DistributedSampler):
    """The keys (epoch, index) of a data set; each process has every n-th, padded to the same length.

    Args:
        data: The data set.
        seed: Shuffle, in an order that this seed and the epoch alone decide; ``None`` keeps the data set's.
        shared: Whether torchrun's processes share the data set.
    """

    def __init__(self, data: Any, seed: int | None = None, shared: bool = True) -> None:
        processes, rank = (int(os.environ.get(key, n)) for key, n in (("WORLD_SIZE", "1"), ("RANK", "0")))
        processes, rank = (processes, rank) if shared else (1, 0)
        super().__init__(data, processes, rank, shuffle=seed is not None, seed=seed or 0)

    def __iter__(self) -> Iterator[Any]:
        return ((self.epoch, index) for index in super().__iter__())


def loader(data: Any, batch_size: int, order: Order, workers: int = 0, drop_last: bool = False) -> DataLoader:
    """Returns batches: made in workers that stay and read ahead, in pinned memory if there is a GPU.

    Args:
        data: A :class:`DecodedImages`, or a :class:`TensorImages`, which needs no workers and gets none.
        batch_size: Images in a batch.
        order: The order of the images.
        workers: Processes that read.
        drop_last: Leave out a last batch that is smaller, unless it is the only one.
    """
    whole = isinstance(data, TensorImages)
    workers = 0 if whole else min(workers, os.cpu_count() or 1)
    return DataLoader(
        data,
        batch_size,
        sampler=order,
        num_workers=workers,
        collate_fn=_as_it_is if whole else None,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        drop_last=drop_last and len(order) >= batch_size,
        generator=torch.Generator(),  # its own: reading data draws no number of the training's
    )


def _as_it_is(batch: Any) -> Any:
    return batch
