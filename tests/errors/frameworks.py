"""Rows: the Trainer and optim_args, Lightning, the monitors, advice, and the launcher."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from errors import Row
from errors.provoking import optim_args, saved, starts, stepped, without, write
from sadam_integrations import alr, launch
from sadam_integrations.conversion import advise


def several_optimizers(place):
    state = stepped(torch.optim.AdamW).state_dict()
    advise(saved("two.ckpt", {"optimizer_states": [state, state]})(place))


def another_monitor(place):
    from sadam_integrations.huggingface import ALRCallback

    ALRCallback(every_n_steps=0)


def cannot_write(place):
    """A folder that became a file while the monitor was at work."""
    from sadam_integrations.huggingface import ALRCallback

    monitor = ALRCallback(folder=place / "run")._monitor
    write(place, {"run": "a file"})
    monitor.measure([stepped(torch.optim.AdamW)], None, 1, True)


def of_another_kind(place):
    class Other(torch.optim.AdamW):
        def __init__(self, params, partial=0.5):
            super().__init__(params)
            self.param_groups[0]["partial"] = partial

    alr.sample(stepped(Other))


def advised(change):
    def provoke(place):
        state = stepped(torch.optim.AdamW).state_dict()
        change(state)
        advise(state)

    return provoke


def cut_short(place):
    file = saved("cut.pt", {})(place)
    file.write_bytes(file.read_bytes()[:100])
    advise(file)


def no_launch(place):
    launch.main([str(Path(__file__))])


OPTIM_ARGS = [
    Row(
        "this is not a string such as",
        optim_args(["beta=50"]),
        "`optim_args` is a list or a number, as a YAML or JSON file may hold it.",
        'Give a string such as `"beta=50, foreach=false"`, or a mapping.',
    ),
    Row(
        "<item> is not of the form key=value.<hint>",
        optim_args("beta"),
        "A part between two commas has no `=`, no key or no value.",
        "Write `key=value`; `betas` is set by `adam_beta1` and `adam_beta2`.",
    ),
    Row(
        "does not belong in optim_args",
        optim_args("lr=0.1"),
        "The key is set by one of the TrainingArguments.",
        "Set the one that the message names.",
    ),
    Row(
        "<source>: <class> has no argument",
        optim_args("betta=50"),
        "The key is misspelt, or another optimizer's.",
        "Take one of those that the message lists.",
    ),
    Row("is given twice", optim_args("beta=50, beta=60"), "A key occurs twice.", "Remove one of the two."),
    Row(
        "<key>=<text> is not valid",
        optim_args("beta=fast"),
        "The value cannot be read as what the class takes.",
        "Give what the message says; other mistakes in a value have the messages of the constructor.",
    ),
    Row(
        "has no effect: <class> has no epsilon",
        "test_huggingface.py::test_adam_epsilon_is_answered",
        "`adam_epsilon` was set, and these optimizers have none.",
        "Leave it out; `beta` sets the floor of the denominator.",
    ),
    Row(
        "the DeepSpeed configuration offloads the optimizer",
        "test_huggingface.py::test_deepspeed_may_not_put_its_own_adam_in_place",
        "With `offload_optimizer`, accelerate replaces any optimizer by DeepSpeed's own Adam.",
        "Add the key that the message names, or remove `offload_optimizer`.",
    ),
    Row(
        "instead of optim=",
        "test_huggingface.py::test_deepspeeds_optimizer_section_may_not_override_optim",
        "A DeepSpeed configuration with an optimizer of its own: `optim` would have no effect.",
        "Remove the section.",
    ),
    Row(
        "sadam_integrations.huggingface needs transformers",
        "test_huggingface.py::test_without_transformers_the_error_names_the_extra",
        "transformers is not installed in this environment.",
        "Install the extra that the message names.",
    ),
]

TIMM = [
    Row(
        "sadam_integrations.timm needs <missing>",
        "test_timm.py::test_without_timm_or_with_an_old_one",
        "timm, or torchvision, which it needs, is not installed in this environment.",
        "Install the extra that the message names, with a torchvision made for your build of torch.",
    ),
    Row(
        "sadam_integrations.timm needs timm 1.0.12",
        "test_timm.py::test_without_timm_or_with_an_old_one",
        "timm is too old to register optimizers with.",
        "Upgrade it.",
    ),
]

LAUNCHER = [
    Row("to run is given", starts(), "Nothing follows the launcher.", "Give the script, or `-m` and a module."),
    Row(
        "is given alone and once, in front of",
        starts("--monitor", "--monitor", "x.py"),
        "`--monitor` or `--timm` occurs twice, with the other, or behind `-m`.",
        "Give one of them, once, first.",
    ),
    Row(
        "comes before the script",
        starts("--optim", "sadamw", "x.py"),
        "An option of the script stands in front of it.",
        "Put the options behind the script's name.",
    ),
    Row(
        "there is no script",
        starts("missing.py"),
        "The path is wrong, seen from the current folder.",
        "Correct it; a module is run with `-m`.",
    ),
    Row(
        "is a folder without a __main__.py",
        starts("."),
        "The path is a folder, and no program.",
        "Name the script in it.",
    ),
    Row(
        "there is no module",
        starts("-m", "nope"),
        "No module of this name is found, or it is a package that is not run by itself.",
        "Fix the name; a script is run without `-m`.",
    ),
    Row(
        "sadam_integrations.launch: <error>",
        without("sadam_integrations.huggingface", no_launch),
        "transformers is not installed, or fails while it is imported: the rest of the message says how.",
        "Install `sadam-integrations[transformers]`.",
    ),
]

LIGHTNING = [
    Row(
        "without calling configure_optimizers",
        "test_lightning.py::test_use_optimizer_refuses_a_deepspeed_configuration_with_an_optimizer_of_its_own",
        "A DeepSpeed configuration with an optimizer of its own.",
        "Remove the section.",
    ),
    Row(
        "returns <…> optimizers",
        "test_lightning.py::test_use_optimizer_refuses_a_module_with_several",
        "`UseOptimizer` gives all parameters to one optimizer, and the module has several.",
        "Override `configure_optimizers` in a subclass.",
    ),
    Row(
        "UseOptimizer: the learning-rate scheduler",
        "test_lightning.py::test_use_optimizer_says_that_it_drops_a_scheduler",
        "The module's scheduler belongs to the optimizer that is replaced.",
        "Override `configure_optimizers` in a subclass, with a scheduler for the new one.",
    ),
    Row(
        "sadam_integrations.lightning needs Lightning",
        "test_lightning.py::test_without_lightning_the_error_names_the_extra",
        "Lightning is not installed in this environment.",
        "Install the extra that the message names.",
    ),
]

MONITOR = [
    Row(
        "is not a positive whole number, nor None",
        another_monitor,
        "`every_n_steps` is 0, negative or not a whole number.",
        "Give 1 or more, or leave it out.",
    ),
    Row(
        "is not a multiple of <source>",
        "test_monitor.py::test_lightning_every_n_steps",
        "The monitor would measure at steps that the framework does not log.",
        "Give a multiple of the logging interval, or leave it out.",
    ),
    Row(
        "needs logging_strategy='steps'",
        "test_monitor.py::test_trainer_refuses_an_interval_that_it_never_logs_at",
        "The Trainer logs once an epoch, and the monitor was to measure at steps.",
        "Set `logging_strategy`, or leave `every_n_steps` out.",
    ),
    Row(
        "writes no more of its record",
        cannot_write,
        "The record of the run, `alr.jsonl`, cannot be written: a full disk, a folder that is gone.",
        "The training goes on; make room, and start it again if you want the record.",
    ),
    Row(
        "logs nothing of this optimizer",
        "test_monitor.py::test_trainer_an_optimizer_without_a_second_moment",
        "The optimizer has no adaptive learning rate: see the next two messages.",
        "None is needed; to measure, train with an optimizer of Adam's kind.",
    ),
    Row(
        "keeps no second moment (exp_avg_sq)",
        lambda place: alr.sample(stepped(torch.optim.SGD)),
        "SGD, Adafactor and the like have no second moment.",
        "Measure an optimizer of Adam's kind.",
    ),
    Row(
        "the denominator of its step is not Adam's",
        of_another_kind,
        "The optimizer has an argument that changes the denominator in a way that is not known here.",
        "Measure without it.",
    ),
    Row(
        "is not JSON: delete the line",
        "test_alr.py::test_the_record",
        "A line of `alr.jsonl` is damaged.",
        "Delete the line, or the file.",
    ),
]

ADVICE = [
    Row(
        "is neither an optimizer nor its state dict",
        lambda place: advise(3),
        "`advise` got something else.",
        "Give the optimizer, its `state_dict()`, or the path of a checkpoint.",
    ),
    Row(
        "advise: beta=<…> is not a positive number",
        lambda place: advise(stepped(torch.optim.AdamW), betas=[-1.0]),
        "One of `betas` is no sharpness.",
        "Give positive numbers.",
    ),
    Row(
        "was not looked at",
        "test_calibrate.py::test_it_prints_a_table",
        "`row` was asked for a beta that the advice has not.",
        "Give it to `advise(..., betas=[...])`.",
    ),
    Row(
        "the optimizer has no state yet",
        lambda place: advise(torch.optim.AdamW([torch.zeros(3, requires_grad=True)])),
        "No step was taken.",
        "Train a few steps first.",
    ),
    Row(
        "no coordinate has a gradient",
        lambda place: advise(stepped(torch.optim.AdamW, gradient=0.0)),
        "All gradients were zero, or not numbers.",
        "Train a few steps; look for what makes them so.",
    ),
    Row(
        "advice needs the moments of Adam",
        advised(lambda state: state["state"][0].pop("exp_avg_sq")),
        "The state is another optimizer's, such as SGD's.",
        "Give one of Adam, AdamW or this package's.",
    ),
    Row(
        "this is no state of Adam's kind",
        advised(lambda state: state["param_groups"][0].pop("betas")),
        "A group of the state dict lacks what Adam's have.",
        "Give the state dict as the optimizer made it.",
    ),
    Row(
        "is not a count of steps: train a few first",
        advised(lambda state: state["state"][0].update(step=torch.tensor(0.0))),
        "A parameter's count of steps is 0 or damaged.",
        "Train a few steps, or take an older checkpoint.",
    ),
    Row(
        "the two moments have",
        advised(lambda state: state["state"][0].update(exp_avg=torch.zeros(7))),
        "The moments of a parameter do not fit each other.",
        "Take an older checkpoint.",
    ),
    Row(
        "there is no file <…>",
        lambda place: advise("none.pt"),
        "The path is wrong, seen from the current folder.",
        "Correct it.",
    ),
    Row(
        "the folder holds no",
        lambda place: advise(place),
        "The folder is no checkpoint of the Trainer.",
        "Give the file itself.",
    ),
    Row(
        "not a file that torch.save made",
        cut_short,
        "The file is something else, or was cut short.",
        "Take an older checkpoint.",
    ),
    Row(
        "which only running its code would make",
        lambda place: advise(saved("code.pt", {"x": pickle.Pickler})(place)),
        "The file holds more than tensors and plain values. It could run any code, so it is not loaded.",
        "If you trust it, load it yourself and give `advise` the optimizer's state dict in it.",
    ),
    Row(
        "it holds <…> optimizers",
        several_optimizers,
        "A checkpoint of Lightning has the states of several optimizers.",
        "Load it, and give `advise` one of `optimizer_states`.",
    ),
    Row(
        "no optimizer's state dict",
        lambda place: advise({"model": 1}),
        "The file holds weights alone, or something else.",
        "Give the file with the optimizer's state: `optimizer.pt` of the Trainer, a `.ckpt` of Lightning.",
    ),
]
