"""The specification against an independent float64 transcription, its limits, and other people's implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Reference

from sadam_integrations.update import BIAS_CORRECTIONS, softplus, update

SHAPES = [(), (0,), (1,), (7,), (33,), (3, 5), (2, 0), (2, 3, 4)]


def run(theta, gradients, *, amsgrad=False, dtype=torch.float64, betas=(0.9, 0.999), **options):
    """The spec over several gradients: the parameter and its moments after each."""
    defaults = {"weight_decay": 0.0, "decoupled": False, "bias_correction": "inner", "maximize": False}
    param = torch.as_tensor(theta, dtype=dtype)
    m, v, v_max = torch.zeros_like(param), torch.zeros_like(param), torch.zeros_like(param) if amsgrad else None
    history = []
    for t, gradient in enumerate(gradients, 1):
        param, m, v, v_max = update(
            param, torch.as_tensor(gradient, dtype=dtype), m, v, v_max,
            step=t, beta1=betas[0], beta2=betas[1], **{**defaults, **options},
        )  # fmt: skip
        history.append((param, m, v, v_max))
    return history


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from(SHAPES))
    scale = 10.0 ** draw(st.integers(-12, 6))
    zeros = draw(st.sampled_from([0.0, 0.0, 0.5, 1.0]))
    gradients = [
        scale * rng.standard_normal(shape) * 10 ** rng.uniform(-3, 0, shape) * (rng.random(shape) >= zeros)
        for _ in range(draw(st.integers(1, 8)))
    ]
    options = {
        "lr": draw(st.sampled_from([0.0, 1e-5, 1e-3, 0.1])),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.95, 0.0), (0.8, 0.9)])),
        "beta": 10.0 ** draw(st.floats(-6, 12)),
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.3])),
        "decoupled": draw(st.booleans()),
        "amsgrad": draw(st.booleans()),
        "bias_correction": draw(st.sampled_from(BIAS_CORRECTIONS)),
        "maximize": draw(st.booleans()),
    }
    return rng.standard_normal(shape), gradients, options


def compare(theta, gradients, options, dtype, relative):
    """Every intermediate result within `relative` of the largest number that entered it."""
    reference = Reference(theta, **options)
    moved = np.abs(reference.theta)
    largest_g = np.zeros(np.shape(theta))
    for gradient, tensors in zip(gradients, run(theta, gradients, dtype=dtype, **options), strict=True):
        assert all(t is None or (t.shape == np.shape(theta) and t.dtype == dtype) for t in tensors)
        param, m, v, v_max = (None if t is None else t.double().numpy() for t in tensors)
        before = reference.theta
        reference.step(gradient)
        moved = np.maximum(moved, np.abs(reference.theta)) + np.abs(reference.theta - before)
        largest_g = np.maximum(largest_g, np.abs(gradient) + options["weight_decay"] * moved)
        np.testing.assert_array_less(np.abs(param - reference.theta), relative * moved + 1e-300)
        np.testing.assert_array_less(np.abs(m - reference.m), relative * largest_g + 1e-300)
        np.testing.assert_array_less(np.abs(v - reference.v), relative * largest_g**2 + 1e-300)
        if v_max is not None:
            np.testing.assert_array_less(np.abs(v_max - reference.largest_v), relative * largest_g**2 + 1e-300)


@settings(max_examples=2500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems())
def test_float64_equals_the_independent_transcription(problem):
    compare(*problem, torch.float64, 1e-12)


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems())
def test_float32_equals_the_independent_transcription_to_rounding(problem):
    theta, gradients, options = problem
    # the reference gets the same rounded inputs, so what remains is the arithmetic
    theta, gradients = np.float32(theta), [np.float32(g) for g in gradients]
    smallest = min((np.abs(g[g != 0]).min() for g in gradients if np.any(g)), default=1.0)
    if smallest > 1e-14:  # below it the square leaves float32's normal range
        compare(theta, gradients, options, torch.float32, 2e-5)


@pytest.mark.parametrize("bias_correction", BIAS_CORRECTIONS)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_two_thousand_steps_do_not_drift(bias_correction, amsgrad, decoupled):
    rng = np.random.default_rng(1)
    gradients = rng.standard_normal((2000, 3)) * [1e-4, 1e-2, 1.0]
    options = {
        "lr": 1e-3, "betas": (0.9, 0.999), "beta": 50.0, "weight_decay": 0.01,
        "decoupled": decoupled, "amsgrad": amsgrad, "bias_correction": bias_correction,
    }  # fmt: skip
    reference = Reference([1.0, -1.0, 0.5], **options)
    for gradient in gradients:
        reference.step(gradient)
    param = run([1.0, -1.0, 0.5], gradients, **options)[-1][0]
    np.testing.assert_allclose(param, reference.theta, rtol=1e-11)


def test_one_step_by_hand():
    # g = 2, theta = 1, beta = 1: m = 0.2, v = 0.004, c1 = 0.1, c2 = 0.001
    denominator = {"inner": math.log(1 + math.exp(2.0)), "outer": math.log(1 + math.exp(math.sqrt(0.004)))}
    denominator["none"] = denominator["outer"]
    factor = {"inner": 1 / 0.1, "outer": math.sqrt(0.001) / 0.1, "none": 1.0}
    for form in BIAS_CORRECTIONS:
        param = run([1.0], [[2.0]], lr=0.5, beta=1.0, bias_correction=form)[0][0]
        assert param.item() == pytest.approx(1 - 0.5 * factor[form] * 0.2 / denominator[form], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_beta_zero_moves_nothing_but_keeps_the_moments(dtype, amsgrad):
    theta, gradients = torch.randn(9, dtype=dtype), [torch.randn(9, dtype=dtype), torch.zeros(9, dtype=dtype)]
    still = run(theta, gradients, dtype=dtype, lr=0.1, beta=0.0, amsgrad=amsgrad)[-1]
    moving = run(theta, gradients, dtype=dtype, lr=0.1, beta=50.0, amsgrad=amsgrad)[-1]
    assert torch.equal(still[0], theta) and not torch.equal(moving[0], theta)
    assert all(torch.equal(a, b) for a, b in zip(still[1:], moving[1:], strict=True) if a is not None)


def test_softplus_is_finite_positive_and_never_under_its_floor():
    x = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 1e3, 1e18, math.inf])
    for beta in (1e-12, 1e-3, 1.0, 50.0, 1e9, 1e37):
        y = softplus(x, beta)
        assert not y.isnan().any() and (y[:-1] < math.inf).all() and (y >= x).all()
        assert (y >= math.log(2) / beta * (1 - 1e-6)).all()
        assert y[0].item() == pytest.approx(math.log(2) / beta, rel=1e-6)


def test_softplus_differs_from_torchs_by_less_than_its_switch_to_the_identity():
    x = torch.logspace(-6, 3, 1000, dtype=torch.float64)
    for beta in (1.0, 50.0, 1e4):
        assert (softplus(x, beta) - torch.nn.functional.softplus(x, beta)).abs().max() < 2.1e-9 / beta


def test_an_infinite_second_moment_stops_a_coordinate_and_spreads_no_nan():
    m, v = torch.tensor([1.0, 1.0]), torch.tensor([math.inf, 1.0])
    new = update(
        torch.ones(2), torch.ones(2), m, v, None, step=3, lr=0.1, beta1=0.9, beta2=0.999, beta=50.0,
        weight_decay=0.0, decoupled=False, bias_correction="inner", maximize=False,
    )  # fmt: skip
    assert new.param[0] == 1 and new.param[1] < 1 and not new.param.isnan().any()


def test_a_square_that_overflows_float32_does_not_give_nan():
    param, _, v, _ = run([1.0], [[1e30]], lr=0.1, beta=50.0, dtype=torch.float32)[0]
    assert v.isinf().all() and param.item() == 1.0


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("bias_correction", BIAS_CORRECTIONS)
def test_complex_numbers_are_pairs_of_real_ones(amsgrad, bias_correction):
    torch.manual_seed(0)
    theta, gradients = torch.randn(5, 2).double(), [torch.randn(5, 2).double() for _ in range(4)]
    options = {"lr": 0.1, "beta": 3.0, "amsgrad": amsgrad, "bias_correction": bias_correction, "weight_decay": 0.1}
    real = run(theta, gradients, **options)[-1]
    pairs = [torch.view_as_complex(g) for g in gradients]
    both = run(torch.view_as_complex(theta), pairs, dtype=torch.complex128, **options)[-1]
    for a, b in zip(real, both, strict=True):
        assert a is b is None or torch.equal(a, torch.view_as_real(b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_arithmetic_rounded_once(dtype):
    torch.manual_seed(0)
    theta, gradient = torch.randn(1000).to(dtype), (torch.randn(1000) * 1e-3).to(dtype)
    half = run(theta, [gradient], dtype=dtype, lr=0.01, beta=50.0)[0]
    wide = run(theta.float(), [gradient.float()], dtype=torch.float32, lr=0.01, beta=50.0)[0]
    for a, b in zip(half[:3], wide[:3], strict=True):
        assert torch.equal(a, b.to(dtype))


def test_inputs_are_not_changed():
    tensors = [torch.rand(4) for _ in range(5)]
    copies = [t.clone() for t in tensors]
    update(
        *tensors, step=2, lr=0.1, beta1=0.9, beta2=0.999, beta=50.0, weight_decay=0.1, decoupled=True,
        bias_correction="outer", maximize=True,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_gain_multiplies_the_step_and_not_the_decoupled_decay():
    options = {"lr": 0.1, "beta": 50.0, "weight_decay": 0.1, "decoupled": True}
    start = torch.ones(3, dtype=torch.float64)
    plain, gained = (run(start, [[1.0, -2.0, 0.0]], gain=g, **options)[0] for g in (1.0, 3.0))
    decayed = start * (1 - 0.1 * 0.1)
    torch.testing.assert_close(gained[0] - decayed, 3 * (plain[0] - decayed))
    assert all(torch.equal(a, b) for a, b in zip(plain[1:3], gained[1:3], strict=True))


# Limits


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_a_large_beta_is_adam_without_epsilon(amsgrad, optimizer):
    torch.manual_seed(0)
    gradients = [torch.randn(20).double() for _ in range(50)]
    param = torch.nn.Parameter(torch.randn(20).double())
    start = param.detach().clone()
    adam = optimizer([param], lr=0.01, eps=0.0, weight_decay=0.1, amsgrad=amsgrad)
    for param.grad in gradients:
        adam.step()
    options = {"lr": 0.01, "weight_decay": 0.1, "decoupled": optimizer is torch.optim.AdamW, "amsgrad": amsgrad}
    torch.testing.assert_close(run(start, gradients, beta=1e9, **options)[-1][0], param.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("bias_correction", BIAS_CORRECTIONS)
def test_a_small_beta_is_momentum_at_beta_over_ln_2_times_the_rate(bias_correction):
    rng = np.random.default_rng(0)
    lr, beta, theta, m = 1e-2, 1e-8, np.ones(5), np.zeros(5)
    gradients = rng.standard_normal((20, 5))
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * g
        c1, c2 = 1 - 0.9**t, 1 - 0.999**t
        theta = (
            theta - lr * beta / math.log(2) * m * {"inner": 1 / c1, "outer": c2**0.5 / c1, "none": 1}[bias_correction]
        )
    new = run(np.ones(5), gradients, lr=lr, beta=beta, bias_correction=bias_correction)[-1][0]
    np.testing.assert_allclose(new - 1, theta - 1, rtol=1e-6)


# Other people's implementations, each transcribed as a formula and compared with the option that claims to match it.
# CompassPlus (an adaptive threshold and epsilon that are not documented) is the one known implementation not compared.

GRADIENTS = np.random.default_rng(7).standard_normal((30, 6)) * [1e-4, 1e-2, 0.1, 1.0, 3.0, 0.0]
LR, B1, B2, BETA = 0.01, 0.9, 0.999, 50.0


def foreign(rule, gradients=GRADIENTS):
    """Runs ``rule(theta, g, m, v, largest_v, t) -> theta, m, v, largest_v`` over the gradients."""
    theta, m, v, largest = np.ones(6), np.zeros(6), np.zeros(6), np.zeros(6)
    for t, g in enumerate(gradients, 1):
        theta, m, v, largest = rule(theta, g, m, v, largest, t)
    return theta


def ours(gradients=GRADIENTS, **options):
    return run(np.ones(6), gradients, **{"lr": LR, "beta": BETA, **options})[-1][0].numpy()


def sp(x, beta=BETA):
    return np.where(beta * x > 20, x, np.log1p(np.exp(np.minimum(beta * x, 20))) / beta)  # as torch's softplus


def moments(g, m, v):
    return B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g


def same(a, b, rtol=1e-8):
    return np.allclose(a - 1, b - 1, rtol=rtol, atol=1e-14)


def test_the_papers_displayed_algorithm_is_none():
    def paper(theta, g, m, v, largest, t):
        m, v = moments(g, m, v)
        return theta - LR * m / sp(np.sqrt(v)), m, v, largest

    assert same(foreign(paper), ours(bias_correction="none"))
    assert not same(foreign(paper), ours(bias_correction="inner"), 1e-2)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_official_code_is_outer(amsgrad):
    def official(theta, g, m, v, largest, t):
        g = g + 5e-4 * theta
        m, v = moments(g, m, v)
        largest = np.maximum(largest, v)
        denominator = sp(np.sqrt(largest if amsgrad else v))
        return theta - LR * np.sqrt(1 - B2**t) / (1 - B1**t) * m / denominator, m, v, largest

    shrinking = GRADIENTS * np.linspace(1, 0.01, 30)[:, None]  # so that the running maximum matters
    options = {"weight_decay": 5e-4, "amsgrad": amsgrad, "bias_correction": "outer"}
    assert same(foreign(official, shrinking), ours(shrinking, **options))
    assert not same(foreign(official, shrinking), ours(shrinking, **{**options, "bias_correction": "inner"}), 1e-2)


@pytest.mark.parametrize("updates_of_v", [1, 2])
def test_rangerva_is_outer_but_for_its_second_update_of_v(updates_of_v):
    def ranger_va(theta, g, m, v, largest, t):
        m, once = moments(g, m, v)
        v = once if updates_of_v == 1 else moments(g, m, once)[1]  # its code updates v twice a step: a bug
        largest = np.maximum(largest, v)
        return theta - LR * np.sqrt(1 - B2**t) / (1 - B1**t) * m / sp(np.sqrt(largest)), m, v, largest

    assert same(foreign(ranger_va), ours(bias_correction="outer", amsgrad=True)) == (updates_of_v == 1)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_fastais_radam_with_beta_is_inner_at_the_rectified_rate(eps):
    r_inf = 2 / (1 - B2) - 1

    def rectification(t):
        r = r_inf - 2 * t * B2**t / (1 - B2**t)
        return math.sqrt((r - 4) * (r - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r)) if r > 5 else 0.0

    def radam(theta, g, m, v, largest, t):  # its other branch, while r <= 5, has no softplus: no step here
        m, v = moments(g, m, v)
        denominator = sp(np.sqrt(v / (1 - B2**t)) + eps)
        return theta - LR * rectification(t) / (1 - B1**t) * m / denominator, m, v, largest

    param, m, v = torch.ones(6).double(), torch.zeros(6).double(), torch.zeros(6).double()
    for t, g in enumerate(GRADIENTS, 1):  # rectification is a schedule of the learning rate
        param, m, v, _ = update(
            param, torch.tensor(g), m, v, None, step=t, lr=LR * rectification(t), beta1=B1, beta2=B2, beta=BETA,
            weight_decay=0.0, decoupled=False, bias_correction="inner", maximize=False,
        )  # fmt: skip
    assert same(foreign(radam), param.numpy()) == (eps == 0)
    assert same(foreign(radam), param.numpy(), 1e-3)  # its epsilon is far under the floor of 1.4e-2


def test_sing_is_inner_on_its_standardized_gradients():
    standardized = [(g - g.mean()) / np.linalg.norm(g - g.mean()) for g in GRADIENTS]

    def sing(theta, g, m, v, largest, t):  # without its lookahead, which wraps any optimizer
        m, v = moments((g - g.mean()) / np.linalg.norm(g - g.mean()), m, v)
        return theta - LR / (1 - B1**t) * m / sp(np.sqrt(v) / np.sqrt(1 - B2**t)), m, v, largest

    assert same(foreign(sing), ours(standardized))
    assert not same(foreign(sing), ours(), 1e-2)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_ranger21_is_inner_and_its_amsgrad_keeps_nothing(eps):
    # without positive-negative momentum, gradient clipping and norm loss, which come before and after this rule
    def ranger21(theta, g, m, v, largest, t):
        m, v = moments(g, m, v)
        v = np.maximum(largest, v)  # written into v: `largest` stays zero, so this is Sadam and never SAMSGrad
        return theta - LR / (1 - B1**t) * m / sp(np.sqrt(v) / np.sqrt(1 - B2**t) + eps), m, v, largest

    shrinking = GRADIENTS * np.linspace(1, 0.01, 30)[:, None] ** 4
    fast = {"bias_correction": "inner"}
    assert same(foreign(ranger21, shrinking), ours(shrinking, **fast), 1e-8 if eps == 0 else 1e-5)
    assert not same(foreign(ranger21, shrinking), ours(shrinking, amsgrad=True, **fast), 1e-4)


@pytest.mark.parametrize("growing", [True, False])
def test_multioptpys_samsgrad_matches_none_only_while_v_grows(growing):
    def multioptpy(theta, g, m, v, largest, t):
        m, new = moments(g, m, v)
        v = np.maximum(v, new)  # the maximum re-enters the recursion
        return theta - LR * m / (np.log(1 + np.exp(np.sqrt(v))) + 1e-8), m, v, largest

    sizes = np.linspace(1, 3, 30) if growing else np.where(np.arange(30) % 15 == 0, 1.0, 0.01)  # or rare and large
    gradients = GRADIENTS[:1] * sizes[:, None] * 100
    mine = ours(gradients, beta=1.0, amsgrad=True, bias_correction="none")
    assert same(foreign(multioptpy, gradients), mine, 1e-7) == growing


def test_the_numpy_samsgrad_is_none_where_it_does_not_overflow():
    def naive(theta, g, m, v, largest, t):
        m, v = moments(g, m, v)
        largest = np.maximum(largest, v)
        with np.errstate(over="ignore"):
            return theta - LR * m / (np.log(1 + np.exp(BETA * np.sqrt(largest))) / BETA), m, v, largest

    options = {"amsgrad": True, "bias_correction": "none"}
    assert same(foreign(naive), ours(**options))
    huge = GRADIENTS * 1e4  # exp(beta s) is infinite: that code stands still, this one does not
    assert foreign(naive, huge)[3] == 1 and ours(huge, **options)[3] != 1
