"""The four names in the Hugging Face Trainer: each way to give one, optim_args, saving and resuming."""

import copy
import dataclasses
import importlib
import json
import logging
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import hf_tiny
import pytest
import torch
import yaml
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from hf_tiny import NAMES
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed
from transformers.training_args import OptimizerNames

import sadam_integrations.huggingface as hf
from sadam_integrations.factory import OPTIMIZERS


def looked_up(folder, **kwargs):
    return Trainer.get_optimizer_cls_and_kwargs(hf_tiny.arguments(folder, **kwargs))


@pytest.fixture
def messages(caplog, monkeypatch):
    """What transformers' loggers print; they propagate only where the environment says CI."""
    logger = logging.getLogger("transformers")
    level = logger.level
    monkeypatch.setattr(logger, "propagate", False)
    logger.setLevel(logging.WARNING)  # a recipe run by an earlier test has put it higher
    logger.addHandler(caplog.handler)
    yield lambda: [r.getMessage() for r in caplog.records if r.name == "transformers.sadam_integrations"]
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


# The names


@pytest.mark.parametrize("name", NAMES)
def test_the_names_are_members_of_the_enum(name):
    member = OptimizerNames(name)
    assert member is OptimizerNames[name.upper()] is getattr(OptimizerNames, name.upper())
    assert isinstance(member, OptimizerNames) and member == name and member.value == name
    assert member in list(OptimizerNames) and member in OptimizerNames and len({member, name}) == 1
    assert repr(member) == f"<OptimizerNames.{name.upper()}: '{name}'>" and member.name == name.upper()
    assert hf.load_name(name) is member
    assert copy.copy(member) is copy.deepcopy(member) is member
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
        assert pickle._loads(pickle._dumps(member, protocol)) is member
    with pytest.raises(AttributeError, match="reassign"):
        setattr(OptimizerNames, name.upper(), "other")


def test_a_second_import_and_a_reload_change_nothing():
    members, look_up = list(OptimizerNames), Trainer.get_optimizer_cls_and_kwargs
    importlib.reload(hf)
    assert [a is b for a, b in zip(members, OptimizerNames, strict=True)] == [True] * len(members)
    assert Trainer.get_optimizer_cls_and_kwargs is look_up
    assert pickle.loads(pickle.dumps(OptimizerNames("sadam"))) is OptimizerNames("sadam")


def test_an_unknown_name_is_answered_with_ours_among_the_valid_ones(tmp_path):
    with pytest.raises(ValueError, match=r"sadamm.*'sadam', 'samsgrad', 'sadamw', 'samsgradw'"):
        hf_tiny.arguments(tmp_path, optim="sadamm")


def test_the_command_line(tmp_path, capsys):
    parser = HfArgumentParser(TrainingArguments)
    common = ["--output_dir", str(tmp_path)]
    (args,) = parser.parse_args_into_dataclasses([*common, "--optim", "samsgradw", "--optim_args", "beta=50"])
    assert args.optim is OptimizerNames("samsgradw")
    assert Trainer.get_optimizer_cls_and_kwargs(args)[1]["beta"] == 50.0
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses([*common, "--optim", "sadamm"])
    assert "samsgradw" in capsys.readouterr().err


def test_json_yaml_and_a_mapping(tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    given = {"output_dir": str(tmp_path), "optim": "sadamw", "optim_args": {"beta": 50, "foreach": False}}
    (tmp_path / "a.json").write_text(json.dumps(given))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(given))
    for (args,) in (
        parser.parse_json_file(str(tmp_path / "a.json")),
        parser.parse_yaml_file(str(tmp_path / "a.yaml")),
        parser.parse_dict(given),
    ):
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        assert cls is OPTIMIZERS["sadamw"]
        assert kwargs == {"lr": args.learning_rate, "betas": (0.9, 0.999), "beta": 50.0, "foreach": False}


