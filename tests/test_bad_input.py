"""Bad input: each error names the value and the fix, and is raised before anything is changed."""

from __future__ import annotations

import copy
import functools
import inspect
import math

import pytest
import torch

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW

CLASSES = [Sadam, SAMSGrad, SadamW, SAMSGradW]
every_class = pytest.mark.parametrize("cls", CLASSES)

BAD = [
    ({"lr": -1.0}, ValueError, ["-1.0", "lr is at least 0"]),
    ({"lr": -1e-6}, ValueError, ["-1e-06", "lr is at least 0"]),
    ({"lr": torch.tensor(-1e-6)}, ValueError, ["lr is at least 0"]),
    ({"lr": math.nan}, ValueError, ["nan", "lr is at least 0"]),
    ({"lr": math.inf}, ValueError, ["inf", "finite"]),
    ({"lr": "1e-3"}, TypeError, ["'1e-3'", "a number or a 0-dim tensor"]),
    ({"lr": True}, TypeError, ["True", "a number or a 0-dim tensor"]),
    ({"lr": None}, TypeError, ["None", "a number or a 0-dim tensor"]),
    ({"lr": torch.ones(2)}, ValueError, ["(2,)", "1-element"]),
    ({"lr": torch.tensor(0.1), "foreach": True}, ValueError, ["foreach=True", "set capturable=True"]),
    ({"betas": 0.9}, TypeError, ["betas=0.9", "(0.9, 0.999)"]),
    ({"betas": (0.9,)}, TypeError, ["(0.9,)", "(0.9, 0.999)"]),
    ({"betas": (0.9, 0.99, 0.999)}, TypeError, ["(0.9, 0.99, 0.999)", "(0.9, 0.999)"]),
    ({"betas": "0.9,0.999"}, TypeError, ["'0.9,0.999'", "(0.9, 0.999)"]),
    ({"betas": {0.9, 0.999}}, TypeError, ["(0.9, 0.999)"]),
    ({"betas": {"a": 0.9, "b": 0.999}}, TypeError, ["'a': 0.9", "(0.9, 0.999)"]),
    ({"betas": torch.ones(3)}, TypeError, ["(1.0, 1.0, 1.0)", "(0.9, 0.999)"]),
    ({"betas": (0.9, "x")}, TypeError, ["index 1", "'x'", "numbers"]),
    ({"betas": (True, 0.9)}, TypeError, ["index 0", "True", "numbers"]),
    ({"betas": (1.0, 0.9)}, ValueError, ["index 0", "1.0", "[0, 1)"]),
    ({"betas": (0.9, -0.1)}, ValueError, ["index 1", "-0.1", "[0, 1)"]),
    ({"betas": (math.nan, 0.9)}, ValueError, ["index 0", "nan", "[0, 1)"]),
    ({"betas": (0.9, math.inf)}, ValueError, ["index 1", "inf", "[0, 1)"]),
    ({"beta": 0}, ValueError, ["beta: 0", "at least 1e-30"]),
    ({"beta": -50.0}, ValueError, ["-50.0", "at least 1e-30"]),
    ({"beta": math.nan}, ValueError, ["nan", "at least 1e-30"]),
    ({"beta": math.inf}, ValueError, ["inf", "below 1e+38"]),
    ({"beta": 1e-43}, ValueError, ["1e-43", "at least 1e-30"]),
    ({"beta": 1e39}, ValueError, ["1e+39", "1e+38"]),
    ({"beta": "50"}, TypeError, ["'50'", 'a positive number or "auto"']),
    ({"beta": "Auto"}, TypeError, ["'Auto'", 'a positive number or "auto"']),
    ({"beta": None}, TypeError, ["None", 'a positive number or "auto"']),
    ({"beta": True}, TypeError, ["True", 'a positive number or "auto"']),
    ({"beta": torch.tensor([50.0, 60.0])}, TypeError, ["tensor([50., 60.])", 'a positive number or "auto"']),
    ({"beta": {50}}, TypeError, ["{50}", 'a positive number or "auto"']),
    ({"beta": (0.9, 0.95)}, TypeError, ["(0.9, 0.95)", "did you mean betas=(0.9, 0.95)?"]),
    ({"beta": [0.9, 0.95]}, TypeError, ["[0.9, 0.95]", "did you mean betas=(0.9, 0.95)?"]),
    ({"weight_decay": -0.1}, ValueError, ["-0.1", "at least 0"]),
    ({"weight_decay": math.nan}, ValueError, ["nan", "at least 0"]),
    ({"weight_decay": math.inf}, ValueError, ["inf", "finite"]),
    ({"weight_decay": "0.1"}, TypeError, ["'0.1'", "a number"]),
    ({"weight_decay": False}, TypeError, ["False", "a number"]),
    ({"bias_correction": "middle"}, ValueError, ["'middle'", "inner, outer, none"]),
    ({"bias_correction": None}, ValueError, ["None", "inner, outer, none"]),
    ({"bias_correction": "outer"}, ValueError, ['beta="auto"', "'outer'", "give beta a number"]),
    ({"bias_correction": "none"}, ValueError, ['beta="auto"', "'none'", "give beta a number"]),
    ({"fused": True, "foreach": True}, RuntimeError, ["fused=True and foreach=True", "None"]),
    ({"fused": True, "differentiable": True}, RuntimeError, ["fused=True cannot be differentiated", "fused=None"]),
]
bad_values = pytest.mark.parametrize(("bad", "error", "words"), BAD, ids=[str(row[0]) for row in BAD])


