"""Rows: the data that recipes read."""

from __future__ import annotations

from types import SimpleNamespace

from errors import Row
from errors.provoking import bert, recipe, vit
from sadam_integrations import augment, images

GOOD = "text,label\n" + "a,0\nb,1\n" * 10
COLUMNS = ["--text_column", "text", "--label_column", "label", "--output_dir", "run"]


def csv(text, *words, **more):
    """Runs the BERT recipe on a file of one's own."""
    files = {"train.csv": text, **{f"{name}.csv": content for name, content in more.items()}}
    given = [word for name in files for word in (f"--{name.removesuffix('.csv')}_file", name)]
    return bert(*given, *COLUMNS, *words, files=files)


def picture(path, mode="RGB"):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8)).save(path)


def folder(*names, broken=None, classes=None):
    """Reads a folder with images of these names."""

    def provoke(place):
        (place / "photos").mkdir()
        for name in names:
            picture(place / "photos" / name)
        if broken:
            (place / "photos" / broken).write_text("not an image")
        source = images.folder("photos", "train_folder", classes)
        source.hold_out()

    return provoke


def hub(labels, image_column="image", label_column="label", names=None, name="data"):
    """Reads a folder with a parquet file, as the ``datasets`` library does."""

    def provoke(place):
        import datasets
        from PIL import Image

        pictures = [Image.new("RGB", (8, 8))] * len(labels)
        data = datasets.Dataset.from_dict({"image": pictures, "label": labels})
        data = data.cast_column("image", datasets.Image())
        (place / "data").mkdir()
        data.to_parquet(place / "data" / "train.parquet")
        images.hub(name, None, "train", image_column, label_column, names)

    return provoke


def a_class_that_is_new(place):
    import datasets

    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 2]})
    columns = {"text_column": "text", "text_pair_column": None, "label_column": "label"}
    recipe("bert").encode(data, SimpleNamespace(**columns), None, [0, 1])


def a_list_of_labels(place):
    import datasets

    recipe("bert").label_names(datasets.Dataset.from_dict({"label": [[0], [1]]}), "label")


def damaged_image(place):
    import datasets

    data = datasets.Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}]})
    images._Column(data.cast_column("image", datasets.Image()), "image", "data, split train")[0]


def floating_grey(place):
    from PIL import Image

    augment.eight_bits(Image.new("F", (2, 2)))


TEXT = [
    Row(
        "<key>: <file> is none of",
        bert("--train_file", "train.txt", files={"train.txt": GOOD}),
        "The file's ending is none that can be read.",
        "Convert it to one that the message lists.",
    ),
    Row("<key>: there is no file <file>", bert("--train_file", "no.csv"), "The path is wrong.", "Correct it."),
    Row(
        "needs a train_file beside it",
        bert("--test_file", "test.csv", files={"test.csv": GOOD}),
        "Files of your own were given for validation or test, and none to train on.",
        "Give `train_file`.",
    ),
    Row(
        "it does not begin with an object",
        bert("--train_file", "train.json", files={"train.json": "\ufeffnull\n{}\n"}),
        "The file is empty, or its first row is null.",
        "Remove that row.",
    ),
    Row(
        "dataset: <source> cannot be read",
        csv("text,label\n" + "a,0\na,b,c,1\n" * 10),
        "The file is damaged, ragged, or not what its ending says; or the Hub has no such data set or split.",
        "Correct what the message names.",
    ),
    Row(
        "<key>: <source> has no column",
        csv(GOOD, "--text_column", "words"),
        "The key names a column that the data have not.",
        "Take one that the message lists.",
    ),
    Row(
        "examples are too few to hold out",
        csv("text,label\na,0\nb,1\n"),
        "There are fewer than ten examples, and no validation data.",
        "Give more, or a `validation_file`.",
    ),
    Row(
        "label_column: <column> holds",
        csv("text,label\n" + "a,0.5\nb,1.5\n" * 10),
        "The labels are not classes: numbers with a fraction, or some are missing.",
        "Name another column, or fill in what is missing.",
    ),
    Row(
        "<column> holds lists, objects or values of several kinds",
        a_list_of_labels,
        "The column holds something else than numbers or texts, or now the one and now the other.",
        "Name another column, or convert its values to one kind.",
    ),
    Row(
        "label_column: <column> has one class only",
        csv("text,label\n" + "a,0\nb,0\n" * 10),
        "All examples have the same label.",
        "Give examples of two classes or more.",
    ),
    Row(
        "label_column: <…> is none of the training data's classes",
        a_class_that_is_new,
        "The validation or test data have a class that the training data lack, or have no labels (-1).",
        "Name other data; set `test_split: null` where there are no labels.",
    ),
    Row(
        "which is not a text",
        "test_recipe.py::test_data_that_do_not_fit_end_in_one_line",
        "A text is missing, or the column holds numbers.",
        "Name another column, or fill in what is missing.",
    ),
]