def test_set_optimizer_replace_deepcopy_and_the_dictionaries(tmp_path):
    first = hf_tiny.arguments(tmp_path).set_optimizer("sadam", learning_rate=0.1, beta1=0.8, args="beta=7")
    for args in (first, dataclasses.replace(first), copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert args.optim is OptimizerNames("sadam")
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        assert cls is OPTIMIZERS["sadam"] and kwargs == {"lr": 0.1, "betas": (0.8, 0.999), "beta": 7.0}
    assert args.to_dict()["optim"] == json.loads(args.to_json_string())["optim"] == "sadam"
    assert str(args.to_sanitized_dict()["optim"]) == "sadam"
    assert TrainingArguments(**json.loads(args.to_json_string())).optim is args.optim


def test_subclasses_of_training_arguments(tmp_path):
    classes = [Seq2SeqTrainingArguments]
    classes.append(pytest.importorskip("trl").SFTConfig)
    classes.append(pytest.importorskip("sentence_transformers").SentenceTransformerTrainingArguments)
    for cls in classes:
        parsed = HfArgumentParser(cls).parse_args(["--output_dir", str(tmp_path), "--optim", "samsgrad"])
        args = cls(str(tmp_path), optim=parsed.optim, use_cpu=True, bf16=False)
        assert Trainer.get_optimizer_cls_and_kwargs(args)[0] is OPTIMIZERS["samsgrad"]


def test_other_names_are_left_to_the_trainer(tmp_path):
    cls, kwargs = looked_up(tmp_path, optim="adamw_torch", adam_epsilon=1e-6)
    assert cls is torch.optim.AdamW and kwargs["eps"] == 1e-6
    with pytest.raises(ValueError, match="unpack"):
        looked_up(tmp_path, optim="adamw_torch", optim_args="fused")


IN_A_FRESH_PROCESS = """
import sys
from transformers import HfArgumentParser, Trainer, TrainingArguments
import torch
try:
    TrainingArguments("out", optim="sadamw")
except ValueError:
    pass
else:
    raise AssertionError("registered without an import")
args = torch.load(sys.argv[1], weights_only=False)
import sadam_integrations.huggingface
import sadam_integrations.huggingface as again
assert args.optim is again.load_name("sadamw") is TrainingArguments("out", optim="sadamw").optim
assert Trainer.get_optimizer_cls_and_kwargs(args)[0].__name__ == "SadamW"
HfArgumentParser(TrainingArguments).parse_args(["--output_dir", "out", "--optim", "samsgrad"])

class Sub(Trainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

assert Sub.get_optimizer_cls_and_kwargs(args)[0].__name__ == "SadamW"
print("fine")
"""


def run_python(*arguments, **kwargs):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **kwargs)


