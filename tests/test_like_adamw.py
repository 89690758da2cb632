"""What AdamW survives, Sadam survives: each situation with torch's AdamW and with ours, which agree at a large beta.

Where AdamW goes on, so must ours, to the same weights; where AdamW fails, ours may do better. With ``beta="auto"`` the
weights are others, and have to be finite. Situations of many processes are in distributed_worker.py.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections import UserList
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sadam_integrations import SadamW, SAMSGradW, backends

LR = 0.01
KERNEL = not backends.missing("cpu")
WAYS = {"default": {}, "for-loop": {"fused": False, "foreach": False}, "foreach": {"foreach": True, "fused": False}}


def adamw(params, *, amsgrad=False, **options):
    options.pop("fused", None)
    return torch.optim.AdamW(params, **{"lr": LR, "eps": 1e-30, "amsgrad": amsgrad, **options})


def ours(cls, beta, how, params, **options):
    return cls(params, **{"lr": LR, "beta": beta, **how, **options})


def parameters(shapes=((6, 5), (5,), ()), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def step(optimizer, t):
    """One step on gradients that depend on the number of the step alone."""
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        generator = torch.Generator().manual_seed(1000 * t + i)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1
    optimizer.step()


def train(optimizer, steps, start=0):
    for t in range(start, start + steps):
        step(optimizer, t)
    return [p for group in optimizer.param_groups for p in group["params"]]


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(build, optimizer, params, load=None):
    """A fresh optimizer on copies of the parameters, with the state of the other, as a file brings it."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = build(copies)
    (load or type(other).load_state_dict)(other, through_a_file(optimizer.state_dict()))
    return other, copies


# ---------------------------------------------------------------- what others keep in the state


def an_average_that_a_step_hook_keeps(build):
    """In the state of each parameter, like a moving average of the weights that goes into the checkpoint."""

    def keep(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                ema = optimizer.state[p].setdefault("ema", torch.zeros_like(p))
                ema.lerp_(p.detach(), 0.1)

    optimizer = build(params := parameters())
    optimizer.register_step_post_hook(keep)
    train(optimizer, 5)
    other, copies = resumed(build, optimizer, params)
    other.register_step_post_hook(keep)
    train(other, 5, 5)
    return [*copies, *(other.state[p]["ema"] for p in copies)]


def an_entry_that_belongs_to_no_parameter(build):
    optimizer = build(params := parameters())
    train(optimizer, 3)
    optimizer.state["sampler"] = {"seed": 7, "weights": torch.arange(3.0)}
    optimizer.state[99] = {"note": "an index of no parameter"}
    other, copies = resumed(build, optimizer, params)
    assert other.state["sampler"]["seed"] == 7 and other.state[99] == {"note": "an index of no parameter"}
    train(other, 3, 3)
    train(resumed(build, other, copies)[0], 1)
    return [*copies, other.state["sampler"]["weights"]]


def keys_of_a_group(build):
    optimizer = build([{"params": parameters(), "layer": 3, "tags": ["a"], "name": "body"}])
    train(optimizer, 3)
    other, _ = resumed(build, optimizer, optimizer.param_groups[0]["params"])
    group = other.param_groups[0]
    assert (group["layer"], group["tags"], group["name"]) == (3, ["a"], "body")
    return train(other, 3, 3)


def a_state_with_numbers_and_lists(build):
    optimizer = build(params := parameters())
    train(optimizer, 3)
    optimizer.state[params[0]] |= {"seen": 5, "known": {"rank": 2}, "history": [1.0, 2.0]}
    other, copies = resumed(build, optimizer, params)
    state = other.state[copies[0]]
    assert (state["seen"], state["known"], state["history"]) == (5, {"rank": 2}, [1.0, 2.0])
    return train(other, 3, 3)


def wrapped(name, build):
    library = pytest.importorskip("pytorch_optimizer")
    optimizer = getattr(library, name)(build(params := parameters()))
    getattr(optimizer, "train", lambda: None)()
    train(optimizer, 7)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = getattr(library, name)(build(copies))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    getattr(other, "train", lambda: None)()
    train(optimizer, 6, 7), train(other, 6, 7)
    assert all(map(torch.equal, params, copies))
    return copies


def inside_lookahead(build):
    return wrapped("Lookahead", build)


def inside_schedule_free(build):
    return wrapped("ScheduleFreeWrapper", build)


# ---------------------------------------------------------------- hooks


def the_order_of_all_hooks(build):
    """Every hook point of torch, with the names of those that were called."""
    called = []

    def note(name):
        return lambda *args: called.append(name)

    optimizer = build(params := parameters())
    handles = [
        register_optimizer_step_pre_hook(note("global step pre")),
        register_optimizer_step_post_hook(note("global step post")),
    ]
    for point in ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre"):
        getattr(optimizer, f"register_{point}_hook")(note(point))
    optimizer.register_load_state_dict_post_hook(note("load_state_dict_post"))
    optimizer.register_state_dict_post_hook(note("state_dict_post, first"), prepend=True)
    optimizer.register_load_state_dict_pre_hook(note("load_state_dict_pre, first"), prepend=True)
    try:
        train(optimizer, 2)
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, 2, 2)
    finally:
        for handle in handles:
            handle.remove()
    return [*params, *called]


