"""Reading images: the bundled set, folders, data sets; what is wrong with them; transforms, order and mixup."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sadam_integrations import augment, images
from sadam_integrations.recipe import RecipeError

PIL = pytest.importorskip("PIL.Image")
MODES = ("RGB", "L", "RGBA", "P", "1", "LA")


def picture(size=(40, 30), mode="RGB", seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.fromarray(array).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Two classes, six images each, of all modes and of several sizes."""
    for c, name in enumerate(("ant", "bee")):
        (tmp_path / name / "more").mkdir(parents=True)
        for i, mode in enumerate(MODES):
            picture((30 + 7 * i, 60 - 5 * i), mode, 10 * c + i).save(
                tmp_path / name / "more"[: 4 * (i % 2)] / f"{i}.png"
            )
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    return tmp_path


# ---------------------------------------------------------------- sources


def test_bundled_splits_are_the_known_sizes_and_do_not_overlap():
    parts = {split: images.bundled(split) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [4000, 1000, 1000]
    seen = [{part.images[i].tobytes() for i in range(len(part))} for part in parts.values()]
    assert len(set.union(*seen)) == 6000 and parts["train"].channels() == 1 and len(parts["test"].names) == 10
    with pytest.raises(RecipeError, match="no split 'dev', only train, validation, test"):
        images.bundled("dev")


def test_folder_takes_all_modes_and_sizes(folder):
    source = images.folder(str(folder), "train_folder")
    assert source.names == ["ant", "bee"] and source.labels.tolist() == [0] * 6 + [1] * 6 and source.channels() == 3
    data = images.DecodedImages(source, 16, 3)
    for i in range(len(data)):
        image, label = data[0, i]
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and label == source.labels[i]
    assert images.DecodedImages(source, 16, 1)[0, 0][0].shape == (1, 16, 16)
    assert images.folder(str(folder), "test_folder", ["x", "ant", "y", "bee"]).labels.tolist() == [1] * 6 + [3] * 6


def test_grey_images_of_16_bits_keep_their_greys(tmp_path):
    array = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        PIL.fromarray(array).save(tmp_path / name / "0.png")
    source = images.folder(str(tmp_path), "train_folder")
    image, _ = images.DecodedImages(source, 32, source.channels())[0, 0]
    assert source.channels() == 1 and torch.equal(image[0], torch.from_numpy((array // 257).astype(np.uint8)))
    with pytest.raises(RecipeError, match=r"mode F holds values from 0.0 to 1.0: convert it to 8 or 16 bits"):
        augment.eight_bits(PIL.fromarray(np.eye(3, dtype=np.float32)))


def test_one_grey_class_does_not_make_all_images_grey(tmp_path):
    for name, mode in (("a", "L"), ("b", "RGB")):
        (tmp_path / name).mkdir()
        for i in range(40):
            picture((8, 8), mode, i).save(tmp_path / name / f"{i}.png")
    assert images.folder(str(tmp_path), "train_folder").channels() == 3


def test_hidden_folders_are_no_classes(folder):
    for place in (".hidden", "ant/.thumbnails"):
        (folder / place).mkdir()
        picture().save(folder / place / "a.png")
    source = images.folder(str(folder), "train_folder")
    assert source.names == ["ant", "bee"] and len(source) == 12


def test_what_is_wrong_with_a_folder_is_said(folder, tmp_path):
    with pytest.raises(RecipeError, match="train_folder: there is no folder 'nowhere'"):
        images.folder("nowhere", "train_folder")
    (folder / "empty").mkdir()
    with pytest.raises(RecipeError, match="holds no images in sub-folders"):
        images.folder(str(folder / "empty"), "train_folder")
    (folder / "one" / "class").mkdir(parents=True)
    picture().save(folder / "one" / "class" / "a.png")
    with pytest.raises(RecipeError, match="one class only, 'class'"):
        images.folder(str(folder / "one"), "train_folder")
    with pytest.raises(RecipeError, match=r"validation_folder: the sub-folder 'bee' of .* none of the training"):
        images.folder(str(folder), "validation_folder", ["ant", "one"])
    (folder / "ant" / "broken.jpg").write_text("not an image")
    with pytest.raises(RecipeError, match=r"broken\.jpg cannot be read as an image .*remove it"):
        images.folder(str(folder), "train_folder")


def test_an_image_cut_short_is_one_line_from_a_worker_too(folder):
    whole = (folder / "ant" / "0.png").read_bytes()
    (folder / "ant" / "0.png").write_bytes(whole[: len(whole) // 2])
    data = images.DecodedImages(images.folder(str(folder), "train_folder"), 16, 3)
    for workers in (0, 1):
        with pytest.raises(RecipeError) as caught, images.plain_errors():
            list(images.loader(data, 4, images.Order(data), workers))
        message = str(caught.value)
        assert message.startswith(str(folder / "ant" / "0.png")) and "\n" not in message and "remove it" in message


def test_hold_out_and_at_most_are_always_the_same(folder):
    source = images.bundled("train")
    train, validation = source.hold_out()
    assert (len(train), len(validation)) == (3600, 400)
    again = source.hold_out()[1]
    assert validation.labels.tolist() == again.labels.tolist() and validation.images.indices == again.images.indices
    assert not set(train.images.indices) & set(validation.images.indices)
    few = source.at_most(50)
    assert len(few) == 50 and few.images[7].tobytes() == source.at_most(50).images[7].tobytes()
    assert few.labels[7] == source.labels[few.images.indices[7]] and source.at_most(None) is source
    with pytest.raises(RecipeError, match="2 images are too few"):
        source.at_most(2).hold_out()


@pytest.fixture
def parquet(tmp_path):
    """Makes a data set that load_dataset reads, from its columns."""
    datasets = pytest.importorskip("datasets")

    def make(labels, feature=None, pictures=None):
        pictures = pictures or [picture(seed=i) for i in range(len(labels))]
        data = datasets.Dataset.from_dict({"image": pictures, "label": labels})
        if not isinstance(pictures[0], str):
            data = data.cast_column("image", datasets.Image())
        if feature:
            data = data.cast_column("label", datasets.ClassLabel(names=feature))
        place = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        data.to_parquet(place / "train.parquet")
        return str(place)

    return make


def test_data_set_with_numbers_texts_and_declared_classes(parquet):
    for labels, feature, names in (
        ([3, 7, 3], None, ["3", "7"]),
        (["dog", "cat", "dog"], None, ["cat", "dog"]),
        ([0, 1, 0], ["zebra", "ape"], ["zebra", "ape"]),
    ):
        source = images.hub(parquet(labels, feature), None, "train", "image", "label")
        assert source.names == names and len(source) == 3
        assert source.labels.tolist() == ([1, 0, 1] if labels[0] == "dog" else [0, 1, 0])
        assert images.DecodedImages(source, 8, 3)[0, 1][0].shape == (3, 8, 8)
    source = images.hub(parquet(["dog", "dog"]), None, "train", "image", "label", ["cat", "dog"])
    assert source.labels.tolist() == [1, 1]


def test_what_is_wrong_with_a_data_set_is_said(parquet):
    good = parquet([0, 1])
    for place, split, image, label, message in (
        ("/no/such/folder", "train", "image", "label", "dataset: /no/such/folder, split train cannot be read"),
        (good, "test", "image", "label", "dataset: .* split test cannot be read"),
        (good, "train", "img", "label", r"image_column: .* no column 'img', only \['image', 'label'\]"),
        (good, "train", "image", "fine", r"label_column: .* no column 'fine', only \['image', 'label'\]"),
        (good, "train", "label", "label", "image_column: 'label' of .* not images"),
        (parquet([0, None]), "train", "image", "label", "label_column: .* none missing"),
        (parquet([0.5, 1.5]), "train", "image", "label", "label_column: .* not classes"),
        (parquet([[0], [1]]), "train", "image", "label", "label_column: .* not classes"),
        (parquet([1, 1]), "train", "image", "label", "one class only, '1'"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            images.hub(place, None, split, image, label)
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="none of the training data's classes"):
        images.hub(parquet([0, 2]), None, "train", "image", "label", ["0", "1"])


# ---------------------------------------------------------------- order, workers, transforms


def test_order_is_a_function_of_seed_and_epoch_and_processes_share_it(monkeypatch):
    data = list(range(11))

    def keys(rank=0, epoch=0, seed=5):
        monkeypatch.setenv("RANK", str(rank))
        order = images.Order(data, seed)
        order.set_epoch(epoch)
        return list(order)

    whole = keys()
    assert sorted(index for _, index in whole) == data and whole == keys()
    assert {epoch for epoch, _ in keys(epoch=3)} == {3}
    assert [i for _, i in keys(epoch=3)] != [i for _, i in whole] != [i for _, i in keys(seed=6)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    first, second = keys(0), keys(1)
    assert [key for pair in zip(first, second, strict=True) for key in pair][:11] == whole
    assert [i for _, i in keys(1, seed=None)] == [1, 3, 5, 7, 9, 0]


def test_augmentation_is_the_same_in_workers_and_differs_by_epoch(folder):
    data = images.DecodedImages(images.folder(str(folder), "train_folder"), 16, 3, crop=True, seed=1)

    def epoch(number, workers):
        order = images.Order(data, 0)
        order.set_epoch(number)
        return torch.cat([batch for batch, _ in images.loader(data, 5, order, workers)])

    state = torch.get_rng_state()
    assert torch.equal(epoch(1, 0), epoch(1, 2)) and torch.equal(torch.get_rng_state(), state)
    other, same = images.DecodedImages(data.source, 16, 3, crop=True, seed=2), data[1, 0][0]
    assert not torch.equal(data[2, 0][0], same) and not torch.equal(other[1, 0][0], same)


def test_small_images_are_decoded_once():
    source = images.bundled("test").at_most(20)
    data = images.prepared(source, 28, 1, "crop")
    assert isinstance(data, images.TensorImages) and data.shift == 3 and data.images.shape == (20, 1, 28, 28)
    assert np.array_equal(data.images[3, 0].numpy(), np.array(source.images[3]))
    batch, labels = next(iter(images.loader(data, 8, images.Order(data), workers=4)))
    assert torch.equal(batch, data.images[:8]) and labels.tolist() == source.labels[:8].tolist()
    assert isinstance(images.prepared(source, 96, 1, "crop"), images.DecodedImages)


def test_a_last_small_batch_is_left_out_in_training_unless_it_is_the_only_one():
    data = images.prepared(images.bundled("test").at_most(20), 28, 1)
    assert [len(y) for _, y in images.loader(data, 8, images.Order(data), drop_last=True)] == [8, 8]
    assert [len(y) for _, y in images.loader(data, 32, images.Order(data), drop_last=True)] == [20]


def test_shift_and_flip():
    batch = torch.arange(1, 1 + 50 * 2 * 6 * 5).view(50, 2, 6, 5)
    rng = np.random.default_rng(0)
    assert torch.equal(augment.shift_and_flip(batch, rng, 0, flip=False), batch)
    flipped = augment.shift_and_flip(batch, rng)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, batch, strict=True)]
    assert 10 < sum(mirrored) < 40
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, batch, strict=True))
    moved = augment.shift_and_flip(batch, rng, 2, flip=False)
    padded = torch.nn.functional.pad(batch, (2, 2, 2, 2))
    places = [(t, left) for t in range(5) for left in range(5)]
    found = [
        [(t, left) for t, left in places if torch.equal(padded[i, :, t : t + 6, left : left + 5], moved[i])]
        for i in range(50)
    ]
    assert all(found) and len({place[0] for place in found}) > 10


def test_mixup_mixes_images_and_classes_in_one_proportion():
    batch, labels = torch.eye(8).view(8, 1, 2, 4), torch.arange(8)
    mixed, targets = augment.mixup(batch, labels, 8, 1.0, np.random.default_rng(3))
    assert torch.allclose(mixed.view(8, 8), targets) and torch.allclose(targets.sum(1), torch.ones(8))
    assert 0 < targets[0, 0] < 1 and len({round(float(t[t > 0].max()), 4) for t in targets if (t > 0).sum() == 2}) == 1


def test_boxes_stay_inside():
    rng = np.random.default_rng(0)
    for shape in ((500, 375), (20, 400), (1, 1)):
        for box in (augment.random_box(shape, rng) for _ in range(50)):
            assert 0 <= box[0] < box[2] <= shape[0] + 1e-9 and 0 <= box[1] < box[3] <= shape[1] + 1e-9
    assert augment.middle_box((400, 300), 224) == (68.75, 18.75, 331.25, 281.25)
    assert augment.middle_box((28, 28), 28) == (0, 0, 28, 28)


def test_randaugment_without_torchvision_is_one_line(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(RecipeError, match="randaugment needs torchvision"):
        images.prepared(images.folder(str(folder), "train_folder"), 96, 3, "randaugment")


def test_constants_of_the_model_the_data_set_or_neither(tmp_path):
    assert augment.constants(None, "uoft-cs/cifar10", 3)[0] == [0.4914, 0.4822, 0.4465]
    assert augment.constants(None, "fashion_mnist", 3) == ([0.5] * 3, [0.5] * 3)  # made RGB
    assert augment.constants(None, "mine", 1) == ([0.5], [0.5])
    pytest.importorskip("transformers")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1], "image_std": [0.2]}))
    assert augment.constants(str(tmp_path), "fashion_mnist", 1) == ([0.1], [0.2])


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (96, 3)])
def test_the_saved_processor_does_what_validation_does(tmp_path, size, channels):
    transformers = pytest.importorskip("transformers")
    mean, std = [0.4] * channels, [0.3] * channels
    augment.save_processor(tmp_path, size, mean, std)
    source = images.bundled("test") if channels == 1 else None
    image = source.images[0] if source else picture((10, 8)).resize((320, 256))
    image = image if source else PIL.fromarray(np.array(image))
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path)(
        image if source is None else np.array(image)[None],
        return_tensors="pt",
        **({} if source is None else {"input_data_format": "channels_first"}),
    )["pixel_values"][0]
    wrapped = images.Source([image], np.array([0]), ["a"], "here")
    expected = (images.DecodedImages(wrapped, size, channels)[0, 0][0] / 255 - 0.4) / 0.3
    assert found.shape == expected.shape and float((found - expected).abs().mean()) < (1e-5 if source else 0.1)