def test_training_args_bin_in_a_process_that_knows_the_trainer_only(tmp_path):
    torch.save(hf_tiny.arguments(tmp_path, optim="sadamw"), tmp_path / "training_args.bin")
    done = run_python("-c", IN_A_FRESH_PROCESS, tmp_path / "training_args.bin", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "fine\n", done.stderr


def test_without_transformers_the_error_names_the_extra(tmp_path):
    (tmp_path / "script.py").write_text("")
    blocked = "import sys; sys.modules['transformers'] = None\n"
    done = run_python("-c", blocked + "import sadam_integrations.huggingface")
    assert "ImportError: sadam_integrations.huggingface needs transformers" in done.stderr
    assert 'pip install "sadam-integrations[transformers]"' in done.stderr
    launch = "from sadam_integrations.launch import main; main(sys.argv[1:])"
    done = run_python("-c", blocked + launch, tmp_path / "script.py")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert 'pip install "sadam-integrations[transformers]"' in done.stderr


# optim_args


@pytest.mark.parametrize(
    ("optim_args", "expected"),
    [
        (None, {}),
        ("", {}),
        ("beta=50,foreach=false,bias_correction=outer", {"beta": 50.0, "foreach": False, "bias_correction": "outer"}),
        (" beta = 1e4 , maximize = True , ", {"beta": 1e4, "maximize": True}),
        ("beta=auto", {"beta": "auto"}),
        ("foreach=none, capturable=FALSE", {"foreach": None, "capturable": False}),
        ("foreach=true", {"foreach": True}),
        ({"beta": 50, "foreach": None}, {"beta": 50.0, "foreach": None}),
        ({"beta": 1, "bias_correction": "none"}, {"beta": 1.0, "bias_correction": "none"}),
        ({"beta": "50", "maximize": "false"}, {"beta": 50.0, "maximize": False}),
        ({}, {}),
    ],
)  # fmt: skip
def test_optim_args(optim_args, expected, tmp_path):
    cls, kwargs = looked_up(tmp_path, optim="sadamw", optim_args=optim_args, adam_beta2=0.95, weight_decay=0.1)
    assert cls is OPTIMIZERS["sadamw"]
    assert kwargs == {"lr": 1e-3, "betas": (0.9, 0.95), **expected}
    assert all(type(kwargs[key]) is type(value) for key, value in expected.items())
    cls([torch.nn.Parameter(torch.ones(2))], **kwargs)


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("bta=50", r"optim_args='bta=50': SadamW has no argument 'bta', did you mean 'beta'\? Valid .* beta=a number"),
        ({"momentum": 0.9}, "no argument 'momentum'.*bias_correction=inner or outer or none"),
        ("beta", "'beta' is not of the form key=value.*foreach=true or false or none"),
        ("beta=", "'beta=' is not of the form key=value"),
        ("=50", "'=50' is not of the form key=value"),
        ("betas=(0.9,0.95)", "betas is set by adam_beta1 and adam_beta2"),
        ("betas=0.9", "betas does not belong in optim_args: adam_beta1 and adam_beta2"),
        ("lr=1e-3", "lr does not belong in optim_args: learning_rate"),
        ("weight_decay=0.1", "weight_decay does not belong in optim_args: weight_decay of the TrainingArguments"),
        ("eps=1e-8", "eps does not belong in optim_args: there is no epsilon"),
        ("params=1", "params does not belong in optim_args"),
        ("beta=fifty", "beta=fifty is not valid: beta is a number or auto"),
        ({"beta": [0.9, 0.95]}, r"beta=\[0.9, 0.95\] is not valid"),
        ({"beta": True}, "beta=True is not valid: beta is a number or auto"),
        ("foreach=1", "foreach=1 is not valid: foreach is true or false or none"),
        ("maximize=none", "maximize=none is not valid: maximize is true or false"),
        ("bias_correction=middle", "bias_correction is inner or outer or none"),
        ("beta=-1", "optim_args='beta=-1': Invalid beta: -1"),
        ("beta=nan", "optim_args='beta=nan': Invalid beta: nan"),
        ("beta=auto,bias_correction=outer", "bias_correction=outer': beta=\"auto\" .* needs bias_correction=\"inner\""),
        ("beta=5,beta=6", "beta is given twice"),
        (["beta=5"], "not a string such as"),
    ],
)  # fmt: skip
def test_optim_args_that_are_wrong(optim_args, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        looked_up(tmp_path, optim="sadamw", optim_args=optim_args)


def test_one_line_says_what_was_built(tmp_path, messages):
    trainer = hf_tiny.trainer(tmp_path, optim="sadamw", optim_args="beta=50", log_level="info")
    trainer.create_optimizer()
    (line,) = messages()
    assert 'optim="sadamw" is SadamW(lr=0.001, betas=(0.9, 0.999), beta=50.0, weight_decay=0.0)' in line
    assert "sadam and sadamw are the same until weight_decay is set" in line
    looked_up(tmp_path, optim="samsgradw", weight_decay=0.1)
    built = "SAMSGradW(lr=0.001, betas=(0.9, 0.999), beta='auto', weight_decay=0.1)"
    assert messages()[1:] == [f'optim="samsgradw" is {built}']


def test_adam_epsilon_is_answered(tmp_path, messages):
    looked_up(tmp_path, optim="sadam")
    assert not messages()
    _, kwargs = looked_up(tmp_path, optim="sadam", adam_epsilon=1e-6)
    (line,) = messages()
    assert "adam_epsilon=1e-06 has no effect: Sadam has no epsilon" in line and "eps" not in kwargs


OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


def test_deepspeed_may_not_put_its_own_adam_in_place(tmp_path):
    args = hf_tiny.arguments(tmp_path, optim="sadam")
    message = 'DeepSpeedCPUAdam instead of Sadam: add "zero_force_ds_cpu_optimizer": false'
    args.hf_deepspeed_config = HfDeepSpeedConfig(OFFLOAD)
    with pytest.raises(ValueError, match=message):
        Trainer.get_optimizer_cls_and_kwargs(args)
    for harmless in (
        {**OFFLOAD, "zero_force_ds_cpu_optimizer": False},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"stage": 2}},
    ):
        args.hf_deepspeed_config = HfDeepSpeedConfig(harmless)
        assert Trainer.get_optimizer_cls_and_kwargs(args)[0] is OPTIMIZERS["sadam"]
    args.hf_deepspeed_config = None  # accelerate launch brings a plugin instead
    args.deepspeed_plugin = SimpleNamespace(hf_ds_config=HfDeepSpeedConfig(OFFLOAD))
    with pytest.raises(ValueError, match=message):
        Trainer.get_optimizer_cls_and_kwargs(args)


def test_deepspeeds_optimizer_section_may_not_override_optim(tmp_path):
    section = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "zero_optimization": {"stage": 2}}
    for optim, attribute, value in (
        ("sadamw", "hf_deepspeed_config", HfDeepSpeedConfig(section)),
        ("samsgrad", "deepspeed_plugin", SimpleNamespace(hf_ds_config=HfDeepSpeedConfig(section))),
    ):
        trainer = hf_tiny.trainer(tmp_path, optim=optim)
        setattr(trainer.args, attribute, value)
        trainer.optimizer = object()  # the Trainer puts a dummy there, and never asks for the optimizer of this name
        with pytest.raises(ValueError, match=f'"optimizer" section.* train with AdamW instead of optim="{optim}"'):
            trainer.create_optimizer()
    trainer = hf_tiny.trainer(tmp_path, optim="adamw_torch")
    trainer.args.hf_deepspeed_config = HfDeepSpeedConfig(section)
    trainer.optimizer = dummy = object()
    assert trainer.create_optimizer() is dummy


