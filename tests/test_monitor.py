"""ALRCallback and ALRMonitor: the learning rates in real TensorBoard, CSV and W&B files, the same from both."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import hf_tiny
import pytest
import torch
import yaml
from torch import nn
from transformers import Trainer, TrainerCallback, set_seed
from transformers import trainer as transformers_trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

import sadam_integrations.huggingface as hf
from sadam_integrations import Sadam, SadamW, SAMSGrad, alr, launch, monitor, param_groups
from sadam_integrations.huggingface import ALRCallback

pytest.importorskip("lightning.pytorch")
pytest.importorskip("tensorboard")
import lightning.pytorch as L
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sadam_integrations.lightning import ALRMonitor

PACKAGES = ["lightning.pytorch", *(["pytorch_lightning"] if importlib.util.find_spec("pytorch_lightning") else [])]
both_packages = pytest.mark.parametrize("package", PACKAGES)
SOME = {"alr/min", "alr/q01", "alr/median", "alr/max", "alr/q99_over_q01", "alr/floor_share", "alr/sqrt_v_median"}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def scalars(folder="."):
    """What the event files under a folder hold: of each tag, the value at each step."""
    found = {}
    for path in Path(folder).rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


def ours(values, prefix=""):
    """The monitor's part of them, without a prefix."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(f"{prefix}alr")}


def check(found, expected, steps):
    """Whether the tags in a file are the metrics measured, at these steps and to rounding."""
    assert set(expected) == set(steps) and found.keys() >= SOME
    assert found.keys() == set().union(*(metrics.keys() for metrics in expected.values()))
    for tag, values in found.items():
        assert values == pytest.approx({step: expected[step][tag] for step in steps}, rel=1e-6), tag


# The Trainer


class Probe(TrainerCallback):
    """Measures by itself after every step."""

    def __init__(self, layers=False):
        self.layers, self.seen = layers, {}

    def on_step_end(self, args, state, control, optimizer=None, model=None, **kwargs):
        self.seen[state.global_step] = alr.metrics(optimizer, model, layers=self.layers)

    def at(self, *steps):
        return {step: self.seen[step] for step in steps}


class Another(TrainerCallback):
    """Any callback."""


def train(callbacks=None, folder="hf", **options):
    trainer = hf_tiny.trainer(folder, callbacks=callbacks, **{"optim": "sadamw", "logging_steps": 2, **options})
    trainer.train()
    return trainer


def added(callback):
    def make(probe):
        trainer = hf_tiny.trainer("hf", callbacks=[probe], optim="sadamw", logging_steps=2, report_to="tensorboard")
        trainer.add_callback(callback())
        trainer.train()
        return trainer

    return make


WAYS = {
    "argument": lambda probe: train([probe, ALRCallback()], report_to="tensorboard"),
    "class": lambda probe: train([probe, ALRCallback], report_to="tensorboard"),
    "before others": lambda probe: train([ALRCallback(), probe, Another()], report_to="tensorboard"),
    "behind a reporter of one's own": lambda probe: train([probe, TensorBoardCallback(), Another(), ALRCallback()]),
    "added": added(ALRCallback),
    "added as a class": added(lambda: ALRCallback),
}


@pytest.mark.parametrize("way", WAYS)
def test_trainer_the_numbers_reach_everything_however_the_callback_is_given(way, capsys):
    probe = Probe()
    trainer = WAYS[way](probe)
    expected = probe.at(2, 4, 6, 8)
    check(ours(scalars(), "train/"), expected, [2, 4, 6, 8])

    trainer.save_state()
    for history in (trainer.state.log_history, json.loads(Path("hf/trainer_state.json").read_text())["log_history"]):
        logged = {entry["step"]: ours(entry) for entry in history if "loss" in entry}
        assert logged == expected
        assert not any(ours(entry) for entry in history if "loss" not in entry)
    assert capsys.readouterr().out.count("'alr/median': ") == 4


def test_trainer_evaluations_stay_as_they_are():
    trainer = train([ALRCallback()], report_to="tensorboard", eval_strategy="steps", eval_steps=2)
    kinds = [{"loss", "eval_loss", "train_loss"} & entry.keys() for entry in trainer.state.log_history]
    assert kinds == [{"loss"}, {"eval_loss"}] * 4 + [{"train_loss"}]
    assert all(bool(ours(entry)) == ("loss" in entry) for entry in trainer.state.log_history)
    assert not any("alr" in tag and not tag.startswith("train/alr/") for tag in scalars())
    trainer.evaluate()
    assert not ours(trainer.state.log_history[-1])


