"""Lightning's command line: by name, in YAML, injected and by callback; and docs/lightning.md, run as it is written."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lightning.pytorch")
pytest.importorskip("jsonargparse")
from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW, lightning, param_groups

CLASSES = [Sadam, SAMSGrad, SadamW, SAMSGradW]
PACKAGES = ["lightning.pytorch", *(["pytorch_lightning"] if importlib.util.find_spec("pytorch_lightning") else [])]
both_packages = pytest.mark.parametrize("package", PACKAGES)
every_class = pytest.mark.parametrize("cls", CLASSES)
# every class, and both packages, but not every pair
turns = pytest.mark.parametrize(
    ("cls", "package"), [(cls, PACKAGES[i % len(PACKAGES)]) for i, cls in enumerate(CLASSES)]
)

QUIET = {
    "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False, "enable_checkpointing": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def module_class(package, injected=False, default=Sadam):
    class Lit(importlib.import_module(package).LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(6, 2)
            self.start = [p.detach().clone() for p in self.parameters()]

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randn(4, 6), batch_size=2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    class Injected(Lit):
        def __init__(self, optimizer: OptimizerCallable = default):
            super().__init__()
            self.optimizer = optimizer

        def configure_optimizers(self):
            return self.optimizer(param_groups(self))

    return Injected if injected else Lit


def cli(package, *args, model=None, injected=False, default=Sadam, before=None):
    """Runs the command line of either package and returns the optimizer it trained with."""
    base = importlib.import_module(f"{package}.cli").LightningCLI

    class Cli(base):
        def add_arguments_to_parser(self, parser):
            if before:
                before(parser)

    run = Cli(
        model or module_class(package, injected, default),
        args=["fit", *map(str, args)],
        trainer_defaults=QUIET,
        auto_configure_optimizers=not injected,
        save_config_callback=None,
    )
    (optimizer,) = run.trainer.optimizers
    assert run.trainer.global_step == 2
    assert not any(map(torch.equal, run.model.start, run.model.parameters()))
    return optimizer


def like(optimizer, cls, **options):
    """Whether an optimizer is exactly what the class makes of these options."""
    return (
        type(optimizer) is cls and optimizer.defaults == cls([torch.zeros(1, requires_grad=True)], **options).defaults
    )


@turns
def test_by_name(cls, package):
    assert like(cli(package, f"--optimizer={cls.__name__}"), cls)
    chosen = cli(package, "--optimizer", cls.__name__, "--optimizer.beta", 50, "--optimizer.lr=0.05")
    assert like(chosen, cls, beta=50.0, lr=0.05)


def test_by_dotted_path_and_with_every_argument():
    arguments = {
        "lr": "0.05", "betas": "[0.8, 0.99]", "beta": "auto", "weight_decay": "0.3", "bias_correction": "inner",
        "maximize": "true", "foreach": "null", "fused": "null", "capturable": "false", "differentiable": "false",
    }  # fmt: skip
    assert arguments.keys() == Sadam([torch.zeros(1, requires_grad=True)]).defaults.keys()
    optimizer = cli(
        PACKAGES[0], "--optimizer=sadam_integrations.SAMSGrad", *(f"--optimizer.{k}={v}" for k, v in arguments.items())
    )
    assert like(optimizer, SAMSGrad, lr=0.05, betas=(0.8, 0.99), weight_decay=0.3, maximize=True)


@both_packages
def test_in_yaml_and_printed(package, capsys):
    Path("config.yaml").write_text("optimizer: {class_path: SAMSGradW, init_args: {lr: 1e-3, beta: 50, foreach: null}}")
    assert like(cli(package, "--config=config.yaml"), SAMSGradW, beta=50.0)
    with pytest.raises(SystemExit) as done:
        cli(package, "--config=config.yaml", "--optimizer.beta=auto", "--print_config")
    assert done.value.code == 0
    printed = capsys.readouterr().out
    printed = printed[re.search(r"^\w+:", printed, re.MULTILINE).start() :]
    assert yaml.safe_load(printed)["optimizer"]["class_path"] == "sadam_integrations.SAMSGradW"
    Path("printed.yaml").write_text(printed)
    assert like(cli(package, "--config=printed.yaml"), SAMSGradW)


def help_text(capsys, monkeypatch, option):
    monkeypatch.setenv("COLUMNS", "10000")  # one line for each argument
    with pytest.raises(SystemExit) as done:
        cli(PACKAGES[0], *option)
    assert done.value.code == 0
    return capsys.readouterr().out


@every_class
def test_the_help_reads_well(cls, capsys, monkeypatch):
    shown = help_text(capsys, monkeypatch, ["--optimizer.help", cls.__name__])
    title = cls.__doc__.partition("\n")[0].removesuffix(".")
    assert title in shown and "<class" not in shown and ":math:" not in shown
    lines = dict(re.findall(r"^ +--optimizer\.(\w+) \S+\s+(.*)$", shown, re.MULTILINE))
    for name, default in cls([torch.zeros(1, requires_grad=True)]).defaults.items():
        text, _, end = lines.pop(name).rpartition("(type: ")
        assert re.match(r"[A-Z].*\. $", text), f"{name}: {text!r}"  # a sentence of the docstring
        assert "default: " + {None: "null"}.get(default, str(default)) in end, f"{name}: {end}"
    assert not lines


def test_the_help_of_use_optimizer_reads_well(capsys, monkeypatch):
    shown = help_text(capsys, monkeypatch, ["--trainer.callbacks.help", "UseOptimizer"])
    assert "Trains a module that is not yours with the given optimizer" in shown and "<class" not in shown
    assert re.search(r"--trainer.callbacks.optimizer OPTIMIZER\s+Builds the optimizer from the parameter groups", shown)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--optimizer=Sadam", "--optimizer.eps=1e-8"], ["optimizer", "eps"]),
        (["--optimizer=Sadam", "--optimizer.beta=fast"], ["beta", "fast", "'auto'"]),
        (["--optimizer=Sadam", "--optimizer.foreach=maybe"], ["foreach", "maybe"]),
        (["--optimizer=Sadma"], ["optimizer", "Sadma", "Expected a dot import path string"]),
        (["--trainer.callbacks=UseOptimizer", "--trainer.callbacks.optimiser=Sadam"], ["callbacks", "optimiser"]),
    ],
    ids=["unknown key", "bad value", "bad flag", "unknown name", "unknown key of the callback"],
)  # fmt: skip
def test_errors_name_the_argument(args, words, capsys):
    with pytest.raises(SystemExit) as done:
        cli(PACKAGES[0], *args)
    assert done.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_a_value_out_of_range_is_the_optimizers_own_error():
    with pytest.raises(ValueError, match=r"Sadam: Invalid beta: -1\.0: beta is at least"):
        cli(PACKAGES[0], "--optimizer=Sadam", "--optimizer.beta=-1")


@turns
def test_injected(cls, package):
    optimizer = cli(
        package, "--model.optimizer.beta=7", "--model.optimizer.weight_decay=0.3", injected=True, default=cls
    )
    assert like(optimizer, cls, beta=7.0, weight_decay=0.3)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    chosen = ["--model.optimizer", cls.__name__, "--model.optimizer.beta=7", "--model.optimizer.weight_decay=0.2"]
    assert like(cli(package, *chosen, injected=True), cls, beta=7.0, weight_decay=0.2)


class Tuned(module_class(PACKAGES[0], injected=True)):
    def __init__(self, optimizer: OptimizerCallable = lambda groups: Sadam(groups, lr=0.05, beta=20.0)):
        super().__init__(optimizer)


def test_injected_with_defaults_of_ones_own_and_what_jsonargparse_hands_on():
    mine = {"injected": True, "model": Tuned}
    assert like(cli(PACKAGES[0], **mine), Sadam, lr=0.05, beta=20.0)
    assert like(cli(PACKAGES[0], "--model.optimizer.lr=0.01", **mine), Sadam, lr=0.01, beta=20.0)
    assert like(cli(PACKAGES[0], "--model.optimizer=SAMSGrad", **mine), SAMSGrad, lr=0.05, beta=20.0)
    # the docs say so: another class keeps the default class's weight decay
    assert like(cli(PACKAGES[0], "--model.optimizer=SadamW", injected=True), SadamW, weight_decay=0.0)


def test_a_fixed_class_and_a_choice_of_classes():
    package = PACKAGES[-1]
    fixed = cli(package, "--optimizer.beta=50", before=lambda parser: parser.add_optimizer_args(SadamW))
    assert like(fixed, SadamW, beta=50.0)
    choice = cli(package, "--optimizer=SAMSGrad", before=lambda parser: parser.add_optimizer_args((Sadam, SAMSGrad)))
    assert like(choice, SAMSGrad)


@turns
def test_use_optimizer(cls, package):
    use = ["--trainer.callbacks", "UseOptimizer", "--trainer.callbacks.optimizer", cls.__name__]
    optimizer = cli(package, *use, "--trainer.callbacks.optimizer.beta", 9)
    assert like(optimizer, cls, beta=9.0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]


@both_packages
def test_use_optimizer_alone_in_yaml_and_in_place_of_the_command_lines_own(package):
    assert like(cli(package, "--trainer.callbacks=UseOptimizer"), SadamW)
    made = {"class_path": "SAMSGrad", "init_args": {"lr": 0.05}}
    callback = {"class_path": "sadam_integrations.lightning.UseOptimizer", "init_args": {"optimizer": made}}
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    assert like(cli(package, "--config=config.yaml"), SAMSGrad, lr=0.05)
    assert like(cli(package, "--config=config.yaml", "--optimizer=AdamW"), SAMSGrad, lr=0.05)


DOC = Path(__file__).parents[1] / "docs" / "lightning.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOC.read_text(), re.MULTILINE | re.DOTALL)


def commands():
    return [line for block in blocks("bash") for line in block.splitlines()]


def files():
    """The blocks that begin with a comment that names a file."""
    named = ((re.match(r"# (\w+\.\w+)\n", block), block) for kind in ("python", "yaml") for block in blocks(kind))
    return {match[1]: block for match, block in named if match}


def test_the_blocks_of_the_page_are_found():
    assert files().keys() == {"main.py", "injected.py", "config.yaml", "monitor.yaml"} and len(commands()) == 11
    assert len(blocks("python")) == 5 and lightning.UseOptimizer.__name__ in DOC.read_text()


@pytest.mark.parametrize("code", [block for block in blocks("python") if block not in files().values()])
def test_the_python_of_the_page_runs(code):
    names = {"__name__": "page"}
    exec(compile(code, str(DOC), "exec"), names)
    if "trainer" in names:
        assert like(names["trainer"].optimizers[0], SadamW, lr=2e-4, weight_decay=0.1)


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_page_run(command, monkeypatch, capsys):
    for name, text in files().items():
        Path(name).write_text(text)
    python, script, *args = shlex.split(command)
    assert python == "python"
    monkeypatch.setattr(sys, "argv", [script, *args])
    trainers, fit = [], Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", functools.wraps(fit)(lambda self, **kw: (trainers.append(self), fit(self, **kw)))
    )
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as done:
        assert done.code == 0 and {"--optimizer.help", "--print_config"} & set(args)
        assert "Sadam" in capsys.readouterr().out
        return
    named = re.findall(r"\b(?:Sadam|SAMSGrad)W?\b", command) or ["Sadam" if script == "injected.py" else "SadamW"]
    (optimizer,) = trainers[0].optimizers
    assert type(optimizer).__name__ == named[-1] and optimizer.state
    for option, value in re.findall(r"optimizer\.(lr|weight_decay|beta) (\S+)", command):
        assert optimizer.defaults[option] == float(value)