# Training


class Recorder(TrainerCallback):
    """Keeps the optimizers that were trained with, and a copy of their state when training starts."""

    def __init__(self):
        self.optimizers, self.states = [], []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.optimizers.append(optimizer.optimizer)
        self.states.append(copy.deepcopy(optimizer.state_dict()))


class OwnOptimizer(Trainer):
    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        optimizer.param_groups[0]["lr"] = 0.5
        return optimizer


def test_the_groups_are_the_trainers_also_in_a_subclass(tmp_path):
    trainer = hf_tiny.trainer(tmp_path, OwnOptimizer, optim="samsgrad", weight_decay=0.3, optim_args="beta=9")
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is OPTIMIZERS["samsgrad"]
    groups = [(g["weight_decay"], g["lr"], g["beta"]) for g in optimizer.param_groups]
    assert groups == [(0.3, 0.5, 9.0), (0.0, 1e-3, 9.0)]
    assert all(p.ndim == 1 for p in optimizer.param_groups[1]["params"])


def same(a, b):
    """Equal to the last bit, whatever is nested in what."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", NAMES)
def test_resuming_repeats_the_run_to_the_last_bit(name, tmp_path):
    common = {"optim": name, "save_strategy": "epoch", "weight_decay": 0.1}
    whole = hf_tiny.trainer(tmp_path / "whole", **common)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{hf_tiny.STEPS_AN_EPOCH}"
    recorder = Recorder()
    resumed = hf_tiny.trainer(tmp_path / "resumed", callbacks=[recorder], **common)
    resumed.train(resume_from_checkpoint=str(checkpoint))

    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert same(recorder.states[0], saved)
    assert type(recorder.optimizers[0]) is OPTIMIZERS[name]
    states = [t.optimizer.state_dict() for t in (whole, resumed)]
    assert all(s["beta"] > 0 and s["step"] == 2 * hf_tiny.STEPS_AN_EPOCH for s in states[0]["state"].values())
    assert same(*states) and not same(states[0]["state"], saved["state"])
    assert same(whole.model.state_dict(), resumed.model.state_dict())


def test_a_run_of_fused_adamw_goes_on_as_sadamw_with_its_moments(tmp_path):
    before = hf_tiny.trainer(tmp_path / "a", optim="adamw_torch_fused", save_strategy="epoch", num_train_epochs=1)
    before.train()
    checkpoint = tmp_path / "a" / f"checkpoint-{hf_tiny.STEPS_AN_EPOCH}"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["fused"] is True
    recorder = Recorder()
    after = hf_tiny.trainer(tmp_path / "b", callbacks=[recorder], optim="sadamw")
    after.train(resume_from_checkpoint=str(checkpoint))
    loaded = recorder.states[0]["state"]
    assert loaded and all(same({k: loaded[i][k] for k in s}, s) for i, s in saved["state"].items())
    for state in after.optimizer.state_dict()["state"].values():
        assert state["step"] == 2 * hf_tiny.STEPS_AN_EPOCH and state["beta"] > 0
    assert all(bool(p.isfinite().all()) for p in after.model.parameters())


def test_hyperparameter_search(tmp_path):
    optuna = pytest.importorskip("optuna")
    recorder = Recorder()
    trainer = Trainer(
        args=hf_tiny.arguments(tmp_path, optim="sadam", optim_args="beta=9", max_steps=2),
        model_init=hf_tiny.model,
        train_dataset=hf_tiny.Pairs(),
        eval_dataset=hf_tiny.Pairs(8),
        callbacks=[recorder],
    )

    def space(trial):
        return {
            "optim": trial.suggest_categorical("optim", ["sadam", "samsgradw"]),
            "optim_args": trial.suggest_categorical("optim_args", ["beta=1e4", "beta=1e5"]),
        }

    grid = {"optim": ["sadam", "samsgradw"], "optim_args": ["beta=1e4"]}
    best = trainer.hyperparameter_search(space, n_trials=2, sampler=optuna.samplers.GridSampler(grid, seed=0))
    assert best.hyperparameters["optim"] in grid["optim"]
    assert {type(o) for o in recorder.optimizers} == {OPTIMIZERS[name] for name in grid["optim"]}
    assert {o.param_groups[0]["beta"] for o in recorder.optimizers} == {1e4}


def test_a_tiny_bert_learns_at_adamws_learning_rate(tmp_path):
    set_seed(0)
    trainer = hf_tiny.trainer(tmp_path, optim="sadamw", num_train_epochs=15, learning_rate=2e-3, logging_steps=4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]