def test_trainer_layers_by_name():
    probe = Probe(layers=True)
    train([probe, ALRCallback(layers=True)], report_to="tensorboard")
    found = ours(scalars(), "train/")
    check(found, probe.at(2, 4, 6, 8), [2, 4, 6, 8])
    names = [name for name, _ in hf_tiny.model().named_parameters()]
    layers = {tag for tag in found if tag.startswith("alr_layer/")}
    assert layers == {f"alr_layer/{name}/{key}" for name in names for key in ("median", "q99_over_q01", "floor_share")}


@pytest.mark.parametrize("options", [{"optim": "adamw_torch"}, {"optim": "samsgrad", "gradient_accumulation_steps": 2}])
def test_trainer_other_optimizers(options):
    probe, steps = Probe(), [2, 4] if "gradient_accumulation_steps" in options else [2, 4, 6, 8]
    train([probe, ALRCallback()], report_to="tensorboard", **options)
    check(ours(scalars(), "train/"), probe.at(*steps), steps)


@pytest.mark.parametrize(
    ("every", "logging", "steps"),
    [(4, {"logging_steps": 2}, [4, 8]), (4, {"logging_steps": 0.25}, [4, 8]),
     (2, {"logging_first_step": True}, [2, 4, 6, 8]),
     (None, {"logging_first_step": True, "logging_steps": 4}, [1, 4, 8]),
     (None, {"logging_strategy": "epoch"}, [4, 8])],
)  # fmt: skip
def test_trainer_every_n_steps(every, logging, steps):
    trainer = train([ALRCallback(every_n_steps=every)], **logging)
    assert [entry["step"] for entry in trainer.state.log_history if ours(entry)] == steps


@pytest.mark.parametrize(
    ("logging", "words"),
    [({"logging_steps": 2}, ["every_n_steps=5", "logging_steps=2"]),
     ({"logging_strategy": "epoch"}, ["every_n_steps=5 needs logging_strategy='steps'", "='epoch'"])],
)  # fmt: skip
def test_trainer_refuses_an_interval_that_it_never_logs_at(logging, words):
    trainer = hf_tiny.trainer("hf", callbacks=[ALRCallback(every_n_steps=5, folder=".")], **logging)
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert all(word in str(error.value) for word in words)
    assert trainer.state.global_step == 0 and not Path("alr.jsonl").exists()


@pytest.mark.parametrize("cls", [ALRCallback, ALRMonitor])
@pytest.mark.parametrize("value", [0, -1, 2.0, "10", True])
def test_the_interval_is_a_positive_whole_number(cls, value):
    with pytest.raises(ValueError, match=f"{cls.__name__}: every_n_steps={value!r} is not a positive whole number"):
        cls(every_n_steps=value)


def test_trainer_an_optimizer_without_a_second_moment():
    with pytest.warns(UserWarning, match="ALRCallback logs nothing of this optimizer.*SGD") as caught:
        trainer = train([ALRCallback(folder=".")], optim="sgd")
    assert len([w for w in caught if "ALRCallback" in str(w.message)]) == 1
    assert trainer.state.global_step == 8 and not any(map(ours, trainer.state.log_history))
    assert alr.Record.read(".") == []


def test_trainer_a_resumed_run_leaves_the_record_of_one_that_went_through():
    train([ALRCallback(folder=".")], save_strategy="epoch")
    through = alr.Record.read(".")
    assert [line["step"] for line in through] == [2, 4, 6, 8]
    trainer = hf_tiny.trainer("hf", callbacks=[ALRCallback(folder=".")], optim="sadamw", logging_steps=2)
    trainer.train(resume_from_checkpoint="hf/checkpoint-4")
    assert alr.Record.read(".") == through
    logged = {entry["step"]: entry["alr/median"] for entry in trainer.state.log_history if "loss" in entry}
    assert logged == {line["step"]: line["all"]["median"] for line in through}
    train([ALRCallback(folder=".")], max_steps=2)  # not resumed: a run of its own
    assert [line["step"] for line in alr.Record.read(".")] == [2]