def one(value=1.0):
    return torch.nn.Parameter(torch.full((3,), value))


@bad_values
@every_class
def test_the_constructor_names_the_value_and_the_fix(cls, bad, error, words):
    with pytest.raises(error) as caught:
        cls([one()], **bad)
    message = str(caught.value)
    assert all(word in message for word in [cls.__name__, *words]), message


@bad_values
def test_a_bad_value_in_a_group_of_the_constructor(bad, error, words):
    with pytest.raises(error) as caught:
        SadamW([{"params": [one()]}, {"params": [one()], **bad}])
    assert all(word in str(caught.value) for word in words)


@bad_values
def test_a_bad_value_in_an_added_group_changes_nothing(bad, error, words):
    optimizer = SadamW([one()])
    with pytest.raises(error) as caught:
        optimizer.add_param_group({"params": [one()], **bad})
    assert all(word in str(caught.value) for word in words)
    assert len(optimizer.param_groups) == 1


@bad_values
def test_a_bad_value_in_a_loaded_state_changes_nothing(bad, error, words):
    if set(bad) & {"fused", "foreach"}:
        return  # a checkpoint does not bring these
    p = one()
    optimizer = SadamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(bad)
    saved["state"][0]["exp_avg"] += 1
    group, average = dict(optimizer.param_groups[0]), optimizer.state[p]["exp_avg"].clone()
    with pytest.raises(error) as caught:
        optimizer.load_state_dict(saved)
    assert all(word in str(caught.value) for word in ["SadamW.load_state_dict", *words])
    assert optimizer.param_groups[0] == group and torch.equal(optimizer.state[p]["exp_avg"], average)


@every_class
def test_a_fourth_positional_argument_is_not_beta(cls):
    with pytest.raises(TypeError, match="positional"):
        cls([one()], 1e-3, (0.9, 0.999), 1e-8)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("eps", r" \(there is no epsilon: the floor of the denominator is ln 2 / beta\)"),
        ("amsgrad", ""),
        ("weight_decy", r" \(did you mean weight_decay\?\)"),
        ("smooth", ""),
    ],
)
@every_class
def test_an_unknown_argument_is_named_with_the_nearest_and_the_valid_ones(cls, name, hint):
    with pytest.raises(
        TypeError, match=f"^{cls.__name__} has no argument '{name}'{hint}; the valid ones are lr, betas, beta"
    ):
        cls([one()], **{name: 1})


@every_class
def test_the_signature_is_spelt_out(cls):
    parameters = inspect.signature(cls).parameters
    assert list(parameters)[:4] == ["params", "lr", "betas", "beta"]
    assert not {"args", "kwargs"} & set(parameters)
    assert inspect.getfullargspec(cls.__init__).args[:4] == ["self", "params", "lr", "betas"]


@pytest.mark.parametrize(
    "model", [torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))], ids=["", "iterable"]
)
@every_class
def test_a_model_is_no_list_of_parameters(cls, model):
    for build in (cls, lambda model: cls(params=model)):
        with pytest.raises(
            TypeError, match=f"^{cls.__name__}: params is a {type(model).__name__}: pass model.parameters"
        ):
            build(model)


@pytest.mark.parametrize("lr", [-1e-20, torch.tensor(-1e-9)], ids=["number", "tensor"])
@pytest.mark.parametrize("foreach", [False, None])
@every_class
def test_what_is_negative_by_rounding_counts_as_zero(cls, foreach, lr):
    p = one()
    optimizer = cls([p], lr=0.1, weight_decay=0.1, foreach=foreach)
    p.grad = torch.ones(3)
    optimizer.step()
    before, group = p.detach().clone(), optimizer.param_groups[0]
    group["lr"], group["weight_decay"] = lr, -1e-20
    optimizer.step()
    assert torch.equal(p, before) and group["lr"] is lr
    other = cls([one()])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.param_groups[0]["params"][0].grad = torch.ones(3)
    other.step()
    assert torch.equal(other.param_groups[0]["params"][0], torch.ones(3))


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ([], ValueError, "empty parameter list"),
        (iter(()), ValueError, "empty parameter list"),
        (one(), TypeError, "iterable of Tensors"),
        ([one() * 2], ValueError, "non-leaf"),
        ([1.0], TypeError, "can only optimize Tensors"),
        ([{"params": {one()}}], TypeError, "ordered"),
        ([{"lr": 0.1}], KeyError, "params"),
    ],
    ids=["empty", "empty iterator", "a tensor", "non-leaf", "number", "set in a group", "no params"],
)
@every_class
def test_bad_parameters_get_torchs_errors(cls, params, error, match):
    with pytest.raises(error, match=match):
        cls(params)


