"""Whatever is fed to the parsers: a valid value, or the documented error in one line, and no file is written."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import string
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sadam_integrations import SadamW, cli, images, launch, recipe
from sadam_integrations.cli import compare
from sadam_integrations.conversion import advise
from sadam_integrations.recipe import RecipeError

for module in ("jsonargparse", "transformers", "datasets", "PIL"):
    pytest.importorskip(module)

STUB = """
from dataclasses import dataclass
from pathlib import Path
from sadam_integrations import recipe
DEFAULT_CONFIG = Path(__file__).with_suffix(".yaml")
@dataclass
class Config:
    output_dir: str
    overwrite: bool
    smoke: bool
    optimizer: str
    optimizer_args: dict
    lr: float
    seed: int
    size: int | None
    weight_decay: float
    layer_lr_decay: float
    max_grad_norm: float
    warmup_ratio: float
    def __post_init__(self):
        recipe.check(self)
def run(config): pass
def main(argv=None): return recipe.main(Config, run, argv, __doc__, DEFAULT_CONFIG)
"""
STUB_YAML = "output_dir: runs/stub\noverwrite: false\nsmoke: false\noptimizer: sadamw\noptimizer_args: {}\n"
STUB_YAML += "lr: 1e-3\nseed: 0\nsize: null\nweight_decay: 0\nlayer_lr_decay: 1\n"
STUB_YAML += "max_grad_norm: 1\nwarmup_ratio: 0\n"

KEYS = [
    "lr",
    "seed",
    "size",
    "smoke",
    "overwrite",
    "optimizer",
    "optimizer_args",
    "optimizer_args.beta",
    "config",
    "help",
    "1",
]
ODD = ["", " ", "null", "true", "nan", "inf", "-1", "1e400", "0x10", "1_000", "{}", "[1", "{a: 1}", "!!python/none"]
ODD += ["a\0b", "&a [*a]", "*a", "~", "~nobody/x", "x" * 300, "a\nb", "=", "--", "-", "\ud800", "٣", "2020-01-01", "@"]

plain = st.text(string.printable + "äß→\0\u2028", max_size=20)
value = st.one_of(st.sampled_from(ODD), plain, st.floats().map(repr), st.integers().map(str))
leaf = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), plain)
tree = st.recursive(leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3))
tried: dict[str, int] = {}


@pytest.fixture(params=[1, pytest.param(20, marks=pytest.mark.slow)], ids=["few", "many"])
def fuzz(request, tmp_path, monkeypatch, record_property):
    """Runs a check on inputs, in an empty folder that is to stay so; the count goes into the report."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("sys.path", list(os.sys.path))
    count = 0

    def run(strategy, check, examples):
        quiet = list(HealthCheck)

        @settings(max_examples=examples * request.param, deadline=None, database=None, suppress_health_check=quiet)
        @given(strategy)
        def one(data):
            nonlocal count
            count += 1
            check(data)
            left = os.listdir()
            assert not left, left

        one()

    yield run
    record_property("inputs", count)
    if where := os.environ.get("FUZZ_COUNTS"):
        with open(where, "a") as file:
            print(request.node.name, count, file=file)


def one_line(message):
    assert message and not re.search(r"[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", str(message)), message


# ---------------------------------------------------------------- optim_args


item = st.tuples(st.sampled_from(["beta", "foreach", "bias_correction", "lr", "betas", "eps", "fused", "Beta"]), value)
items = st.lists(item.map("=".join) | plain, max_size=4).map(",".join)


def test_optim_args(fuzz):
    from sadam_integrations.huggingface._optim_args import optimizer_kwargs

    def check(optim_args):
        numbers = {"learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.0}
        try:
            found = optimizer_kwargs("sadamw", SadamW, SimpleNamespace(optim_args=optim_args, **numbers))
        except ValueError as error:
            one_line(error)
        else:
            SadamW([torch.nn.Parameter(torch.ones(2))], **{**found, "fused": None})

    fuzz(st.one_of(items, plain, tree, st.dictionaries(st.sampled_from(["beta", "foreach"]), leaf)), check, 200)


# ---------------------------------------------------------------- recipes and the command


@pytest.fixture
def stub(tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "stub.yaml").write_text(STUB_YAML)
    return tmp_path / "stub.py"


def parsed(module, words):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = recipe.parse(module.Config, words, None, module.DEFAULT_CONFIG)
    except RecipeError as error:
        one_line(error)
    except SystemExit as stop:
        assert stop.code == 0 and any(word.split("=")[0] in ("-h", "--help") for word in words), words
    else:
        assert math.isfinite(config.lr) or config.lr == math.inf
        assert isinstance(config.seed, int) and type(config.smoke) is bool and config.optimizer


word = st.tuples(st.sampled_from(KEYS), value).map(lambda pair: f"--{pair[0]}={pair[1]}")
word |= st.sampled_from(KEYS).map(lambda key: f"--{key}") | value


def test_overrides(fuzz, stub):
    module = recipe.load(stub)
    fuzz(st.lists(word, max_size=4), lambda words: parsed(module, words), 100)


line = st.tuples(st.sampled_from(KEYS), value).map(": ".join)
config_text = st.one_of(
    plain, st.lists(line, max_size=4).map("\n".join), tree.map(yaml.safe_dump),
    st.dictionaries(st.sampled_from(KEYS), tree, max_size=3).map(yaml.safe_dump),
).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=40)  # fmt: skip