def test_trainer_only_the_main_process_writes():
    callback = ALRCallback(folder=".")
    trainer = train([Another()])
    trainer.state.is_world_process_zero = False
    events = {"optimizer": trainer.optimizer, "model": trainer.model}
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, **events)
    trainer.state.log_history.append({"loss": 1.0, "step": 8})
    callback.on_log(trainer.args, trainer.state, trainer.control, logs=(logs := {"loss": 1.0}), **events)
    assert logs.keys() >= SOME and not Path("alr.jsonl").exists()  # it measures all the same


def test_trainer_the_weights_do_not_notice():
    assert hf_tiny.config().hidden_dropout_prob > 0
    plain, watched = train(), train([ALRCallback(layers=True, folder=".")])
    for p, q in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_one_sample_serves_everything(monkeypatch):
    calls = []
    monkeypatch.setattr(monitor, "sample", lambda *args: calls.append(args) or alr.sample(*args))
    train([ALRCallback(layers=True, folder=".")], logging_steps=4)
    assert len(calls) == 2 and len(alr.Record.read(".")) == 2


def test_a_reload_changes_nothing():
    add_callback = CallbackHandler.add_callback
    importlib.reload(hf)
    assert CallbackHandler.add_callback is add_callback and hf.ALRCallback is ALRCallback


# The launcher

SCRIPT = """
import sys
import hf_tiny
options = {"report_to": "tensorboard", "logging_steps": 2, "optim": "adamw_torch", **eval(sys.argv[2])}
trainer = hf_tiny.trainer(sys.argv[1], **options)
trainer.model_accepts_loss_kwargs = False  # or the Trainer multiplies the loss by the number of processes
for module in trainer.model.modules():
    if type(module).__name__ == "Dropout":
        module.p = 0.0
trainer.train()
trainer.save_state()
"""  # an unmodified script: nothing of this package in it


@pytest.fixture
def script(monkeypatch):
    Path("script.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["launch"])
    monkeypatch.setattr(sys, "path", ["elsewhere", *sys.path])
    monkeypatch.setattr(transformers_trainer, "DEFAULT_CALLBACKS", [*transformers_trainer.DEFAULT_CALLBACKS])
    return "script.py"


@pytest.mark.parametrize("kind", [[], ["-m"]])
def test_launch_monitor_on_an_unmodified_script(script, kind):
    if kind:
        sys.path[0], script = os.getcwd(), "script"
    launch.main(["--monitor", *kind, script, "out", "{}"])
    expected = {entry["step"]: ours(entry) for entry in logged("out")}
    check(ours(scalars("out"), "train/"), expected, [2, 4, 6, 8])


def logged(folder):
    history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_launch_without_it_is_as_before(script):
    launch.main([script, "out", "{}"])
    assert len(logged("out")) == 4 and not any(map(ours, logged("out"))) and not ours(scalars("out"), "train/")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-m", "--monitor", "script"], "--monitor is given alone and once, in front of the script or of -m"),
        (["--monitor", "--monitor", "script.py"], "--monitor is given alone and once, in front of the script or of -m"),
        (["--monitor"], "no script to run"),
        (["--monitor", "--optim", "script.py"], "--optim comes before the script"),
    ],
)
def test_launch_a_wrong_command_line(argv, message, script, capsys):
    with pytest.raises(SystemExit) as stop:
        launch.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_launch_says_how(capsys):
    launch.main(["--help"])
    shown = capsys.readouterr().out
    assert "python -m sadam_integrations.launch --monitor run_glue.py" in shown
    assert "torchrun --nproc-per-node 2 -m -- sadam_integrations.launch --monitor run_glue.py" in shown


@pytest.mark.slow
def test_launch_monitor_under_torchrun_gives_the_numbers_of_one_process(script):
    def run(folder, batch, *launcher, **options):
        options |= {"per_device_train_batch_size": batch, "max_grad_norm": 0}
        command = ["-m", *launcher, "sadam_integrations.launch", "--monitor", script, folder, str(options)]
        tests = str(Path(__file__).parent)
        environment = {**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=200, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        found = ours(scalars(folder), "train/")
        check(found, {entry["step"]: ours(entry) for entry in logged(folder)}, [2, 4, 6, 8])
        return found

    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]  # the -- as in the help
    two, one = run("two", 2, *torchrun, ddp_backend="gloo"), run("one", 4)
    assert two.keys() == one.keys()
    for tag in (
        "alr/q25",
        "alr/median",
        "alr/q75",
        "alr/unseen_share",
        "alr/sqrt_v_max",
    ):  # the ends are rounding noise
        assert two[tag] == pytest.approx(one[tag], rel=1e-3), tag


