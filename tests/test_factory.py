"""create_optimizer: the names, what each builds, and the answers to wrong ones."""

import inspect
import re

import pytest
import torch
from torch import nn

from sadam_integrations import PUBLISHED, Sadam, SadamW, SAMSGrad, SAMSGradW
from sadam_integrations.factory import OPTIMIZERS, create_optimizer, list_optimizers

NAMES = {"sadam": Sadam, "samsgrad": SAMSGrad, "sadamw": SadamW, "samsgradw": SAMSGradW}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def train(net, optimizer, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 3, generator=generator)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def test_the_table_is_the_four_names():
    assert OPTIMIZERS == NAMES
    assert list_optimizers() == ["sadam", "samsgrad", "sadamw", "samsgradw"]
    list_optimizers().clear()
    assert list_optimizers()


@pytest.mark.parametrize("name", NAMES)
def test_each_name_builds_its_class_with_its_defaults(name):
    optimizer = create_optimizer(name, model().parameters())
    assert type(optimizer) is NAMES[name]
    signature = inspect.signature(NAMES[name]).parameters
    assert optimizer.defaults == {key: signature[key].default for key in optimizer.defaults}


@pytest.mark.parametrize("name", NAMES)
def test_each_name_trains_as_its_class_does(name):
    ours, theirs = model(), model()
    built = train(ours, create_optimizer(name, ours.parameters(), lr=0.01, beta=20.0, weight_decay=0.1))
    direct = train(theirs, NAMES[name](theirs.parameters(), lr=0.01, beta=20.0, weight_decay=0.1))
    assert all(torch.equal(a, b) for a, b in zip(built, direct, strict=True))
    assert not torch.equal(built[0], model()[0].weight)


def test_a_model_gets_weight_decay_groups():
    net = model()
    groups = create_optimizer("sadamw", net, weight_decay=0.3).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert groups[0]["params"] == [net[0].weight, net[2].weight]
    assert groups[1]["params"] == [net[0].bias, net[1].weight, net[1].bias, net[2].bias]


def test_anything_else_is_taken_as_it_is():
    net = model()
    everything = list(net.parameters())
    for params in (net.parameters(), everything, net.named_parameters()):
        groups = create_optimizer("sadam", params, weight_decay=0.3).param_groups
        assert [(group["params"], group["weight_decay"]) for group in groups] == [(everything, 0.3)]
    own = [{"params": [net[0].weight], "lr": 1.0}, {"params": [net[0].bias], "beta": 7.0}]
    groups = create_optimizer("sadam", own, lr=0.5).param_groups
    assert [(group["lr"], group["beta"]) for group in groups] == [(1.0, "auto"), (0.5, 7.0)]


def test_keywords_reach_the_class():
    optimizer = create_optimizer("sadam", model(), **PUBLISHED)
    assert {key: optimizer.defaults[key] for key in PUBLISHED} == PUBLISHED
    lr = torch.tensor(0.1)
    assert create_optimizer("sadam", model(), lr=lr).param_groups[0]["lr"] is lr


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("adamw_", "adamw or sadamw"),
        ("SadamW", "sadamw"),
        ("samsgrad_w", "samsgradw"),
        ("samgrad", "samsgrad"),
        ("lion", None),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_the_list(name, nearest):
    with pytest.raises(ValueError, match=f"unknown optimizer '{name}'") as error:
        create_optimizer(name, model())
    listed = "the valid ones are sadam, samsgrad, sadamw, samsgradw, adam, adamw, sgd"
    assert str(error.value).endswith(f"{listed}, and dotted paths such as torch.optim.RMSprop")
    assert (f"(did you mean {nearest}" if nearest else f"'{name}';") in str(error.value)


@pytest.mark.parametrize(
    ("name", "cls", "fused"),
    [
        ("adam", torch.optim.Adam, True),
        ("adamw", torch.optim.AdamW, True),
        ("sgd", torch.optim.SGD, None),
        ("torch.optim.RMSprop", torch.optim.RMSprop, None),
        ("sadam_integrations.SAMSGrad", SAMSGrad, None),
    ],
)
def test_other_optimizers_by_name_and_by_path(name, cls, fused):
    optimizer = create_optimizer(name, model(), lr=0.1, weight_decay=0.3)
    assert type(optimizer) is cls and optimizer.defaults.get("fused") is fused
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.3), (0.1, 0.0)]
    if fused:
        assert create_optimizer(name, model(), fused=False).defaults["fused"] is False
        with pytest.raises(TypeError, match=f"{cls.__name__} has no argument 'beta'"):
            create_optimizer(name, model(), beta=50)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("torch.optim.Lion", "cannot be imported: module 'torch.optim' has no attribute 'Lion'"),
        ("nowhere.Lion", "cannot be imported: No module named 'nowhere'"),
        (".Lion", "unknown optimizer '.Lion'"),
        ("torch.nn.Linear", "is not a subclass of torch.optim.Optimizer"),
        ("torch.nn.functional.relu", "is not a subclass of torch.optim.Optimizer"),
    ],
)
def test_a_path_that_leads_nowhere(path, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_optimizer(path, model())


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("weigth_decay", "did you mean weight_decay?"),
        ("Beta", "did you mean beta or betas?"),
        ("eps", "there is no epsilon"),
        ("amsgrad", None),
        ("params", None),
    ],
)
def test_an_unknown_keyword_is_answered_with_the_nearest_and_the_list(key, hint):
    with pytest.raises(TypeError, match=f"SAMSGradW has no argument '{key}'") as error:
        create_optimizer("samsgradw", model(), lr=0.1, **{key: 1})
    assert (hint or "the valid ones are") in str(error.value)
    valid = str(error.value).rpartition("the valid ones are ")[2].split(", ")
    assert valid == [name for name in inspect.signature(SAMSGradW).parameters if name != "params"]


def test_other_mistakes_are_clear():
    with pytest.raises(TypeError, match="the name comes first and is a string, not Sequential"):
        create_optimizer(model(), "sadam")
    with pytest.raises(ValueError, match=r"Invalid learning rate: -1"):
        create_optimizer("sadam", model(), lr=-1)
    with pytest.raises(ValueError, match="nothing to train in ReLU"):
        create_optimizer("sadam", nn.ReLU())
