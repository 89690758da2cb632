"""timm knows the optimizers by name once sadam_integrations.timm is imported."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest
import torch

from sadam_integrations import launch
from sadam_integrations.factory import OPTIMIZERS

try:
    import timm.optim

    import sadam_integrations.timm
except (ImportError, RuntimeError):  # a torchvision for another build of torch is a RuntimeError
    timm = None

with_timm = pytest.mark.skipif(timm is None, reason="timm is not installed, or its torchvision does not load")


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))


@with_timm
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_by_name(name):
    model = net()
    arguments = {"lr": 0.01, "weight_decay": 0.1, "beta": 50, "betas": [0.8, 0.99], "eps": 1e-6, "momentum": 0.9}
    optimizer = timm.optim.create_optimizer_v2(model, opt=name, **arguments)
    assert type(optimizer) is OPTIMIZERS[name]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]  # timm's own groups
    assert all(group["beta"] == 50 and tuple(group["betas"]) == (0.8, 0.99) for group in optimizer.param_groups)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))


@with_timm
def test_the_defaults_are_the_class_s():
    parameters = list(net().parameters())
    for name, cls in OPTIMIZERS.items():
        optimizer = timm.optim.create_optimizer_v2(parameters, opt=name)
        assert optimizer.defaults == {**cls(parameters).defaults, "weight_decay": 0.0}  # which timm always passes


@with_timm
def test_they_are_listed_and_what_timm_adds_works():
    listed = dict(timm.optim.list_optimizers(with_description=True))
    assert OPTIMIZERS.keys() <= listed.keys() and all(listed[name] for name in OPTIMIZERS)
    lookahead = timm.optim.create_optimizer_v2(net(), opt="lookahead_sadamw", lr=0.01)
    assert type(lookahead._base_optimizer) is OPTIMIZERS["sadamw"]
    with pytest.raises(TypeError, match="nesterov"):
        timm.optim.create_optimizer_v2(net(), opt="sadamw", lr=0.01, nesterov=True)


@with_timm
def test_a_second_import_changes_nothing(caplog):
    before = timm.optim.get_optimizer_info("sadamw")
    importlib.reload(sadam_integrations.timm)
    assert timm.optim.get_optimizer_info("sadamw") is before and not caplog.records


@with_timm
def test_launch_with_timm(tmp_path, monkeypatch, capsys):
    """As timm's train.py takes them: the arguments of the command line, through timm's own functions."""
    (tmp_path / "train.py").write_text(
        "import argparse, torch, timm.optim\n"
        "args = argparse.Namespace(opt='sadamw', lr=0.1, weight_decay=0.05, momentum=0.9, opt_eps=None,\n"
        "                          opt_betas=[0.9, 0.99], opt_args={'beta': 50})\n"
        "print(timm.optim.create_optimizer_v2(torch.nn.Linear(2, 2), **timm.optim.optimizer_kwargs(cfg=args)))\n"
    )
    monkeypatch.setattr(sys, "argv", ["launch"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    launch.main(["--timm", str(tmp_path / "train.py")])
    assert capsys.readouterr().out.startswith("SadamW (")


# With a stand-in: what is registered, where timm itself cannot be had

STAND_IN = """
import sys, types
registered = {}
def module(name, **attributes):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes)
class Registry:
    list_optimizers = lambda self: list(registered)
    register = lambda self, info: registered.setdefault(info.name, info)
module("timm", __path__=[])
module("timm.optim", OptimInfo=lambda **kwargs: types.SimpleNamespace(**kwargs), __path__=[])
module("timm.optim._optim_factory", default_registry=Registry())
import sadam_integrations.timm, sadam_integrations
for name, info in registered.items():
    assert info.opt_class is sadam_integrations.factory.OPTIMIZERS[name] and info.description
    assert info.has_betas and not info.has_eps and "_" not in name
print(*registered)
"""


def test_what_is_registered():
    done = subprocess.run([sys.executable, "-c", STAND_IN], capture_output=True, text=True)
    assert done.stdout.split() == list(OPTIMIZERS), done.stderr


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"timm": None}, r'needs timm, which is not installed: pip install "sadam-integrations\[timm\]"'),
        ({"timm": types.ModuleType("timm"), "timm.optim": types.ModuleType("optim")}, "needs timm 1.0.12 or later"),
    ],
)
def test_without_timm_or_with_an_old_one(there, message, monkeypatch):
    monkeypatch.delitem(sys.modules, "sadam_integrations.timm", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in there.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ImportError, match=message):
        importlib.import_module("sadam_integrations.timm")
