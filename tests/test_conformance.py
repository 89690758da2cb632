"""Torch's own conformance data for Adam and AdamW (``OptimizerInfo``), run against the four classes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW, backends

pytest.importorskip("expecttest")
common = pytest.importorskip("torch.testing._internal.common_optimizers")

INFO = {info.optim_cls: info for info in common.optim_db}
LIKE = {Sadam: torch.optim.Adam, SAMSGrad: torch.optim.Adam, SadamW: torch.optim.AdamW, SAMSGradW: torch.optim.AdamW}
NO_KERNEL = backends.missing("cpu")
ADAM_ONLY = ("eps", "amsgrad")


def inputs(cls, dtype=torch.float32):
    """The configurations that torch tests Adam with, and those it has for CUDA, without what is Adam's alone."""
    seen = []
    for device in ("cpu", "cuda"):
        for config in INFO[LIKE[cls]].optim_inputs_func(device=device, dtype=dtype):
            kwargs = {k: v for k, v in config.kwargs.items() if k not in ADAM_ONLY}
            if str(kwargs) not in seen:
                seen.append(str(kwargs))
                yield kwargs


CASES = [(cls, kwargs, beta) for cls in LIKE for kwargs in inputs(cls) for beta in ("auto", 50)]
every_case = pytest.mark.parametrize(("cls", "kwargs", "beta"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
every_class = pytest.mark.parametrize("cls", LIKE)


def build(cls, params, kwargs, **more):
    return cls(params, **{**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}, **more})


def model_and_input(dtype=torch.float64):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Sigmoid(), torch.nn.Linear(6, 1), torch.nn.Sigmoid())
    return model.to(dtype), torch.randn(3, 4, dtype=dtype)


def train(model, x, optimizer, steps=4):
    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def test_there_are_inputs_to_run():
    assert len(CASES) >= 4 * 2 * 5
    for key in ("capturable", "lr"):
        assert any(key in kwargs for _, kwargs, _ in CASES)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_backends_agree(cls, kwargs, beta, dtype):
    results = []
    for how in ({"foreach": False}, {"foreach": True}, {"fused": not NO_KERNEL or None}):
        if how.get("foreach") and isinstance(kwargs.get("lr"), torch.Tensor) and not kwargs.get("capturable"):
            continue
        model, x = model_and_input(dtype)
        optimizer = build(cls, model.parameters(), kwargs, beta=beta, **how)
        train(model, x, optimizer, 7)
        results.append((list(model.parameters()), optimizer.state_dict()["state"]))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


@every_case
@pytest.mark.parametrize("foreach", [False, True, None], ids=["for_loop", "foreach", "kernel"])
def test_a_step_without_gradients_does_nothing(cls, kwargs, beta, foreach):
    params = [torch.nn.Parameter(torch.randn(2, 3)) for _ in range(2)]
    before = copy.deepcopy(params)
    optimizer = build(cls, params, kwargs, beta=beta, foreach=foreach if kwargs.get("capturable") else None)
    optimizer.step()
    assert not optimizer.state and all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@every_case
@pytest.mark.parametrize("foreach", [False, True, None], ids=["for_loop", "foreach", "kernel"])
def test_a_step_with_zero_gradients_does_nothing_but_decay(cls, kwargs, beta, foreach):
    kwargs = {**kwargs, "weight_decay": 0.0}
    params = [torch.nn.Parameter(torch.randn(2, 3)) for _ in range(2)]
    before = copy.deepcopy(params)
    optimizer = build(cls, params, kwargs, beta=beta, foreach=foreach if kwargs.get("capturable") else None)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 1 for p in params)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@every_case
def test_the_loss_falls(cls, kwargs, beta):
    model, x = model_and_input()
    optimizer = build(cls, model.parameters(), {**kwargs, "maximize": False}, beta=beta)
    start = model(x).square().sum().item()
    train(model, x, optimizer, 20)
    assert model(x).square().sum().item() < start