# Lightning

QUIET = {
    "accelerator": "cpu", "max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "log_every_n_steps": 2,
}  # fmt: skip
STEPS = 4


def net(dropout=0.5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))


def module_class(package="lightning.pytorch", make=lambda net: SadamW(net.parameters()), dropout=0.5, **methods):
    class Lit(importlib.import_module(package).LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net(dropout)

        def training_step(self, batch, batch_idx):
            loss = (self.net(batch) - 3).square().mean()
            self.log("loss", loss)
            return loss

        def train_dataloader(self):
            rows = torch.randn(4 * STEPS, 6, generator=torch.Generator().manual_seed(1))
            return torch.utils.data.DataLoader(rows, batch_size=4)

        def configure_optimizers(self):
            return make(self.net)

    for name, method in methods.items():
        setattr(Lit, name, method)
    return Lit


def probe(package="lightning.pytorch", layers=False):
    """A callback that measures by itself after every step."""

    class Measures(importlib.import_module(package).Callback):
        def __init__(self):
            self.seen = {}

        def on_train_batch_end(self, trainer, pl_module, *args):
            for i, optimizer in enumerate(trainer.optimizers):
                self.seen[i, trainer.global_step] = alr.metrics(optimizer, pl_module, layers=layers)

        def at(self, *steps, index=0):
            return {step: self.seen[index, step] for step in steps}

    return Measures()


def fit(module=None, package="lightning.pytorch", ckpt_path=None, logger=("tensorboard",), **options):
    loggers = importlib.import_module(f"{package}.loggers")
    made = {"tensorboard": loggers.TensorBoardLogger, "csv": loggers.CSVLogger}
    trainer = importlib.import_module(package).Trainer(
        **{**QUIET, **options}, logger=[made[name](".") for name in logger]
    )
    torch.manual_seed(0)
    trainer.fit(module or module_class(package)(), ckpt_path=ckpt_path)
    return trainer


@both_packages
def test_lightning_tensorboard_and_csv(package):
    by_hand = probe(package, layers=True)
    trainer = fit(package=package, logger=("tensorboard", "csv"), callbacks=[ALRMonitor(layers=True), by_hand])
    expected = by_hand.at(2, 4, 6, 8)
    found = scalars()
    check(ours(found), expected, [2, 4, 6, 8])
    assert "alr_layer/net.0.weight/median" in found and "loss" in found
    for logger in trainer.loggers[1:]:
        rows = csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines())
        rows = {int(row["step"]): {k: float(v) for k, v in ours(row).items()} for row in rows if row["alr/median"]}
        assert rows == expected


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"log_every_n_steps": 4}, [4, 8]), ({"log_every_n_steps": 1, "accumulate_grad_batches": 2}, [1, 2, 3, 4]),
     ({"accumulate_grad_batches": 2}, [2, 4])],
)  # fmt: skip
def test_lightning_logs_after_steps_of_the_optimizer(options, steps):
    by_hand = probe()
    fit(callbacks=[ALRMonitor(), by_hand], **options)
    check(ours(scalars()), by_hand.at(*steps), steps)


def test_lightning_every_n_steps():
    fit(callbacks=[ALRMonitor(every_n_steps=4)])
    assert list(scalars()["alr/median"]) == [4, 8]
    with pytest.raises(ValueError, match="every_n_steps=5 is not a multiple of log_every_n_steps=2"):
        fit(callbacks=[ALRMonitor(every_n_steps=5)])


def test_lightning_where_nothing_is_logged(monkeypatch):
    L.Trainer(barebones=True, max_epochs=1, accelerator="cpu").fit(module_class(log=lambda *a: None)())
    monkeypatch.setattr(monitor, "sample", lambda *args: pytest.fail("measured for nobody"))
    L.Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=[ALRMonitor(folder=".", every_n_steps=3)]).fit(
        module_class(log=lambda *a: None)()
    )
    fit(logger=(), callbacks=[ALRMonitor()])