def a_hook_that_unpacks(build):
    def unpack(optimizer, state_dict):
        return state_dict["optimizer"]

    def load(optimizer, state_dict):
        optimizer.register_load_state_dict_pre_hook(unpack)
        optimizer.load_state_dict({"optimizer": state_dict, "epoch": 3})

    optimizer = build(params := parameters())
    train(optimizer, 3)
    return train(resumed(build, optimizer, params, load)[0], 3, 3)


def a_hook_that_maps_names_to_ids(build):
    names = ["weight", "bias", "scale"]

    def to_ids(optimizer, state_dict):
        ids = {name: i for i, name in enumerate(names)}
        groups = [{**group, "params": [ids[name] for name in group["params"]]} for group in state_dict["param_groups"]]
        return {"state": {ids[name]: state for name, state in state_dict["state"].items()}, "param_groups": groups}

    def load(optimizer, state_dict):
        optimizer.register_load_state_dict_pre_hook(to_ids)
        groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state_dict["param_groups"]]
        named = {"state": {names[i]: state for i, state in state_dict["state"].items()}, "param_groups": groups}
        optimizer.load_state_dict(named)

    optimizer = build(params := parameters())
    train(optimizer, 3)
    return train(resumed(build, optimizer, params, load)[0], 3, 3)


def a_hook_that_renames_moments(build):
    other_names = {"m": "exp_avg", "v": "exp_avg_sq", "v_max": "max_exp_avg_sq"}

    def rename(optimizer, state_dict):
        for state in state_dict["state"].values():
            for key, name in other_names.items():
                if key in state:
                    state[name] = state.pop(key)

    def load(optimizer, state_dict):
        optimizer.register_load_state_dict_pre_hook(rename)
        for state in state_dict["state"].values():
            for key, name in other_names.items():
                if name in state:
                    state[key] = state.pop(name)
        optimizer.load_state_dict(state_dict)

    optimizer = build(params := parameters())
    train(optimizer, 3)
    return train(resumed(build, optimizer, params, load)[0], 3, 3)