@every_case
def test_a_saved_state_equals_the_state(cls, kwargs, beta, tmp_path):
    model, x = model_and_input()
    optimizer = build(cls, model.parameters(), kwargs, beta=beta)
    train(model, x, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    loaded = torch.load(tmp_path / "o.pt", weights_only=True)
    other = copy.deepcopy(model)
    copied = build(cls, other.parameters(), kwargs, beta=beta)
    copied.load_state_dict(loaded)
    train(model, x, optimizer), train(other, x, copied)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    for a, b in zip(optimizer.state.values(), copied.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@every_case
def test_an_older_state_without_implementation_flags_loads(cls, kwargs, beta):
    model, x = model_and_input()
    optimizer = build(cls, model.parameters(), kwargs, beta=beta)
    train(model, x, optimizer)
    old = copy.deepcopy(optimizer.state_dict())
    for flag, group in itertools.product(
        ("maximize", "foreach", "fused", "differentiable", "capturable"), old["param_groups"]
    ):
        del group[flag]
    optimizer.load_state_dict(old)
    train(model, x, optimizer)


@every_case
def test_a_deepcopy_has_the_same_state(cls, kwargs, beta):
    model, x = model_and_input()
    optimizer = build(cls, model.parameters(), kwargs, beta=beta)
    train(model, x, optimizer)
    duplicate = copy.deepcopy(optimizer)
    for a, b in zip(optimizer.state.values(), duplicate.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@every_class
@pytest.mark.parametrize("beta", ["auto", 50])
@pytest.mark.parametrize("tensor", [False, True])
def test_torchs_schedulers(cls, beta, tensor):
    pairs = list(INFO[LIKE[cls]].scheduler_inputs)
    assert pairs
    for schedulers in pairs:
        model, x = model_and_input()
        optimizer = cls(model.parameters(), lr=torch.tensor(0.01) if tensor else 0.01, beta=beta)
        built = [make(optimizer) for make in schedulers]
        for _ in range(3):
            train(model, x, optimizer, 1)
            for scheduler in built:
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(1.0)
                else:
                    scheduler.step()
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == tensor
        assert all(p.isfinite().all() for p in model.parameters())


@every_class
@pytest.mark.parametrize("beta", ["auto", 50])
@pytest.mark.parametrize("foreach", [False, True, None], ids=["for_loop", "foreach", "kernel"])
def test_complex_parameters_are_pairs_of_real_ones(cls, beta, foreach):
    torch.manual_seed(0)
    pairs = [torch.randn(5, 2, dtype=torch.float64) for _ in range(2)]
    real = [torch.nn.Parameter(p.clone()) for p in pairs]
    both = [torch.nn.Parameter(torch.view_as_complex(p.clone())) for p in pairs]
    a, b = cls(real, beta=beta, foreach=foreach, lr=0.1), cls(both, beta=beta, foreach=foreach, lr=0.1)
    for _ in range(6):
        for p, q in zip(real, both, strict=True):
            p.grad = torch.randn(5, 2, dtype=torch.float64)
            q.grad = torch.view_as_complex(p.grad.clone())
        a.step(), b.step()
    for p, q in zip(real, both, strict=True):
        torch.testing.assert_close(torch.view_as_real(q.detach()), p.detach())


def error_inputs():
    for cls in LIKE:
        for row in INFO[LIKE[cls]].optim_error_inputs_func(device="cpu", dtype=torch.float32):
            kwargs = row.optimizer_error_input.kwargs
            if any(isinstance(rate, torch.Tensor) for rate in kwargs.get("betas", ())):
                continue  # tensor betas do not exist here
            yield pytest.param(cls, row, id=f"{cls.__name__}: {row.optimizer_error_input.desc}")


@pytest.mark.parametrize(("cls", "row"), list(error_inputs()))
def test_torchs_error_inputs_give_torchs_errors(cls, row):
    given = row.optimizer_error_input
    kwargs = {k: v for k, v in given.kwargs.items() if k not in ADAM_ONLY}
    params = [torch.nn.Parameter(torch.randn(2))] if given.params is None else given.params
    if row.error_on is not common.OptimizerErrorEnum.CONSTRUCTION_ERROR:
        optimizer = cls(params, **kwargs)
        with pytest.raises(row.error_type, match=row.error_regex):
            optimizer.step()
    elif issubclass(row.error_type, Warning):
        with pytest.warns(row.error_type, match=row.error_regex):
            cls(params, **kwargs)
    else:
        with pytest.raises(row.error_type, match=row.error_regex):
            cls(params, **kwargs)
