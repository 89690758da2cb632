"""Faults amid training: gradients that are no numbers, skipped steps, half precision, late parameters, a full disk."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW, calibration, chosen_betas
from sadam_integrations.backends import cpu

CLASSES = [Sadam, SAMSGrad, SadamW, SAMSGradW]
every_class = pytest.mark.parametrize("cls", CLASSES)
every_beta = pytest.mark.parametrize("beta", ["auto", 50.0])
every_backend = pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"fused": True}, marks=pytest.mark.skipif(isinstance(cpu.load(), str), reason="no kernel")),
        {"fused": False, "foreach": False},
        {"foreach": True},
    ],
    ids=["kernel", "for-loop", "foreach"],
)


def parameters(shapes=((5,), (3, 4)), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(params, t, size=1e-2):
    generator = torch.Generator().manual_seed(t)
    return [(size * torch.randn(p.shape, generator=generator)).to(p.dtype) for p in params]


def take(optimizer, params, given):
    for p, gradient in zip(params, given, strict=True):
        p.grad = gradient
    optimizer.step()


def state(optimizer):
    return str([(k, p.tolist(), v) for p, s in optimizer.state.items() for k, v in s.items()])


# ---------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("at", [1, 3, 4], ids=["first step", "between measurements", "a measured step"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@every_backend
@every_class
def test_auto_recovers_from_a_bad_gradient_where_adam_does(cls, flags, bad, at):
    params, twins = parameters(), parameters()
    optimizer, adam = cls(params, **flags), torch.optim.AdamW(twins)
    for t in range(1, 70):
        given = gradients(params, t)
        if t == at:
            given[0][1] = given[1][2, 0] = bad
        take(optimizer, params, given), take(adam, twins, [g.clone() for g in given])
        if t == at:
            before = [p.detach().clone() for p in params]
    for p, twin, old in zip(params, twins, before, strict=True):
        assert torch.equal(p.isfinite(), twin.isfinite()) and p.isfinite().any()
        assert (p[p.isfinite()] != old[p.isfinite()]).all()  # the others go on
    betas, clean = chosen_betas(optimizer), cls(parameters(), **flags)
    others = [p for group in clean.param_groups for p in group["params"]]
    for t in range(1, 70):
        take(clean, others, gradients(others, t))
    for name, beta in chosen_betas(clean).items():
        assert beta / 2 < betas[name] < beta * 2  # measured again at step 64, as if nothing had been


@every_backend
@every_class
def test_a_beta_that_could_not_be_measured_is_measured_when_it_can_be(cls, flags):
    params = parameters()
    optimizer = cls(params, **flags)
    take(optimizer, params, [torch.full_like(p, math.inf) for p in params])
    assert set(chosen_betas(optimizer).values()) == {0.0}
    fresh = parameters(((5,),))
    optimizer.add_param_group({"params": fresh})
    take(optimizer, [*params, *fresh], gradients([*params, *fresh], 2))
    assert list(chosen_betas(optimizer).values())[:2] == [0.0, 0.0]  # as in Adam, these parameters are lost
    assert all(p.isnan().all() for p in params) and fresh[0].isfinite().all() and optimizer.state[fresh[0]]["beta"] > 0


@every_backend
@every_beta
@every_class
def test_a_step_that_the_scaler_skips_leaves_no_trace(cls, beta, flags):
    """The first step, one that beta is measured at, and two in a row."""
    params, twins = parameters(), parameters()
    optimizer, other = cls(params, beta=beta, **flags), cls(twins, beta=beta, **flags)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10**6)
    skipped, taken = {1, 4, 5, 9}, 0
    for t in range(1, 20):
        given = gradients(params, t)
        scale = scaler.get_scale()
        scaler.scale(torch.zeros(()))  # makes the scaler ready
        before = state(optimizer)
        for p, gradient in zip(params, given, strict=True):
            p.grad = gradient * scale
        if t in skipped:
            params[0].grad[0] = math.inf
        scaler.step(optimizer), scaler.update()
        if t in skipped:
            assert state(optimizer) == before and scaler.get_scale() == scale / 2
        else:
            taken += 1
            take(other, twins, [gradient.clone() for gradient in given])
    assert taken == 15 and all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert state(optimizer) == state(other)


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 1e3, 6e4], ids=lambda size: f"gradients of {size:g}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_backend
@every_class
def test_true_half_precision_makes_no_nan(cls, flags, dtype, size):
    """Of v, 1e-7 underflows and 6e4 overflows in float16: such a coordinate stops, as in Adam."""
    params = parameters(dtype=dtype)
    optimizer = cls(params, lr=1e-2, **flags)
    for t in range(1, 40):
        take(optimizer, params, [g.clamp(-size, size) for g in gradients(params, t, size)])
    for p in params:
        kept = optimizer.state[p]
        assert p.isfinite().all() and p.dtype == kept["exp_avg"].dtype == kept["exp_avg_sq"].dtype == dtype
        assert math.isfinite(kept["beta"])


# ---------------------------------------------------------------- late parameters, long runs


@every_backend
@every_beta
@every_class
def test_a_group_that_is_added_late_starts_as_a_new_optimizer_would(cls, beta, flags):
    early, late, alone = parameters(), parameters(((6,), (2, 2))), parameters(((6,), (2, 2)))
    optimizer = cls(early, beta=beta, **flags)
    for t in range(1, 101):
        take(optimizer, early, gradients(early, t))
    optimizer.add_param_group({"params": late, "lr": 0.02})
    other = cls(alone, lr=0.02, beta=beta, **flags)
    for t in range(101, 140):
        given = gradients(late, t)
        take(optimizer, [*early, *late], [*gradients(early, t), *given])
        take(other, alone, [gradient.clone() for gradient in given])
    assert all(torch.equal(p, q) for p, q in zip(late, alone, strict=True))
    assert [optimizer.state[p]["step"].item() for p in (*early, *late)] == [139.0] * 2 + [39.0] * 2


@every_backend
@every_beta
@every_class
def test_a_first_gradient_at_step_1000_starts_that_parameter_as_new(cls, beta, flags):
    params, alone = parameters(), parameters()[1:]
    optimizer, other = cls(params, beta=beta, **flags), cls(alone, beta=beta, **flags)
    for t in range(1, 1000):
        params[0].grad = gradients(params, t)[0]
        optimizer.step()
    for t in range(1000, 1040):
        given = gradients(params, t)
        take(optimizer, params, given), take(other, alone, [given[1].clone()])
    assert torch.equal(params[1], alone[0]) and optimizer.state[params[1]]["step"] == 40


@every_backend
@every_class
def test_the_step_count_ends_at_float32s_last_whole_number_and_nothing_else_does(cls, flags, monkeypatch):
    params = parameters()
    optimizer = cls(params, **flags)
    take(optimizer, params, gradients(params, 1))
    for p in params:
        optimizer.state[p]["step"].fill_(2.0**24 - 3)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    measured = []
    monkeypatch.setattr(
        calibration, "measure", lambda histograms, factors: [measured.append(1) or 3.0 for _ in histograms]
    )
    for t in range(2, 12):
        before = [p.detach().clone() for p in params]
        take(optimizer, params, gradients(params, t))
        assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert len(measured) == len(params) and optimizer.state[params[0]]["step"] == 2.0**24
