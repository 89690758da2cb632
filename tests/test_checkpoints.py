"""Saving and loading: bit-identical continuation, torch's AdamW checkpoints, and torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW, chosen_betas

CLASSES = [Sadam, SAMSGrad, SadamW, SAMSGradW]
every_class = pytest.mark.parametrize("cls", CLASSES)


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in ((7,), (3, 4), ())]


def train(optimizer, steps=5, start=0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in range(start, start + steps):
        torch.manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype) * 1e-2
        optimizer.step()
    return params


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def snapshot(value):
    """A state dict as plain values that compare with ``==``."""
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def through_a_file(state_dict, path):
    torch.save(state_dict, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("beta", ["auto", 50.0])
@every_class
def test_a_saved_run_continues_bit_for_bit(cls, beta, foreach, dtype, tmp_path):
    params = parameters(dtype)
    optimizer = cls(params, beta=beta, foreach=foreach, lr=torch.tensor(1e-2) if not foreach else 1e-2)
    train(optimizer)
    restored = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = cls(restored, beta=beta, foreach=foreach)
    other.load_state_dict(through_a_file(optimizer.state_dict(), tmp_path / "o.pt"))
    assert other.state_dict().keys() == optimizer.state_dict().keys()
    assert other.state[restored[0]]["step"].dtype == torch.float32
    train(optimizer, start=5), train(other, start=5)
    assert same(params, restored) and chosen_betas(optimizer) == chosen_betas(other)


@every_class
def test_everything_saved_is_made_of_plain_values(cls, tmp_path):
    import numpy as np

    # numbers from numpy or an enum would be refused by torch.load(weights_only=True)
    optimizer = cls(parameters(), beta=np.float64(50), betas=(np.float64(0.9), 0.99), weight_decay=np.float64(0.1))
    train(optimizer)
    through_a_file(optimizer.state_dict(), tmp_path / "o.pt")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fused": True},
        {"fused": True, "amsgrad": True},
        {"amsgrad": True},
        {"foreach": True},
        {"lr": torch.tensor(0.01)},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 5, 64])
@every_class
def test_an_adamw_checkpoint_keeps_its_moments_and_beta_is_measured_at_the_next_step(cls, options, steps, tmp_path):
    params = parameters()
    decay = {} if cls in (SadamW, SAMSGradW) else {"weight_decay": 0.0}  # coupled, it would be another optimizer
    adam = torch.optim.AdamW(params, **options, **decay)
    train(adam, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = cls(params)
        optimizer.load_state_dict(through_a_file(adam.state_dict(), tmp_path / "o.pt"))
    group = optimizer.param_groups[0]
    assert not {"eps", "amsgrad", "decoupled_weight_decay"} & set(group)
    assert set(group) == set(optimizer.defaults) | {"params"}
    assert (group["fused"], group["foreach"], group["capturable"]) == (None, None, False)
    assert group["beta"] == "auto" and group["lr"] == adam.param_groups[0]["lr"]
    for p in params:
        mine, theirs = optimizer.state[p], adam.state[p]
        assert all(torch.equal(mine[k], theirs[k]) for k in ("exp_avg", "exp_avg_sq"))
        assert mine["step"] == steps and mine["step"].device.type == "cpu" and mine["step"].dtype == torch.float32
        assert mine.get("beta", 0.0) == 0.0
    before = [optimizer.state[p]["exp_avg_sq"].clone() for p in params]
    train(optimizer, 1, start=steps)
    for p, v in zip(params, before, strict=True):
        state = optimizer.state[p]
        assert state["beta"] > 0 and state["step"] == steps + 1
        if "max_exp_avg_sq" in state and cls in (SAMSGrad, SAMSGradW):
            largest = adam.state[p]["max_exp_avg_sq"] if options.get("amsgrad") else v
            assert (state["max_exp_avg_sq"] >= largest).all() and (state["max_exp_avg_sq"] >= v).all()


@every_class
def test_the_running_maximum_is_the_loaded_one_or_starts_from_the_loaded_v(cls):
    if cls not in (SAMSGrad, SAMSGradW):
        return
    for amsgrad in (True, False):
        params = parameters()
        adam = torch.optim.AdamW(params, amsgrad=amsgrad)
        train(adam, 3)
        optimizer = cls(params)
        optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.step()  # v shrinks, so the maximum stays
        for p in params:
            want = adam.state[p]["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
            assert torch.equal(optimizer.state[p]["max_exp_avg_sq"], want)


def test_how_a_step_runs_is_the_constructors_choice(tmp_path):
    params = parameters()
    saved = Sadam(params, beta=50.0, foreach=True, capturable=True, maximize=True)
    train(saved)
    other = Sadam(params, beta=50.0, foreach=False, differentiable=False)
    other.load_state_dict(through_a_file(saved.state_dict(), tmp_path / "o.pt"))
    group = other.param_groups[0]
    assert (group["foreach"], group["capturable"], group["fused"], group["differentiable"]) == (
        False,
        False,
        None,
        False,
    )
    assert group["maximize"] is True  # this one is the checkpoint's
    train(other)


@pytest.mark.parametrize(
    ("saved", "asked", "named"),
    [
        ({"beta": 30.0}, {"beta": 77.0}, ["beta=30.0", "beta=77.0"]),
        ({"beta": 30.0}, {}, ["beta=30.0", "beta='auto'"]),
        ({}, {"beta": 30.0}, ["beta='auto'", "beta=30.0"]),
        (
            {"beta": 5.0, "bias_correction": "outer"},
            {"beta": 5.0},
            ["bias_correction='outer'", "bias_correction='inner'"],
        ),
    ],
)
@every_class
def test_a_changed_beta_or_bias_correction_is_named_in_a_warning(cls, saved, asked, named):
    params = parameters()
    old = cls(params, **saved)
    train(old)
    new = cls(params, **asked)
    with pytest.warns(UserWarning) as caught:
        new.load_state_dict(old.state_dict())
    assert len(caught) == 1 and all(words in str(caught[0].message) for words in [cls.__name__, *named])
    assert all(new.param_groups[0][k] == v for k, v in saved.items())
    train(new)


@pytest.mark.parametrize("beta", ["auto", 50.0])
@every_class
def test_an_empty_fresh_optimizer_takes_its_own_state_silently(cls, beta):
    optimizer = cls(parameters(), beta=beta)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(optimizer.state_dict())
        before = train(optimizer)
    assert same(before, train(cls(parameters(), beta=beta)))


@pytest.mark.parametrize(
    "step", [7, 7.0, torch.tensor(7), torch.tensor(7, dtype=torch.int64), torch.tensor(7.0).double()]
)
@every_class
def test_step_counts_of_other_types(cls, step):
    params = parameters()
    adam = torch.optim.Adam(params)
    train(adam, 7)
    saved = adam.state_dict()
    for state in saved["state"].values():
        state["step"] = copy.deepcopy(step)
    optimizer = cls(params)
    optimizer.load_state_dict(saved)
    state = optimizer.state[params[0]]
    assert state["step"].dtype == torch.float32 and state["step"].shape == () and state["step"] == 7
    train(optimizer)
    assert state["step"] == 12


def test_betas_that_come_back_as_a_list_are_accepted():
    optimizer = SadamW(parameters())
    train(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["betas"] = list(saved["param_groups"][0]["betas"])
    optimizer.load_state_dict(saved)
    train(optimizer)


def test_keys_that_others_put_into_a_group_stay():
    params = parameters()
    optimizer = SadamW([{"params": params, "name": "body"}])
    torch.optim.lr_scheduler.LinearLR(optimizer)
    saved = optimizer.state_dict()
    fresh = SadamW(params)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["name"] == "body" and fresh.param_groups[0]["initial_lr"] == 1e-3


def test_what_a_checkpoint_lacks_is_the_groups_own_value():
    params = parameters()
    adam = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    optimizer = SadamW([{"params": params[:1], "beta": 3.0}, {"params": params[1:], "beta": 4.0}])
    optimizer.load_state_dict(adam.state_dict())
    assert [group["beta"] for group in optimizer.param_groups] == [3.0, 4.0]
    train(optimizer)


@pytest.mark.parametrize("what", ["groups", "params"])
def test_a_checkpoint_of_another_model_is_refused_and_nothing_changes(what):
    params = parameters()
    optimizer = SadamW(params)
    train(optimizer)
    before = snapshot(optimizer.state_dict())
    other = parameters()
    groups = [{"params": other[:1]}, {"params": other[1:]}] if what == "groups" else [{"params": other[:2]}]
    with pytest.raises(ValueError, match=r"different number of parameter groups|doesn't match the size"):
        optimizer.load_state_dict(SadamW(groups).state_dict())
    assert snapshot(optimizer.state_dict()) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1"),
        ({"beta": 0.0}, "Invalid beta: 0"),
        ({"beta": float("nan")}, "Invalid beta: nan"),
        ({"betas": (0.9, 1.0)}, "index 1: 1.0"),
        ({"bias_correction": "outer"}, 'beta="auto"'),
        ({"bias_correction": "middle"}, "middle"),
    ],
)
def test_bad_values_in_a_checkpoint_are_refused_and_nothing_changes(change, match):
    params = parameters()
    optimizer = SadamW([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer)
    before = snapshot(optimizer.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    saved["param_groups"][1].update(change)
    with pytest.raises(ValueError, match=f"SadamW.load_state_dict: .*{match}"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer.state_dict()) == before


@every_class
def test_a_checkpoint_of_an_optimizer_without_these_moments_starts_them_afresh(cls):
    params = parameters()
    sgd = torch.optim.SGD(params, momentum=0.9)
    train(sgd)
    optimizer = cls(params)
    optimizer.load_state_dict(sgd.state_dict())
    train(optimizer)
    assert optimizer.state[params[0]]["step"] == 5


def test_pickles_from_before_a_key_existed_are_completed():
    optimizer = Sadam(parameters(), beta=3.0)
    train(optimizer)
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        del group["beta"], group["bias_correction"], group["capturable"]
    optimizer.__setstate__(state)
    assert optimizer.param_groups[0]["beta"] == 3.0
    train(optimizer)


# What is checked when, and in which form things are saved


def test_a_hook_that_makes_a_damaged_dictionary_changes_nothing():
    params = parameters()
    optimizer, other = SadamW(params), SadamW(parameters())
    train(optimizer), train(other, 7)
    before = snapshot(optimizer.state_dict())

    def damage(optimizer, state_dict):
        state_dict["state"][1]["step"] = -1.0

    handle = optimizer.register_load_state_dict_pre_hook(damage)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameter 1: step=-1\.0"):
            optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert snapshot(optimizer.state_dict()) == before
    handle.remove()
    optimizer.load_state_dict(other.state_dict())
    assert not optimizer._optimizer_load_state_dict_pre_hooks and not optimizer._optimizer_state_dict_post_hooks
    assert optimizer.state[params[0]]["step"] == 7


def test_a_measured_beta_is_saved_as_a_tensor_and_kept_as_a_number():
    params = parameters()
    optimizer = SadamW(params)
    train(optimizer)
    live = optimizer.state[params[0]]
    saved = optimizer.state_dict()["state"][0]
    assert type(live["beta"]) is float and saved["beta"].dtype == torch.float64 and saved["beta"].item() == live["beta"]
    assert saved["exp_avg"] is live["exp_avg"]
    optimizer.load_state_dict(
        {"state": {0: {**saved, "beta": 3.0}}, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    assert optimizer.state[params[0]]["beta"] == 3.0  # as it was saved before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_saved_beta_is_not_cast_to_the_parameters_dtype(dtype):
    optimizer = SadamW(parameters(dtype))
    train(optimizer)
    before = chosen_betas(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert chosen_betas(optimizer) == before


def test_warnings_point_at_the_users_line():
    params = parameters()
    saved = SadamW(params, beta=3.0).state_dict()
    with pytest.warns(UserWarning, match="was made with") as caught:
        SadamW(params).load_state_dict(saved)
    assert caught[0].filename == __file__


# torch.distributed.checkpoint, in one process


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("beta", ["auto", 50.0])
@every_class
def test_distributed_checkpoint_state_dicts(cls, beta, flatten):
    from torch.distributed.checkpoint import state_dict as dcp

    def model_and_optimizer():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        return model, cls(model.parameters(), beta=beta, weight_decay=0.0)

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = model_and_optimizer()
    train(optimizer)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    weights = copy.deepcopy(model.state_dict())
    other_model, other = model_and_optimizer()
    start = copy.deepcopy(other_model.state_dict())
    dcp._init_optim_state(other)
    torch.testing.assert_close(other_model.state_dict(), start, rtol=0, atol=0)
    assert set(chosen_betas(other).values()) == {0.0 if beta == "auto" else 50.0}
    dcp.set_optimizer_state_dict(other_model, other, saved, options=options)
    other_model.load_state_dict(weights)
    assert chosen_betas(other) == chosen_betas(optimizer)
    train(optimizer, start=5), train(other, start=5)
    assert same(model.parameters(), other_model.parameters())


@every_class
def test_an_adamw_checkpoint_through_distributed_checkpoint(cls):
    from torch.distributed.checkpoint import state_dict as dcp

    model = torch.nn.Linear(3, 4)
    adam = torch.optim.AdamW(model.parameters(), amsgrad=cls in (SAMSGrad, SAMSGradW))
    train(adam)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, adam))
    optimizer = cls(model.parameters())
    dcp.set_optimizer_state_dict(model, optimizer, saved)
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["exp_avg"], adam.state[p]["exp_avg"]) and optimizer.state[p]["step"] == 5
    train(optimizer, 1)
    assert all(beta > 0 for beta in chosen_betas(optimizer).values())


def test_decay_that_changes_its_form_is_named():
    params = parameters()
    adam = torch.optim.AdamW(params, weight_decay=0.1)
    train(adam)
    saved = adam.state_dict()
    saved["param_groups"][0]["decoupled_weight_decay"] = True  # torch 2.6 does not say so yet
    with pytest.warns(UserWarning, match=r"weight_decay=0\.1 was decoupled and is coupled from now on"):
        Sadam(params).load_state_dict(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "x"),
        ("step", -1.0),
        ("step", math.nan),
        ("exp_avg", None),
        ("exp_avg_sq", [1.0]),
        ("beta", math.nan),
        ("beta", -1.0),
    ],
    ids=str,
)
def test_a_damaged_state_is_refused_before_anything_changes(key, value):
    params = parameters()
    optimizer, other = SadamW(params), SadamW(params)
    train(optimizer), train(other)
    damaged = copy.deepcopy(other.state_dict())
    damaged["state"][1][key] = value
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"parameter 1: {key}.*damaged"):
        optimizer.load_state_dict(damaged)
    assert str(optimizer.state_dict()) == str(before)