def test_yaml(fuzz, stub):
    module, file = recipe.load(stub), stub.with_name("config.yaml")

    def check(content):
        file.write_bytes(content)
        parsed(module, ["--config", str(file)])

    fuzz(config_text, check, 100)


VERBS = ["ls", "run", "compare", "calibrate", "env", "rnu", "-V"]
OPTIONS = ["--nproc", "--optimizers", "--lrs", "--seeds", "--steps", "--beta", "--help", "--smoke", "--output_dir"]


def test_command_line(fuzz, stub, monkeypatch):
    monkeypatch.setattr(compare, "execute", lambda runs: None)
    monkeypatch.setattr(cli.run, "torchrun", lambda processes, words: 0)
    for module in (cli.compare, cli.calibrate):
        monkeypatch.setattr(module, "planned", refuse(module.planned))

    def check(words):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.main(words)
            except SystemExit as stop:
                code = stop.code
        errors = [text for text in err.getvalue().split("\n") if "error: " in text]
        assert code in (0, None) or (code == 2 and len(errors) == 1), (code, err.getvalue())
        assert "Traceback" not in err.getvalue()

    what = st.sampled_from([str(stub), "bret", "./none.py", str(stub.parent), ""]) | value
    words = st.lists(word | st.sampled_from(OPTIONS) | value, max_size=4)
    fuzz(st.tuples(st.sampled_from(VERBS) | value, what, words).map(lambda t: [t[0], t[1], *t[2]]), check, 100)


def refuse(planned):
    """Plans, and goes no further: what would be run is not at issue."""

    def plan(*arguments):
        planned(*arguments)
        raise RecipeError("planned, and that is all")

    return plan


def test_launcher(fuzz, monkeypatch):
    for name in ("run_path", "run_module"):
        monkeypatch.setattr(launch.runpy, name, lambda *arguments, **more: None)
    monkeypatch.setattr("sys.argv", ["launch"])

    def check(words):
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            try:
                launch.main(words)
            except SystemExit as stop:
                assert stop.code == 2 and err.getvalue().count("error: ") == 1

    fuzz(st.lists(st.sampled_from(["-m", "x.py", "--optim", "-h", "--", "a.b", "."]) | value, max_size=4), check, 100)


# ---------------------------------------------------------------- files


cell = st.sampled_from(["0", "1", "a", '"', "=1+1", "", "é", "\0", "1.5", "null", ","]) | plain
table = st.lists(st.lists(cell, min_size=2, max_size=3).map(",".join), max_size=14).map(
    lambda rows: ("text,label\n" + "\n".join(rows)).encode()
)
objects = st.lists(st.fixed_dictionaries({"text": leaf, "label": leaf}) | tree, max_size=14).map(
    lambda rows: "\n".join(map(json.dumps, rows)).encode()
)
data_file = st.one_of(
    st.tuples(st.just("csv"), table | st.binary(max_size=60)),
    st.tuples(
        st.just("json"),
        objects
        | objects.map(lambda rows: b"\xef\xbb\xbf" + rows)
        | st.binary(max_size=60)
        | tree.map(lambda x: json.dumps(x).encode()),
    ),
    st.tuples(st.just("parquet"), st.binary(max_size=60)),
)


def test_texts(fuzz, tmp_path, monkeypatch):
    import datasets

    bert = recipe.load(recipe.recipes_folder() / "bert.py")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    columns = {"text_column": "text", "text_pair_column": None, "label_column": "label"}

    def check(given):
        file = tmp_path / f"train.{given[0]}"
        file.write_bytes(given[1])
        try:
            config = SimpleNamespace(dataset="", train_file=str(file), validation_file=None, **columns)
            names = bert.label_names(bert.read_split(config, str(file), "train"), "label")
        except RecipeError as error:
            one_line(error)
        else:
            assert len(names) > 1

    fuzz(data_file, check, 8)


def pictures():
    """Whole images of several kinds."""
    from PIL import Image

    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (9, 7), (200, 30, 5)).save(file, kind)
        yield file.getvalue()


def spoilt(whole):
    """An image with some bytes changed, and its end cut off."""
    change = st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255))

    def spoil(changes, length):
        data = bytearray(whole)
        for place, byte in changes:
            data[place] = byte
        return bytes(data[:length])

    return st.builds(spoil, st.lists(change, max_size=4), st.integers(0, len(whole)))


def test_images(fuzz, tmp_path):
    classes = tmp_path / "images"
    for name in ("ant", "bee"):
        (classes / name).mkdir(parents=True)
    file = classes / "ant" / "a.png"
    (classes / "bee" / "b.png").write_bytes(next(pictures()))

    def check(content):
        file.write_bytes(content)
        try:
            source = images.folder(str(classes), "train_folder")
            source.images[0], source.channels()
        except RecipeError as error:
            one_line(error)

    fuzz(st.one_of(st.binary(max_size=60), *map(spoilt, pictures())), check, 200)


def test_checkpoints(fuzz, tmp_path):
    p = torch.nn.Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([p])
    p.grad = torch.ones(3)
    adamw.step()
    file = tmp_path / "optimizer.pt"
    torch.save(adamw.state_dict(), file)
    whole = file.read_bytes()

    def check(content):
        file.write_bytes(content)
        try:
            advise(file)
        except ValueError as error:
            one_line(error)

    fuzz(spoilt(whole), check, 60)