def test_lightning_manual_optimization_of_several_optimizers():
    def configure_optimizers(self):
        return [Sadam(self.net[0].parameters()), torch.optim.SGD(self.net[2].parameters(), lr=0.1),
                torch.optim.Adam(self.net[4].parameters())]  # fmt: skip

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward((self.net(batch) - 3).square().mean())
            optimizer.step()

    module = module_class(configure_optimizers=configure_optimizers, training_step=training_step)()
    module.automatic_optimization = False
    by_hand = probe()
    by_hand.on_train_batch_end = lambda trainer, pl_module, *args: by_hand.seen.update(
        {(i, trainer.global_step): alr.metrics(trainer.optimizers[i], pl_module) for i in (0, 2)}
    )
    with pytest.warns(UserWarning, match="ALRMonitor.*SGD") as caught:
        fit(module, callbacks=[ALRMonitor(folder="."), by_hand])
    assert len([w for w in caught if "ALRMonitor" in str(w.message)]) == 1
    steps = [3, 6, 9, 12, 15, 18, 21, 24]  # three optimizers: each batch passes a multiple of two
    for i in (0, 2):
        found = {tag.replace(f"alr_{i}/", "alr/"): values for tag, values in scalars().items() if f"alr_{i}/" in tag}
        check(found, by_hand.at(*steps, index=i), steps)
    assert not any("alr_1" in tag or tag.startswith("alr/") for tag in scalars())
    assert [line["step"] for line in alr.Record.read(".")] == steps


def test_lightning_an_optimizer_without_a_second_moment():
    with pytest.warns(UserWarning, match="ALRMonitor.*SGD") as caught:
        module = module_class(make=lambda net: torch.optim.SGD(net.parameters(), lr=0.1))()
        trainer = fit(module, callbacks=[ALRMonitor()])
    assert len([w for w in caught if "ALRMonitor" in str(w.message)]) == 1
    assert trainer.global_step == 8 and not ours(scalars()) and "loss" in scalars()


def test_lightning_a_resumed_run_leaves_the_record_of_one_that_went_through():
    def run(epochs, **options):
        return fit(module_class(dropout=0.0)(), max_epochs=epochs, callbacks=[ALRMonitor(folder=".")], **options)

    trainer = run(1)
    trainer.save_checkpoint("epoch.ckpt")
    run(2)
    through = alr.Record.read(".")
    assert [line["step"] for line in through] == [2, 4, 6, 8]
    run(2, ckpt_path="epoch.ckpt")
    assert alr.Record.read(".") == through
    run(1)
    assert [line["step"] for line in alr.Record.read(".")] == [2, 4]


def test_lightning_the_weights_do_not_notice():
    plain = fit(callbacks=[])
    watched = fit(callbacks=[ALRMonitor(layers=True, folder=".")])
    for p, q in zip(plain.lightning_module.parameters(), watched.lightning_module.parameters(), strict=True):
        assert torch.equal(p, q)


@both_packages
def test_lightning_on_the_command_line_by_name(package):
    cli = pytest.importorskip(f"{package}.cli")
    callback = {"class_path": "ALRMonitor", "init_args": {"every_n_steps": 4, "layers": True, "folder": "kept"}}
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "."}}
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": {**QUIET, "logger": logger, "callbacks": [callback]}}))
    run = cli.LightningCLI(module_class(package), args=["fit", "--config=config.yaml"], save_config_callback=None)
    assert run.trainer.global_step == 8
    assert list(scalars()["alr/median"]) == list(scalars()["alr_layer/net.0.bias/median"]) == [4, 8]
    assert [line["step"] for line in alr.Record.read("kept")] == [4, 8]


def test_lightning_the_help_reads_well(capsys, monkeypatch):
    cli = pytest.importorskip("lightning.pytorch.cli")
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        cli.LightningCLI(module_class(), args=["fit", "--trainer.callbacks.help", "ALRMonitor"])
    shown = capsys.readouterr().out
    assert "Logs the adaptive learning rates" in shown and "<class" not in shown
    assert all(f"--trainer.callbacks.{option} " in shown for option in ("layers", "every_n_steps", "folder"))