def a_hook_that_packs_what_is_saved(build):
    optimizer = build(params := parameters())
    optimizer.register_state_dict_post_hook(lambda optimizer, state_dict: {"optimizer": state_dict})
    train(optimizer, 3)
    other = build(copies := [torch.nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(through_a_file(optimizer.state_dict()["optimizer"]))
    train(other, 3, 3)
    return copies


# ---------------------------------------------------------------- a state that others reset


def reset(build, change):
    optimizer = build(params := parameters())
    train(optimizer, 5)
    change(optimizer, params)
    return train(optimizer, 5, 5)


def moments_and_steps_zeroed(build):
    def zero(optimizer, params):
        for state in optimizer.state.values():
            for key in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                if key in state:
                    state[key].zero_()

    return reset(build, zero)


def moments_zeroed_and_steps_kept(build):
    def zero(optimizer, params):
        for state in optimizer.state.values():
            state["exp_avg"].zero_(), state["exp_avg_sq"].zero_()

    return reset(build, zero)


def steps_set_back(build):
    def set_back(optimizer, params):
        for state in optimizer.state.values():
            state["step"].fill_(2)

    return reset(build, set_back)


def steps_that_are_numbers(build):
    """Which torch's own step refuses."""

    def number(optimizer, params):
        for state in optimizer.state.values():
            state["step"] = 0

    return reset(build, number)


def moments_replaced(build):
    def replace(optimizer, params):
        for p, state in optimizer.state.items():
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)

    return reset(build, replace)


def the_state_thrown_away(build):
    return reset(build, lambda optimizer, params: optimizer.state.clear())


def more_rows(build):
    """As densification does: a longer parameter in the place of the old one, its moments with zeros behind them."""

    def grow(optimizer, params):
        old = params[0]
        state = optimizer.state.pop(old)
        new = torch.nn.Parameter(torch.cat([old.detach(), torch.ones(3, 5)]))
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if key in state:
                state[key] = torch.cat([state[key], torch.zeros(3, 5)])
        optimizer.param_groups[0]["params"][0] = new
        optimizer.state[new] = state

    return reset(build, grow)


def fewer_rows(build):
    def prune(optimizer, params):
        old, kept = params[0], torch.tensor([0, 2, 5])
        state = optimizer.state.pop(old)
        new = torch.nn.Parameter(old.detach()[kept])
        optimizer.param_groups[0]["params"][0] = new
        optimizer.state[new] = {
            key: value[kept] if torch.is_tensor(value) and value.dim() else value for key, value in state.items()
        }

    return reset(build, prune)


def moments_cut_to_zero_in_most_places(build):
    def cut(optimizer, params):
        for state in optimizer.state.values():
            mask = torch.rand(state["exp_avg"].shape, generator=torch.Generator().manual_seed(0)) < 0.2
            state["exp_avg"].mul_(mask), state["exp_avg_sq"].mul_(mask)

    return reset(build, cut)


def state_moved_away_and_back(build):
    def move(optimizer, params):
        for state in optimizer.state.values():
            state |= {key: value.clone() for key, value in state.items() if torch.is_tensor(value)}

    return reset(build, move)


def parameters_replaced_through_data(build):
    def replace(optimizer, params):
        for p in params:
            p.data = p.data.clone()

    return reset(build, replace)


# ---------------------------------------------------------------- arguments


class Config(Sequence):
    """Stands in for OmegaConf's ListConfig: a sequence that is neither a list nor a tuple."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def argument(name, *values):
    def situation(build):
        for value in values:
            params = train(build(parameters(), **{name: value}), 3)
        return params

    situation.__name__ = f"{name} as {' and '.join(type(value).__name__ for value in values)}"
    return situation


def a_learning_rate_that_is_a_tensor_of_shape_1(build):
    optimizer = build(params := parameters(), lr=torch.tensor([0.02]), foreach=False)
    train(optimizer, 3)
    assert optimizer.param_groups[0]["lr"].shape == (1,)
    other, _ = resumed(functools.partial(build, lr=torch.tensor([0.02]), foreach=False), optimizer, params)
    return train(other, 3, 3)


def scheduled(make, steps=12):
    def situation(build):
        optimizer = build(parameters())
        scheduler = make(optimizer)
        for t in range(steps):
            step(optimizer, t)
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        other, _ = resumed(build, optimizer, optimizer.param_groups[0]["params"])
        return train(other, 2, steps)

    return situation


a_rate_that_ends_below_zero_by_rounding = scheduled(lambda o: lr_scheduler.LinearLR(o, end_factor=0.0, total_iters=10))
one_cycle = scheduled(lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=20))
cyclic = scheduled(lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 3, cycle_momentum=True))
a_plateau = scheduled(lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1))
a_lambda_of_numpy = scheduled(lambda o: lr_scheduler.LambdaLR(o, lambda t: np.float64(0.9) ** t))


def a_rate_set_to_an_array(build):
    optimizer = build(parameters())
    train(optimizer, 2)
    optimizer.param_groups[0]["lr"] = np.array(0.005)
    return train(optimizer, 2, 2)


def groups_with_their_own_values(build):
    first, second = parameters(), parameters(((4,),))
    optimizer = build([{"params": first, "betas": UserList([0.8, 0.99])}, {"params": second, "lr": np.float32(0.5)}])
    train(optimizer, 3)
    optimizer.add_param_group(
        {"params": parameters(((2, 2),)), "betas": np.array([0.5, 0.9]), "weight_decay": np.array(0.1)}
    )
    return train(optimizer, 3, 3)


# ---------------------------------------------------------------- tensors


def laid_out(shape, param, grad, moments=None, steps=5):
    """A large and a small parameter of some layout, with gradients and perhaps moments of another."""

    def situation(build):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(param(torch.randn(s, generator=generator))) for s in (shape, (2, 3, 2, 2))]
        optimizer = build(params)
        for t in range(steps):
            for i, p in enumerate(params):
                generator = torch.Generator().manual_seed(10 * t + i)
                p.grad = grad(torch.randn(p.shape, generator=generator) * 0.1)
            optimizer.step()
            if moments and not t:
                for state in optimizer.state.values():
                    state |= {
                        key: moments(value) for key, value in state.items() if torch.is_tensor(value) and value.dim()
                    }
        return params

    return situation


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def transposed(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def with_gaps(t):
    return torch.stack([t, t], -1)[..., 0]


def contiguous(t):
    return t.contiguous()


LARGE = (96, 32, 5, 7)
LAYOUTS = {
    "all channels last": laid_out(LARGE, channels_last, channels_last),
    "all transposed": laid_out(LARGE, transposed, transposed),
    "a gradient that lies otherwise": laid_out(LARGE, channels_last, contiguous),
    "a parameter that lies otherwise": laid_out(LARGE, contiguous, channels_last),
    "moments that lie otherwise": laid_out(LARGE, channels_last, channels_last, contiguous),
    "three layouts": laid_out(LARGE, channels_last, transposed, contiguous),
    "gaps": laid_out(LARGE, with_gaps, contiguous),
    "gaps everywhere": laid_out(LARGE, with_gaps, with_gaps, with_gaps),
    "a large first dimension": laid_out((200_000, 1, 1, 2), transposed, contiguous),
    "a large last dimension": laid_out((2, 1, 1, 200_000), transposed, contiguous),
}


def a_model_that_turns_channels_last_amid_training(build):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 7), torch.nn.Conv2d(64, 128, 7))
    optimizer = build(model.parameters())
    for t in range(6):
        if t == 3:
            model.to(memory_format=torch.channels_last)
        torch.manual_seed(t)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 16, 16)).square().mean().backward()
        optimizer.step()
    return list(model.parameters())


def a_step_in_inference_mode(build):
    optimizer = build(params := parameters())
    for t in range(4):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 0.1 * (i + t + 1))
        with torch.inference_mode():
            optimizer.step()
    return params


def deep_copies_and_pickles(build):
    optimizer = build(parameters())
    train(optimizer, 3)
    twin = copy.deepcopy(optimizer)
    other = pickle.loads(pickle.dumps(optimizer))
    return [*train(optimizer, 2, 3), *train(twin, 2, 3), *train(other, 2, 3)]


def plain_tensors_and_generators(build):
    tensors = [p.detach().clone().requires_grad_() for p in parameters()]
    return train(build(iter(tensors)), 3) + train(build((f"p{i}", p) for i, p in enumerate(parameters())), 3)


def gradients_that_come_and_go(build):
    optimizer = build(params := parameters())
    for t in range(12):
        for i, p in enumerate(params):
            p.grad = None if (t + i) % 3 else torch.full_like(p, 0.1 * (t + 1))
        optimizer.step()
    return params


# ---------------------------------------------------------------- without values


def shapes_of(optimizer):
    return [(p.shape, str(p.device)) for group in optimizer.param_groups for p in group["params"]]


def without_values(optimizer, steps=12):
    for _ in range(steps):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.ones_like(p)
        optimizer.step()


def on_the_meta_device(build):
    def make():
        return build([torch.nn.Parameter(torch.ones(shape, device="meta")) for shape in ((3, 4), ())])

    optimizer, other = make(), make()
    without_values(optimizer)
    other.load_state_dict(optimizer.state_dict())
    without_values(copy.deepcopy(other))
    without_values(other)
    return shapes_of(other)


def with_meta_as_the_default_device(build):
    with torch.device("meta"):
        params = [torch.nn.Parameter(torch.ones(3, 4, device="cpu")), torch.nn.Parameter(torch.ones((), device="cpu"))]
        optimizer, other = build(params), build(params)
        without_values(optimizer)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        without_values(copy.deepcopy(other))
        without_values(other)
    return params


def fake(device):
    def situation(build):
        with FakeTensorMode():
            params = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in ((300, 400), (4,), ())]
            optimizer, other = build(params), build(params)
            without_values(optimizer)
            other.load_state_dict(optimizer.state_dict())
            without_values(other)
        return shapes_of(other)

    return situation


def fake_parameters_outside_their_mode(build):
    mode = FakeTensorMode()
    with mode:
        params = [torch.nn.Parameter(torch.ones(3, 4))]
        params[0].grad = torch.ones(3, 4)
    optimizer = build(params)
    optimizer.step(), optimizer.step()
    return shapes_of(optimizer)


SITUATIONS = {
    **{
        f.__name__: f
        for f in (
            an_average_that_a_step_hook_keeps, an_entry_that_belongs_to_no_parameter, keys_of_a_group,
            a_state_with_numbers_and_lists, inside_lookahead, inside_schedule_free, the_order_of_all_hooks,
            a_hook_that_unpacks, a_hook_that_maps_names_to_ids, a_hook_that_renames_moments,
            a_hook_that_packs_what_is_saved, moments_and_steps_zeroed, moments_zeroed_and_steps_kept, steps_set_back,
            steps_that_are_numbers, moments_replaced, the_state_thrown_away, more_rows, fewer_rows,
            moments_cut_to_zero_in_most_places, state_moved_away_and_back, parameters_replaced_through_data,
            argument("betas", [0.8, 0.99], np.array([0.8, 0.99]), UserList([0.8, 0.99]), Config(0.8, 0.99)),
            argument("betas", (np.float32(0.75), np.array(0.5)), (np.array([0.75]), 0.5)),
            argument("lr", np.float64(0.02), np.array(0.02), np.array([0.02])),
            argument("weight_decay", np.float32(0.5), np.array(0.5), torch.tensor(0.5)),
            a_learning_rate_that_is_a_tensor_of_shape_1, a_rate_set_to_an_array, groups_with_their_own_values,
            a_model_that_turns_channels_last_amid_training, a_step_in_inference_mode, deep_copies_and_pickles,
            plain_tensors_and_generators, gradients_that_come_and_go, on_the_meta_device,
            with_meta_as_the_default_device, fake_parameters_outside_their_mode,
        )
    },
    "a rate that ends below zero by rounding": a_rate_that_ends_below_zero_by_rounding,
    "one cycle": one_cycle,
    "cyclic": cyclic,
    "a plateau": a_plateau,
    "a lambda of numpy": a_lambda_of_numpy,
    "fake on a CPU": fake("cpu"),
    "fake on a GPU": fake("cuda"),
    **LAYOUTS,
}  # fmt: skip


@functools.cache
def of_adamw(name, amsgrad):
    """The weights that AdamW ends with, or its error."""
    try:
        return SITUATIONS[name](functools.partial(adamw, amsgrad=amsgrad))
    except (Exception, pytest.skip.Exception) as error:
        return error


ADAMW_FAILS = {
    "steps_that_are_numbers": "its functions take tensors alone",
    "inside_schedule_free": "schedule-free is first to put a key into the state, which AdamW takes for its own",
    "a lambda of numpy": "what it saves needs numpy to be loaded",
    "betas as tuple and tuple": "it wants both betas of one type",
    "lr as float64 and ndarray and ndarray": "it multiplies tensors by the array",
    "a_rate_set_to_an_array": "likewise",
}
"""Situations in which AdamW may fail, but not ours; none has to."""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("cls", [SadamW, SAMSGradW])
@pytest.mark.parametrize("name", SITUATIONS, ids=lambda name: name.replace(" ", "_"))
def test_as_adamw(name, cls, how):
    want = of_adamw(name, cls is SAMSGradW)
    if isinstance(want, pytest.skip.Exception):
        pytest.skip(str(want))
    if isinstance(want, Exception) and name not in ADAMW_FAILS:
        raise want
    for beta in (1e30, "auto"):
        found = SITUATIONS[name](functools.partial(ours, cls, beta, WAYS[how]))
        for theirs, own in zip(found if isinstance(want, Exception) else want, found, strict=True):
            if not torch.is_tensor(own):
                assert own == theirs
            elif beta == "auto":
                assert own.isfinite().all()
            else:
                torch.testing.assert_close(own, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.skipif(not KERNEL, reason="there is no kernel here")
@pytest.mark.parametrize("name", ["all channels last", "all transposed"])
@pytest.mark.parametrize("beta", ["auto", 50.0])
def test_the_kernel_takes_what_lies_alike(name, beta, monkeypatch):
    monkeypatch.setattr(backends.cpu, "for_loop", None)
    monkeypatch.setattr(backends.cpu, "pieces", None)
    LAYOUTS[name](functools.partial(ours, SadamW, beta, {}))
