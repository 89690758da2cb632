"""No code from data, no unsafe load, and no file outside the place that was named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sadam_integrations import cli, recipe
from sadam_integrations.cli.recipes import find
from sadam_integrations.recipe import RecipeError

for module in ("jsonargparse", "transformers", "lightning", "datasets"):
    pytest.importorskip(module)

TOY = Path(__file__).parent / "scripts" / "toy.py"
TOUCH = "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [executed]]"
TOUCH_TOO = '!!python/object/apply:os.system ["touch executed"]'


class Code:
    """A pickle that leaves a mark."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to be in; whatever is tried, nothing leaves the mark of code that ran."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    yield tmp_path / "in"
    assert not list(tmp_path.rglob("executed"))


def refused(capsys, *words):
    """What a command says that ends with exit code 2 and one line."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and sum("error: " in line for line in err.splitlines()) == 1 and "Traceback" not in err, err
    return err


# ---------------------------------------------------------------- sadam cp and the names of recipes


@pytest.mark.parametrize("config", ["../bert", "/etc/passwd", "..", "../../x", "bert.yaml", "*"])
def test_cp_copies_no_config_but_the_recipes_own(place, capsys, config):
    assert "is none of bert, bert_glue" in refused(capsys, "cp", "bert", "to", "--config", config)
    assert not os.listdir(place)


@pytest.mark.parametrize(
    "name",
    ["../recipes/bert", "/etc/passwd", "bert/../vit", "./bert", "bert\0", "studies/_study", "_study", "..", "", "*",
     "bert.py", "/no/such.py", "../x.py", "a\0.py", "x" * 300 + ".py", "b\nert", "$(touch executed)", "-"],
)  # fmt: skip
def test_a_recipe_is_a_known_name_or_a_python_file_that_exists(place, capsys, name):
    with pytest.raises((RecipeError, OSError)):
        find(name)
    for verb in (["run"], ["cp"], ["calibrate"]):
        refused(capsys, *verb, name, *(["to"] if verb == ["cp"] else []))
    assert not os.listdir(place)


def test_cp_writes_into_the_place_named_and_over_nothing(place, capsys):
    outside = place.parent / "outside.txt"
    outside.write_text("mine")
    for name, target in (("bert.py", outside), ("bert.yaml", place.parent / "new.txt")):
        (place / name).symlink_to(target)
        assert f"{name} exists: give --overwrite" in refused(capsys, "cp", "bert", ".")
        (place / name).unlink()
    (place / "bert.py").symlink_to(outside)
    assert cli.main(["cp", "bert", ".", "--overwrite"]) == 0
    assert outside.read_text() == "mine" and not (place / "bert.py").is_symlink()  # the link is replaced, not followed
    assert sorted(os.listdir(place)) == ["bert.py", "bert.yaml"]
    (place / "bert.py").unlink()
    (place / "bert.py").mkdir()
    refused(capsys, "cp", "bert", ".", "--overwrite")
    assert sorted(os.listdir(place.parent)) == ["in", "outside.txt"]


@pytest.mark.parametrize("target", ["a\0b", "a\0.py", "x" * 300, "x" * 300 + ".py", "file/in", "file/in.py"])
def test_cp_to_a_place_that_cannot_be(place, capsys, target):
    (place / "file").write_text("")
    refused(capsys, "cp", "bert", target)
    assert os.listdir(place) == ["file"]


def test_the_configs_of_an_oddly_named_recipe_are_its_own(place):
    for name in ("*.py", "*.yaml", "*_own.yaml", "other_secret.yaml"):
        (place / name).write_text("")
    assert [path.name for path in recipe.config_files(place / "*.yaml")] == ["*.yaml", "*_own.yaml"]


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize("tag", [TOUCH, TOUCH_TOO, "!!python/name:os.system", "!!python/module:os", "!Own {a: 1}"])
def test_yaml_is_plain_values(place, capsys, tag):
    for name in ("toy.py", "toy.yaml"):
        (place / name).write_text(TOY.with_suffix(Path(name).suffix).read_text())
    (place / "c.yaml").write_text(f"optimizer_args: {tag}\n")
    assert "c.yaml is not YAML" in refused(capsys, "run", "./toy.py", "--config", "c.yaml")
    for key in ("lr", "optimizer_args", "optimizer_args.beta"):
        refused(capsys, "run", "./toy.py", f"--{key}={tag}", "--seed", "x")
    assert "is not a value" in refused(capsys, "compare", "./toy.py", "--optimizers", f"sadamw:beta={tag}")
    run = place / "runs" / "toy"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.pt").write_text("")
    (run / ".lock").write_text("")
    (run / "config.yaml").write_text(f"lr: {tag}\n")
    assert "config.yaml cannot be read" in refused(capsys, "run", "./toy.py")


def test_a_config_that_grows_without_end_is_named_in_a_line(place, capsys):
    rows = ["- &a0 [x]"] + [f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    (place / "c.yaml").write_text("\n".join(rows))
    assert len(refused(capsys, "run", "bert", "--config", "c.yaml")) < 1000


# ---------------------------------------------------------------- checkpoints, models, data


def test_a_checkpoint_with_code_is_not_resumed_from(place, capsys):
    run = ["run", "vit", "--smoke", "--output_dir", "v"]
    saved = place / "v" / "checkpoints" / "last.ckpt"
    vit = recipe.load(recipe.recipes_folder() / "vit.py")
    config = recipe.parse(vit.Config, run[2:], None, vit.DEFAULT_CONFIG)
    recipe.open_run(config, vit.__file__)
    saved.parent.mkdir()
    torch.save({"state_dict": {}, "callbacks": Code()}, saved)
    with pytest.raises(RecipeError, match=r"last\.ckpt holds code, which is not run: give --overwrite true"):
        vit.run(config)


def test_the_code_of_a_model_is_not_run_nor_asked_for(place, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("it asked"))
    (place / "model").mkdir()
    auto = dict.fromkeys(("AutoConfig", "AutoModelForSequenceClassification"), "own.Model")
    config = {"model_type": "own", "auto_map": auto, "architectures": ["Model"]}
    (place / "model" / "config.json").write_text(json.dumps(config))
    (place / "model" / "own.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    (place / "train.csv").write_text("text,label\n" + "a,0\nb,1\n" * 10)
    data = ["--train_file", "train.csv", "--text_column", "text", "--output_dir", "run"]
    assert "'model' cannot be loaded" in refused(capsys, "run", "bert", "--model", "model", *data)


def test_a_folder_of_data_with_a_script_is_data(place):
    (place / "data").mkdir()
    (place / "data" / "data.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    (place / "data" / "train.csv").write_text("text,label\n" + "a,0\nb,1\n" * 10)
    bert = recipe.load(recipe.recipes_folder() / "bert.py")
    columns = {"text_column": "text", "text_pair_column": None, "label_column": "label"}
    config = SimpleNamespace(dataset=str(place / "data"), subset=None, train_file=None, **columns)
    try:
        bert.read_split(config, None, "train")
    except RecipeError as error:
        assert "cannot be read" in str(error)


def test_formulas_in_a_table_are_texts(place):
    formula = "=HYPERLINK(\"x\")+cmd|' /C touch executed'!A0"
    quoted = formula.replace('"', '""')
    (place / "train.csv").write_text(f'text,label\n"{quoted}",+1+1\n@SUM(1),-1\n')
    bert = recipe.load(recipe.recipes_folder() / "bert.py")
    columns = {"text_column": "text", "text_pair_column": None, "label_column": "label"}
    config = SimpleNamespace(dataset="", subset=None, train_file="train.csv", **columns)
    assert bert.read_split(config, "train.csv", "train")[0] == {"text": formula, "label": "+1+1"}