TWO_PROCESSES = """
import sys
import lightning.pytorch as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_worker import QUIET, Lit, strategy
from sadam_integrations.lightning import ALRMonitor
for kind in ("ddp", "fsdp2"):
    options = {**QUIET, "log_every_n_steps": 2, "logger": TensorBoardLogger(kind)}
    monitor = ALRMonitor(layers=True, folder=kind)
    L.Trainer(**options, strategy=strategy(kind), callbacks=[monitor]).fit(Lit(shard=kind == "fsdp2"))
"""


@pytest.mark.slow
def test_lightning_two_processes_and_a_sharded_model_give_the_numbers_of_one_process():
    from lightning_worker import BATCH, data, fresh

    Path("two.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "two.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

    module, expected = nn.ModuleDict({"net": fresh()}), {}
    optimizer = Sadam(param_groups(module))
    for step in range(1, 9):
        optimizer.zero_grad()
        module["net"](data()[BATCH * ((step - 1) % 4) :][:BATCH]).square().mean().backward()
        optimizer.step()
        if step % 2 == 0:
            expected[step] = alr.metrics(optimizer, module, layers=True)
    for kind in ("ddp", "fsdp2"):
        found = ours(scalars(kind))
        assert found.keys() == expected[2].keys() and len(found) > len(SOME) + 3
        for tag, values in found.items():
            assert values == pytest.approx({s: m[tag] for s, m in expected.items()}, rel=1e-3), (kind, tag)
        assert [line["step"] for line in alr.Record.read(kind)] == [2, 4, 6, 8]  # one process writes


# Both


def batches():
    return torch.utils.data.DataLoader(hf_tiny.Pairs(), batch_size=4)


class InOrder(Trainer):
    def get_train_dataloader(self):
        return batches()


OPTIMIZERS = {
    "sadamw": lambda parameters: SadamW(parameters, lr=1e-3, weight_decay=0.0),
    "samsgrad": lambda parameters: SAMSGrad(parameters, lr=1e-3),
    "adamw_torch": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
}


class SameRun(L.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.model, self.optimizer = hf_tiny.model(), OPTIMIZERS[optimizer]

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_run_puts_the_same_numbers_at_the_same_steps_into_tensorboard(optimizer):
    still = {"lr_scheduler_type": "constant", "max_grad_norm": 0, "logging_steps": 2, "report_to": "tensorboard"}
    trainer = hf_tiny.trainer("hf", InOrder, [ALRCallback(layers=True)], optim=optimizer, **still)
    set_seed(3)  # for the dropout
    trainer.train()

    lightning = L.Trainer(**{**QUIET, "logger": TensorBoardLogger("lit"), "callbacks": [ALRMonitor(layers=True)]})
    module = SameRun(optimizer).train()
    set_seed(3)
    lightning.fit(module, batches())

    one, other = ours(scalars("hf"), "train/"), ours(scalars("lit"))
    other = {tag.replace("alr_layer/model.", "alr_layer/"): values for tag, values in other.items()}
    assert one.keys() >= SOME and one.keys() == other.keys()
    assert list(one["alr/median"]) == [2, 4, 6, 8]
    for tag, values in one.items():
        assert other[tag] == pytest.approx(values, rel=1e-6), tag
    assert len(set(one["alr/median"].values())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["transformers", "lightning"])
def test_wandb_offline(framework, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    for key, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(key, value)
    if framework == "transformers":
        by_hand, prefix = Probe(), "train/"
        train([by_hand, ALRCallback()], report_to="wandb")
    else:
        by_hand, prefix = probe(), ""
        logger = importlib.import_module("lightning.pytorch.loggers").WandbLogger(offline=True, save_dir=tmp_path)
        trainer = L.Trainer(**QUIET, logger=logger, callbacks=[ALRMonitor(), by_hand])
        trainer.fit(module_class()())
    wandb.finish()
    wandb.teardown()  # its own process has written everything
    (path,) = tmp_path.rglob("*.wandb")
    found = {}
    for row in history(path):
        for key, value in ours(row, prefix).items():
            found.setdefault(key, {})[row[f"{prefix}global_step" if prefix else "trainer/global_step"]] = value
    check(found, by_hand.at(2, 4, 6, 8), [2, 4, 6, 8])


def history(path):
    """The rows that an offline run of W&B logged; its file is a header and then LevelDB's record log."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:  # a block's end, too short for the head of a record
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if items := record.history.item:
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