IMAGES = [
    Row(
        "<key>: there is no folder <place>",
        vit("--train_folder", "nowhere"),
        "The path is wrong.",
        "Correct it.",
    ),
    Row(
        "<key>: there is no folder <path>",
        lambda place: images.folder("nowhere", "train_folder"),
        "The folder is gone since the config was read.",
        "Correct the path.",
    ),
    Row(
        "needs a train_folder beside it",
        vit("--test_folder", "here", files={"here/x": ""}),
        "Folders were given for validation or test, and none to train on.",
        "Give `train_folder`.",
    ),
    Row(
        "holds no images in sub-folders",
        folder("a.png"),
        "The images are not in a sub-folder for each class.",
        "Move them there.",
    ),
    Row(
        "<path> has one class only",
        folder("ant/a.png"),
        "There is one sub-folder with images.",
        "Add one for each further class.",
    ),
    Row(
        "is none of the training classes",
        folder("ant/a.png", "bee/a.png", classes=["ant", "cat"]),
        "The validation or test folder has a class that the training folder lacks.",
        "Rename or remove the sub-folder.",
    ),
    Row(
        "cannot be read as an image",
        folder("ant/a.png", "bee/a.png", broken="ant/b.jpg"),
        "The file is damaged, not an image, or so large that it may be an attack on the memory.",
        "Remove it, or put it right.",
    ),
    Row(
        "images are too few to hold out",
        folder("ant/a.png", "bee/a.png"),
        "There are fewer than ten images, and no validation data.",
        "Give more, or a `validation_folder`.",
    ),
    Row(
        "convert it to 8 or 16 bits",
        floating_grey,
        "The grey values are floats or of 32 bits, and nothing says which is white.",
        "Convert the image.",
    ),
    Row(
        "has no split",
        vit("--train_split", "all"),
        "The bundled data have no such split.",
        "Take one that the message lists.",
    ),
    Row(
        "dataset: <where> cannot be read",
        lambda place: images.hub("./no/such/folder", None, "train", "image", "label"),
        "There is no such data set or split, or it cannot be reached.",
        "Correct the name; a name of the Hub needs the network once.",
    ),
    Row(
        "<key>: <where> has no column",
        hub([0, 1], image_column="img"),
        "The key names a column that the data have not.",
        "Take one that the message lists.",
    ),
    Row("not images", hub([0, 1], image_column="label"), "The column holds something else.", "Name another."),
    Row(
        "not classes, none missing",
        hub([0.5, 1.5]),
        "The labels are lists, of several kinds or numbers with a fraction, or some are missing.",
        "Name another column, or fill in what is missing.",
    ),
    Row(
        "label_column: <…> in <where> is none",
        hub([0, 2], names=["0", "1"]),
        "The validation or test data have a class that the training data lack, or have no labels (-1).",
        "Name other data; set `test_split: null` where there are no labels.",
    ),
    Row(
        "label_column: <label_column> of <where> has one class",
        hub([1, 1]),
        "All images have the same label.",
        "Give images of two classes or more.",
    ),
    Row(
        "<where>: image <index> cannot be read",
        damaged_image,
        "An image of the data set is damaged.",
        "Remove it from the data set.",
    ),
    Row(
        "randaugment needs torchvision",
        "test_images.py::test_randaugment_without_torchvision_is_one_line",
        "torchvision is not installed, or does not fit this torch.",
        "Install a torchvision that fits, or take another `augment`.",
    ),
]