@every_class
def test_a_parameter_in_two_groups_is_refused(cls):
    p = one()
    with pytest.raises(ValueError, match="more than one parameter group"):
        cls([{"params": [p]}, {"params": [p]}])


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("beta", ["auto", 50.0])
@every_class
def test_a_sparse_gradient_changes_nothing_in_any_group(cls, beta, foreach):
    dense, sparse = one(), torch.nn.Embedding(3, 2, sparse=True).weight
    optimizer = cls([{"params": [dense]}, {"params": [sparse]}], beta=beta, foreach=foreach)
    dense.grad = torch.ones(3)
    torch.nn.functional.embedding(torch.tensor([1]), sparse, sparse=True).sum().backward()
    before = sparse.detach().clone()
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients.*SparseAdam"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3)) and torch.equal(sparse, before) and not optimizer.state


@pytest.mark.parametrize("beta", ["auto", 50.0])
@pytest.mark.parametrize("foreach", [False, True])
@every_class
def test_an_error_in_the_closure_changes_nothing(cls, beta, foreach):
    p = one()
    optimizer = cls([p], beta=beta, foreach=foreach)
    p.grad = torch.ones(3)

    def closure():
        raise ArithmeticError("from the closure")

    with pytest.raises(ArithmeticError, match="from the closure"):
        optimizer.step(closure)
    assert torch.equal(p, torch.ones(3)) and not optimizer.state


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("foreach", [False, True])
@every_class
def test_nan_and_inf_gradients_do_to_a_fixed_beta_what_they_do_to_adam(cls, foreach, value):
    p, q = one(), one()
    optimizer, adam = cls([p], beta=50.0, foreach=foreach), torch.optim.Adam([q])
    for bad in (1.0, value, 1.0):
        p.grad, q.grad = (torch.tensor([1.0, bad, 0.0]) for _ in range(2))
        optimizer.step(), adam.step()
    assert torch.equal(p.isnan(), q.isnan()) and torch.equal(p.isnan(), torch.tensor([False, True, False]))


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta", -1), ("beta", math.nan), ("beta", "50"), ("lr", -1.0), ("lr", None), ("betas", (1.5, 0.9)),
     ("weight_decay", -1), ("bias_correction", "bogus"), ("bias_correction", "outer"), ("maximize", "no")],
    ids=str,
)  # fmt: skip
def test_a_group_that_was_set_wrong_is_refused_before_any_step(key, value):
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = Sadam([{"params": [first]}, {"params": [second]}])
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    optimizer.param_groups[1][key] = value
    with pytest.raises((ValueError, TypeError), match=r"Sadam\.step"):
        optimizer.step()
    assert first.eq(1).all() and second.eq(1).all() and not optimizer.state


def test_the_constructors_own_values_are_checked_also_where_every_group_overrides_them():
    with pytest.raises(ValueError, match="learning rate"):
        Sadam([{"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.1}], lr=-1)


@pytest.mark.parametrize("lr", [-1.0, math.nan])
def test_a_tensor_lr_has_the_same_range(lr):
    with pytest.raises(ValueError, match="Invalid learning rate"):
        Sadam([torch.nn.Parameter(torch.ones(3))], lr=torch.tensor(lr))


def test_foreach_cannot_be_differentiated():
    with pytest.raises(ValueError, match="differentiated"):
        Sadam([torch.nn.Parameter(torch.ones(3))], foreach=True, differentiable=True)


@every_class
def test_an_optimizer_built_before_its_modules_parameters_were_replaced(cls):
    module = torch.nn.Linear(3, 1)
    optimizer = cls(module.parameters())
    module.weight, module.bias = (torch.nn.Parameter(p.detach().clone()) for p in module.parameters())

    def closure(module):
        module(torch.ones(2, 3)).sum().backward()

    with pytest.raises(RuntimeError, match=f"{cls.__name__} has none of the parameters that Linear is trained with"):
        optimizer.step(functools.partial(closure, module))  # Lightning's closure brings the module along like this
    with pytest.warns(UserWarning, match="nothing was updated, because no parameter has a gradient"):
        optimizer.step()  # nothing is known of the module here
    assert not optimizer.state
