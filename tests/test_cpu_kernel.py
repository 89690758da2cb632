"""The CPU kernel against the specification, with each instruction set that this machine has; its cached addresses."""

from __future__ import annotations

import copy
import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW, backends, calibration
from sadam_integrations.update import update

kernel = backends.cpu
if isinstance(kernel.load(), str):
    pytest.skip(f"no kernel: {kernel.load()}", allow_module_level=True)

SETS = list(kernel.load().sets)
NUMBERS = {
    "lr": 0.1, "beta1": 0.9, "beta2": 0.999, "beta": 50.0, "weight_decay": 0.1, "decoupled": True,
    "bias_correction": "inner", "maximize": False, "gain": 1.0,
}  # fmt: skip
CLASSES = [Sadam, SAMSGrad, SadamW, SAMSGradW]
every_set = pytest.mark.parametrize("isa", SETS)
every_class = pytest.mark.parametrize("cls", CLASSES)
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def best_instruction_set_again():
    yield
    kernel.force(None)
    torch.set_num_threads(1)


def test_the_best_instruction_set_of_this_machine_runs():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if " avx512vl " in flags and " avx512bw " in flags and " avx512dq " in flags:
        assert kernel.instruction_set() == "avx512" and SETS == ["baseline", "avx2", "avx512"]
    elif " avx2 " in flags and " fma " in flags:
        assert kernel.instruction_set() == "avx2" and SETS == ["baseline", "avx2"]
    for name in SETS:
        kernel.force(name)
        assert kernel.instruction_set() == name
    with pytest.raises(ValueError, match=r"instruction_set='avx1024' .* can run here: baseline"):
        kernel.force("avx1024")


# One step against float64


def in_float64(tensors, **options):
    return update(*[None if t is None else t.double() for t in tensors], **options)


def run(tensors, options, step=1.0, memo=None):
    """The kernel's step of one parameter, whose step count comes out as ``step``."""
    p, g, m, v, v_max = tensors
    count = torch.tensor(step - 1)
    beta = options.pop("beta")
    memo = {} if memo is None else memo
    kernel.cpu([p], [g], [m], [v], [v_max], [count], [beta], capturable=False, memo=memo, **options)
    assert count.item() == step
    return memo["cpu"]


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    size = draw(st.integers(1, 300))
    scale = 10.0 ** draw(st.integers(-6 if dtype != torch.float16 else -3, 2))
    offset = [draw(st.integers(0, 40)) for _ in range(5)]
    seed, amsgrad = draw(st.integers(0, 2**16)), draw(st.booleans())
    make = torch.Generator().manual_seed(seed)

    def tensor(k, positive=False):
        spread = 10.0 ** (-4 * torch.rand(size + offset[k], generator=make))
        values = torch.randn(size + offset[k], generator=make) * spread * scale
        return (values.square() if positive else values).to(dtype)[offset[k] :]

    tensors = [tensor(0), tensor(1), tensor(2), tensor(3, True), tensor(4, True) if amsgrad else None]
    decay = draw(st.sampled_from([0.0, 0.01, 0.3]))
    options = {
        "lr": draw(st.sampled_from([0.0, 1e-4, 0.1])),
        "beta1": draw(st.sampled_from([0.0, 0.3, 0.9])),
        "beta2": draw(st.sampled_from([0.0, 0.5, 0.999])),
        "beta": draw(st.sampled_from([1e-3, 1.0, 50.0, 1e4, 1e12])) / scale,
        "weight_decay": decay,
        "decoupled": draw(st.booleans()),
        "bias_correction": draw(st.sampled_from(["inner", "outer", "none"])),
        "maximize": draw(st.booleans()),
        "gain": draw(st.sampled_from([1.0, 1.5])),
    }
    return tensors, options, float(draw(st.integers(1, 2000)))


@every_set
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_one_step_is_the_specification_in_float64(isa, case):
    kernel.force(isa)
    tensors, options, step = case
    dtype = tensors[0].dtype
    want = in_float64(tensors, step=step, **options)
    mine = [None if t is None else t.clone() for t in tensors]
    offsets = [None if t is None else t._base if t._base is not None else t for t in tensors]
    before = [None if t is None else t.clone() for t in offsets]
    table = run(tensors, dict(options), step)
    assert table.served == [True]
    p64, g64 = mine[0].double(), mine[1].double()
    sizes = [None if t is None else t.abs() for t in mine]
    reach = in_float64(sizes, step=step, **{**options, "maximize": False})  # as if no signs cancelled
    decay = 0.0 if options["decoupled"] else options["weight_decay"] * (-1 if options["maximize"] else 1)
    cancelled = (g64.abs() + abs(decay) * p64.abs()) / (g64 + decay * p64).abs().clamp(min=1e-300)
    moved = (want[0] - p64).abs() * (reach[1] / want[1].abs().clamp(min=1e-300) + cancelled)
    for k, (got, target, old) in enumerate(zip((tensors[0], *tensors[2:]), want, (mine[0], *mine[2:]), strict=True)):
        if got is None:
            continue
        rounding = ULP[dtype] * (target.abs() / 2 + old.double().abs() * 2**-10)
        slack = 6e-7 * (reach[k] if k else moved + p64.abs())  # ten roundings
        smallest = 6e-8 if dtype == torch.float16 else 1e-37
        held = target.abs() < torch.finfo(dtype).max
        assert ((got.double() - target).abs() <= 1.01 * rounding + slack + smallest)[held].all(), k
    assert torch.equal(tensors[1], mine[1]), "the gradient was changed"
    for whole, old, t in zip(offsets, before, tensors, strict=True):
        if t is not None:
            outside = whole.numel() - t.numel()
            assert torch.equal(whole[:outside], old[:outside]), "memory before the tensor was changed"


@every_set
def test_its_error_is_no_larger_than_the_float32_for_loops(isa):
    """After 20 steps with gradients over ten decades, against the published formulas in float64."""
    kernel.force(isa)
    torch.manual_seed(0)
    start = torch.randn(4099)
    gradients = [torch.randn(4099) * 10 ** (-10 * torch.rand(4099)) for _ in range(20)]
    errors = {}
    for beta, form in ((50.0, "outer"), (1e4, "inner"), (1e9, "inner"), (1.0, "none")):
        for cls in CLASSES:
            reference = Reference(
                start.numpy(), lr=1e-2, betas=(0.9, 0.999), beta=beta, weight_decay=0.01, bias_correction=form,
                decoupled=cls in (SadamW, SAMSGradW), amsgrad=cls in (SAMSGrad, SAMSGradW),
            )  # fmt: skip
            params = {fused: torch.nn.Parameter(start.clone()) for fused in (True, False)}
            both = [
                cls([p], lr=1e-2, beta=beta, weight_decay=0.01, bias_correction=form, fused=fused)
                for fused, p in params.items()
            ]
            for g in gradients:
                want = reference.step(g.numpy())
                for optimizer, p in zip(both, params.values(), strict=True):
                    p.grad = g
                    optimizer.step()
            for fused, p in params.items():
                error = np.abs(p.detach().double().numpy() - want) / np.maximum(np.abs(want), 1e-2)
                errors.setdefault(fused, []).append((error.max(), error.mean()))
    worst, mean = np.max(errors[True], 0)
    assert worst < 1e-5 and mean < 1e-6
    assert all(k[1] <= 1.2 * loop[1] + 1e-8 for k, loop in zip(errors[True], errors[False], strict=True))


@every_set
def test_the_denominator_is_right_over_the_whole_range(isa):
    """p = 0, m = 1 after the step and lr = 1: what is left in p is one over the denominator."""
    kernel.force(isa)
    x = torch.cat([torch.zeros(1), torch.logspace(-12, 4, 20001)])  # beta * sqrt(v)
    beta = 50.0
    v = (x.double() / beta).square().float()
    p, ones = torch.zeros_like(v), torch.ones_like(v)
    run(
        [p, ones, ones.clone(), v.clone(), None],
        {"lr": 1.0, "beta1": 0.5, "beta2": 0.0, "beta": beta, "weight_decay": 0.0, "decoupled": False,
         "bias_correction": "none", "maximize": False, "gain": 1.0},
    )  # fmt: skip
    p2 = torch.zeros_like(v)  # beta2 = 0 makes v the square of the gradient: use it to set v exactly
    g = v.sqrt()
    run(
        [p2, g, torch.ones_like(v) * 2 - g, v.clone(), None],
        {"lr": 1.0, "beta1": 0.5, "beta2": 0.0, "beta": beta, "weight_decay": 0.0, "decoupled": False,
         "bias_correction": "none", "maximize": False, "gain": 1.0},
    )  # fmt: skip
    root = (g * g).sqrt().double()
    want = -1 / (root + torch.log1p(torch.exp(-beta * root)) / beta)
    assert ((p2.double() / want - 1).abs() < 4e-7).all()


NONFINITE = [np.nan, np.inf, -np.inf, 0.0, 1e-45, 1e-30, 3e38]


@every_set
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("beta", [0.0, 1e-38, 50.0, 1e30])
def test_extreme_values_end_as_in_the_specification(isa, beta, amsgrad):
    kernel.force(isa)
    values = torch.tensor(NONFINITE, dtype=torch.float32)
    p, g, m = (t.flatten() for t in torch.meshgrid(values, values, torch.tensor([0.0, 1.0, np.nan]), indexing="ij"))
    p, g, m = p.float().contiguous(), g.float().contiguous(), m.float().contiguous()
    v = torch.zeros_like(p)
    v[::5] = np.nan if beta else 1.0  # a second moment that is NaN has a first moment that is NaN
    v[1::5] = np.inf
    v_max = torch.roll(v, 1) if amsgrad else None
    options = {
        "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "beta": beta, "weight_decay": 0.0, "decoupled": False,
        "bias_correction": "inner", "maximize": False, "gain": 1.0,
    }  # fmt: skip
    want = update(p, g, m, v, v_max, step=3.0, **options)
    mine = [p.clone(), g, m.clone(), v.clone(), None if v_max is None else v_max.clone()]
    run(mine, dict(options), 3.0)
    for got, target in zip((mine[0], *mine[2:]), want, strict=True):
        if target is not None:
            assert torch.equal(got.isnan(), target.isnan())
            finite = target.isfinite()
            torch.testing.assert_close(got[finite], target[finite], rtol=2e-6, atol=1e-37)
            assert torch.equal(got[target.isinf()], target[target.isinf()])


# The count by which beta is measured


@every_set
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("decoupled", "maximize"), [(True, False), (False, False), (False, True)])
def test_the_count_is_that_of_the_second_moment_after_the_step(isa, threads, dtype, amsgrad, decoupled, maximize):
    kernel.force(isa)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    size = 300_001
    p, g, v, v_max = (torch.randn(size) * 10 ** (-6 * torch.rand(size)) for _ in range(4))
    g[::7], v[::3] = 0.0, 0.0
    g[5], g[6] = float("inf"), float("nan")
    p, g, v, v_max = p.to(dtype), g.to(dtype), v.square().to(dtype), v_max.square().to(dtype)
    top = v_max if amsgrad else None
    decay = {"weight_decay": 0.1, "decoupled": decoupled, "maximize": maximize}
    counts = kernel.count(g, p, v, top, beta2=0.999, correction=0.01, **decay)
    options = {"step": 1.0, "lr": 0.0, "beta1": 0.9, "beta2": 0.999, "beta": 1.0, "bias_correction": "none", **decay}
    new = update(*(t if t is None else t.float() for t in (p, g, p, v, None)), **options).exp_avg_sq
    if dtype != torch.float32:
        grad = (-g.float() if maximize else g.float()) + (0.0 if decoupled else 0.1) * p.float()
        new = torch.where(new.to(dtype) == 0, 0.01 * (grad * grad), new)
    want = calibration.histogram([torch.maximum(top.float(), new) if amsgrad else new])
    assert counts.sum() == size and want.shape == counts.shape
    assert (counts - want).abs().sum() < size / 1000  # a rounding may take an entry over the edge of its bin


@every_set
@every_class
def test_beta_is_measured_as_without_the_kernel(isa, cls):
    kernel.force(isa)
    params, others = make(), make()
    a, b = cls(params, fused=True), cls(others, fused=False)
    train(a, params, 17), train(b, others, 17)
    for p, q in zip(params, others, strict=True):
        assert a.state[p]["beta"] == pytest.approx(b.state[q]["beta"], rel=1e-3)


def test_what_the_kernel_does_not_serve_is_not_counted_by_it():
    one = torch.ones(3, dtype=torch.float64)
    options = {"beta2": 0.999, "weight_decay": 0.0, "decoupled": True, "maximize": False, "correction": 1.0}
    assert kernel.count(one, one, one, **options) is None
    assert kernel.count(torch.ones(3), torch.ones(3), torch.ones(4), **options) is None


# Subnormal numbers


SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def subnormal_rows(dtype):
    """A parameter, a gradient that is zero, and moments that have shrunk to a few of the smallest numbers."""
    few = torch.arange(1, 5).repeat(500) * SMALLEST[dtype]
    return [t.to(dtype).clone() for t in (torch.linspace(-1, 1, 2000), torch.zeros(2000), few, few, few)]


@pytest.mark.parametrize("amsgrad", [False, True])
@every_set
def test_subnormal_moments_of_float32_become_zero(isa, amsgrad):
    kernel.force(isa)
    tensors = subnormal_rows(torch.float32)
    start = tensors[0].clone()
    options = dict(NUMBERS, weight_decay=0.0)
    run([*tensors[:4], tensors[4] if amsgrad else None], options)
    assert not tensors[2].any() and not tensors[3].any() and torch.equal(tensors[0], start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_set
def test_subnormal_numbers_of_half_precision_keep_their_value(isa, dtype):
    kernel.force(isa)
    p, g, _, _, _ = subnormal_rows(dtype)
    few = (torch.arange(1, 65).repeat(32)[:2000] * SMALLEST[dtype]).to(dtype)
    for param, grad, beta1 in ((few.clone(), g, 0.9), (p, few.clone(), 0.0)):
        kept, m = param.clone(), torch.zeros_like(param)
        run([param, grad, m, torch.ones_like(param), None], dict(NUMBERS, weight_decay=0.0, beta1=beta1, lr=1e-10))
        assert torch.equal(param, kept) and torch.equal(m, grad)


def flushes():
    """Whether the threads of torch's pool flush, the caller's own first."""
    tiny = torch.full((200_000,), 1e-40)
    return [not bool(part.all()) for part in (tiny * 0.5).chunk(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", ["auto", 50.0, 9.9e37])
@every_set
def test_neither_changes_how_the_callers_threads_are_set_nor_depends_on_it(isa, beta, dtype):
    kernel.force(isa)
    torch.set_num_threads(2)
    found = []
    for flush in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter((torch.randn(100_003) * 10 ** (-40 * torch.rand(100_003))).to(dtype))]
        optimizer = Sadam(params, beta=beta, lr=0.1, weight_decay=0.1)
        grads = [(torch.randn(100_003) * 10 ** (-40 * torch.rand(100_003))).to(dtype) for _ in range(4)]
        before = flushes()
        try:
            if not torch.set_flush_denormal(flush):
                pytest.skip("this processor does not flush")
            given = flushes()
            for grad in grads:
                params[0].grad = grad
                optimizer.step()
            assert flushes() == given
        finally:
            torch.set_flush_denormal(False)
        assert flushes() == before
        (state,) = optimizer.state.values()
        found.append([params[0].detach(), state["exp_avg"], state["exp_avg_sq"], state.get("beta")])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if torch.is_tensor(a) else a == b


# The optimizer with the kernel


def make(dtype=torch.float32, shapes=((3, 5), (1000,), (64,), (7, 64, 3), ()), seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def set_gradients(params, t, dtype=None):
    torch.manual_seed(1000 + t)
    for p in params:
        p.grad = (torch.randn(p.shape) * 10 ** (-3 * torch.rand(p.shape))).to(dtype or p.dtype)


def train(optimizer, params, steps, start=0):
    for t in range(start, start + steps):
        set_gradients(params, t)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"beta": 50.0, "bias_correction": "outer"}, {"beta": 1e3, "maximize": True}])
@every_class
def test_many_steps_are_the_for_loops(cls, options, dtype):
    params, others = make(dtype), make(dtype)
    a, b = (cls(p, lr=0.01, weight_decay=0.1, fused=fused, **options) for p, fused in ((params, True), (others, False)))
    for optimizer, ps in ((a, params), (b, others)):
        train(optimizer, ps, 40)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        assert a.state[p].keys() == b.state[q].keys() and a.state[p]["step"] == b.state[q]["step"] == 40


@every_class
def test_it_is_what_runs_unless_told_otherwise(cls):
    p = make()
    assert backends.pick(p, cls(p).param_groups[0]) is kernel.cpu
    assert backends.pick(p, cls(p, fused=True).param_groups[0]) is kernel.cpu
    for flags in ({"fused": False}, {"foreach": False}, {"differentiable": True}):
        assert backends.pick(p, cls(p, **flags).param_groups[0]) is backends.for_loop
    assert backends.pick(p, cls(p, foreach=True).param_groups[0]) is backends.foreach


def test_threads_and_neighbours_change_no_bit():
    """Each element is computed alike wherever it lies: alone, in a piece of a tensor, on one thread or on two."""
    torch.manual_seed(0)
    whole = torch.randn(200_003)
    gradients = [torch.randn(200_003) for _ in range(3)]
    results = []
    for threads, cuts in ((1, [200_003]), (2, [200_003]), (2, [1, 63, 65, 70_001, 129_873])):
        torch.set_num_threads(threads)
        params = [torch.nn.Parameter(piece.clone()) for piece in whole.split(cuts)]
        optimizer = SAMSGradW(params, beta=100.0)
        for g in gradients:
            for p, piece in zip(params, g.split(cuts), strict=True):
                p.grad = piece.clone()
            optimizer.step()
        results.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_scaling_the_loss_by_a_power_of_two_changes_no_bit():
    results = []
    for scale in (1.0, 2.0**-20, 2.0**15):
        params = make()
        optimizer = SadamW(params)
        for t in range(20):
            set_gradients(params, t)
            for p in params:
                p.grad *= scale
            optimizer.step()
        results.append(params)
    for others in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], others, strict=True))


def odd_ones():
    torch.manual_seed(0)
    return {
        "float64": torch.nn.Parameter(torch.randn(5, dtype=torch.float64)),
        "complex": torch.nn.Parameter(torch.randn(5, dtype=torch.complex64)),
        "empty": torch.nn.Parameter(torch.randn(0, 3)),
        "strided": torch.nn.Parameter(torch.randn(6, 4)[:, ::2]),
        "transposed": torch.nn.Parameter(torch.randn(6, 4).t()),
        "channels last": torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        "plain": torch.nn.Parameter(torch.randn(100)),
        "half": torch.nn.Parameter(torch.randn(100).bfloat16()),
    }


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("beta", ["auto", 50.0])
@every_class
def test_what_it_does_not_serve_falls_back_one_by_one(cls, beta, fused):
    ones, others = odd_ones(), odd_ones()
    a, b = cls(ones.values(), beta=beta, fused=fused), cls(others.values(), beta=beta, fused=False)
    for t in range(5):
        for params in (ones, others):
            torch.manual_seed(t)
            for p in params.values():
                p.grad = torch.randn_like(p)
        a.step(), b.step()
    served = kernel_table(a).served
    ours = ("plain", "half", "transposed", "channels last")
    assert dict(zip(ones, served, strict=True)) == {name: name in ours for name in ones}
    for p, q in zip(ones.values(), others.values(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2 if p.dtype == torch.bfloat16 else 2e-6, atol=1e-6)
        assert a.state[p]["step"] == 5


def kernel_table(optimizer, group=0):
    return optimizer._memos[group]["cpu"]


def swap_data(params, optimizer):
    params[1].data = params[1].data.clone()


def shrink(params, optimizer):
    old = params[1].data
    params[1].data = old[:10].clone()
    state = optimizer.state[params[1]]
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = state[key][:10].clone()


def replace_moment(params, optimizer):
    optimizer.state[params[0]]["exp_avg"] = torch.ones(3, 5)


def move_moment(params, optimizer):
    optimizer.state[params[0]]["exp_avg"].data = torch.ones(3, 5)


def share(params, optimizer):
    for key in ("step", "exp_avg", "exp_avg_sq"):
        optimizer.state[params[1]][key].share_memory_()


def reload(params, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg"] = torch.ones(3, 5)
    optimizer.load_state_dict(state)


def forget(params, optimizer):
    del optimizer.state[params[2]]


def half(params, optimizer):
    params[1].data = params[1].data.bfloat16()
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[params[1]][key] = optimizer.state[params[1]][key].bfloat16()


def reorder(params, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def add(params, optimizer):
    params.append(torch.nn.Parameter(torch.ones(70)))
    optimizer.add_param_group({"params": [params[-1]]})


def freeze(params, optimizer):
    params[2].requires_grad_(False).grad = None


def count(params, optimizer):
    optimizer.state[params[0]]["step"] = torch.tensor(500.0)


@pytest.mark.parametrize(
    "change",
    [swap_data, shrink, replace_moment, move_moment, share, reload, forget, half, reorder, add, freeze, count],
    ids=lambda f: f.__name__,
)
def test_a_stale_address_is_never_used(change):
    results = []
    for fused in (True, False):
        params = make()
        optimizer = Sadam(params, lr=0.01, beta=50.0, fused=fused)
        train(optimizer, params, 3)
        change(params, optimizer)
        for t in range(3, 6):
            set_gradients(params, t)
            for p in params:
                p.grad = p.grad if p.requires_grad else None
            optimizer.step()
        results.append((params, [optimizer.state[p] for p in params]))
    (params, states), (others, other_states) = results
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2 if p.dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    for a, b in zip(states, other_states, strict=True):
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=2e-2, atol=1e-6)
        assert a["step"] == b["step"]


@pytest.mark.parametrize("change", ["strides", "dtype", "shape"])
def test_a_gradient_that_does_not_fit_is_not_read_as_if_it_did(change):
    results = []
    for fused in (True, False):
        p = torch.nn.Parameter(torch.ones(6, 6))
        optimizer = Sadam([p], lr=0.1, beta=50.0, fused=fused)
        for t in range(4):
            torch.manual_seed(t)
            g = torch.randn(6, 6)
            p.grad = g
            if t == 2 and change == "strides":
                p.grad = g.t()
            if t == 2 and change == "dtype":
                p.grad.data = g.bfloat16()
            if t == 2 and change == "shape":
                p.grad.data = g[0].clone()  # for the for-loop, a row that broadcasts
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("what", ["param", "grad", "exp_avg", "step"])
def test_freed_memory_is_an_error(what):
    p = torch.nn.Parameter(torch.ones(100))
    optimizer = Sadam([p], beta=50.0, fused=True)
    p.grad = torch.ones(100)
    optimizer.step()
    tensor = {"param": p, "grad": p.grad, **optimizer.state[p]}[what]
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has been freed"):
        optimizer.step()


def test_the_table_is_kept_and_dies_with_its_optimizer():
    import gc
    import weakref

    params = make()
    optimizer = SadamW(params)
    train(optimizer, params, 2)
    table = kernel_table(optimizer)
    train(optimizer, params, 2, start=2)
    assert kernel_table(optimizer) is table
    moment = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    del table
    optimizer.load_state_dict(optimizer.state_dict())  # the same tensors, but the table is gone
    with pytest.raises(KeyError):
        kernel_table(optimizer)
    train(optimizer, params, 1, start=4)
    del optimizer
    gc.collect()
    assert moment() is None


def test_autograd_notices_the_change():
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    Sadam([p], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torch_compile_takes_the_traceable_backend():
    torch._dynamo.reset()
    params, others = make()[:2], make()[:2]
    a, b = Sadam(params, lr=0.01, beta=50.0, fused=True), Sadam(others, lr=0.01, beta=50.0, fused=True)
    compiled = torch.compile(a.step, backend="eager", fullgraph=True)
    for t in range(3):
        set_gradients(params, t), set_gradients(others, t)
        compiled(), b.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# Where there is no kernel


@pytest.fixture
def no_kernel(monkeypatch):
    reason = "the package was built without a C compiler"
    monkeypatch.setattr(kernel, "load", lambda: reason)


def test_without_a_kernel_the_for_loop_runs_and_fused_says_what_is_missing(no_kernel):
    params = make()
    optimizer = SadamW(params)
    assert backends.pick(params, optimizer.param_groups[0]) is backends.for_loop
    train(optimizer, params, 2)
    with pytest.raises(RuntimeError, match="fused=True: a parameter is on cpu, and the package was built without"):
        SadamW(params, fused=True)
    optimizer.param_groups[0]["fused"] = True
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="fused=True"):
        train(optimizer, params, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    optimizer.param_groups[0]["fused"] = None
    with pytest.raises(RuntimeError, match="fused=True"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "fused": True})
    assert len(optimizer.param_groups) == 1


def test_a_device_without_a_kernel_is_named():
    with pytest.raises(RuntimeError, match="fused=True: a parameter is on meta"):
        Sadam([torch.nn.Parameter(torch.ones(2, device="meta"))], fused=True)


def test_a_library_that_cannot_be_loaded_is_a_reason_and_no_crash(tmp_path, monkeypatch):
    broken = tmp_path / "cpu.py"
    (tmp_path / "_cpu.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(kernel, "__file__", str(broken))
    reason = kernel.load.__wrapped__()
    assert reason.startswith("_cpu.abi3.so cannot be loaded (") and "rebuild" in reason
    (tmp_path / "_cpu.abi3.so").unlink()
    assert kernel.load.__wrapped__().startswith("the package was built without a C compiler")


def test_without_torchs_thread_pool_it_runs_on_one_thread(monkeypatch):
    torch.set_num_threads(2)
    library = kernel.load()
    assert (library.parallel_for is None) == (torch.__version__ < "2.10")
    results = []
    for parallel_for in (library.parallel_for, None):
        monkeypatch.setattr(kernel, "load", lambda f=parallel_for: library._replace(parallel_for=f))
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 100_000))]
        optimizer = SadamW(params, beta=50.0)
        train(optimizer, params, 2)
        results.append(params[0].detach())
    assert torch.equal(*results)


# Under the sanitizers

SANITIZED = """
import sys, torch
from sadam_integrations.backends import cpu as kernel
library = kernel.open_library(sys.argv[1])
kernel.load = lambda: library
from sadam_integrations import SadamW, SAMSGrad
if len(sys.argv) > 2:  # a fault on purpose: one block more than there is
    p = torch.nn.Parameter(torch.ones(640)); optimizer = SadamW([p]); p.grad = torch.ones(640); optimizer.step()
    optimizer._memos[0]["cpu"].arrays[0][0] += 64
    optimizer._memos[0]["cpu"].arrays[1][1] += 1
    optimizer.step()
for name in library.sets:
    kernel.force(name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for cls in (SadamW, SAMSGrad):
            params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (1, 3, 63, 64, 65, 640, 1000, 40_000)]
            optimizer = cls(params, weight_decay=0.1, maximize=cls is SAMSGrad)
            for t in range(3):
                for p in params:
                    p.grad = torch.randn_like(p) * 10.0 ** (t - 3)
                params[0].grad[0] = (1.0, float("inf"), float("nan"))[t]
                optimizer.step()
print("clean")
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The kernel built with AddressSanitizer and UndefinedBehaviorSanitizer, and the environment to load it in."""
    folder = tmp_path_factory.mktemp("sanitized")
    source, library = Path(kernel.__file__).with_name("_cpu.c"), folder / "_cpu.so"
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-math-errno"]
    build = ["gcc", "-shared", "-fPIC", *flags, str(source), "-o", str(library), "-lm"]
    try:
        subprocess.run(build, check=True, capture_output=True)
        runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no GCC with sanitizers: {error}")
    return library, {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}


def sanitized_run(sanitized, *arguments):
    import os

    library, environment = sanitized
    return subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library), *arguments],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=300,
    )  # fmt: skip


def test_the_sanitizers_find_nothing(sanitized):
    done = sanitized_run(sanitized)
    assert done.returncode == 0 and done.stdout == "clean\n", done.stderr[-3000:]


def test_the_sanitizers_would_find_a_fault(sanitized):
    done = sanitized_run(sanitized, "fault")
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_the_library_needs_nothing_but_c(tmp_path):
    """Neither torch's nor Python's headers or libraries: it builds and loads alone."""
    source, library = Path(kernel.__file__).with_name("_cpu.c"), tmp_path / "_cpu.so"
    try:
        done = subprocess.run(
            ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-std=c11", "-D_POSIX_C_SOURCE=200809L", "-shared", "-fPIC",
             str(source), "-o", str(library), "-lm"], capture_output=True, text=True,
        )  # fmt: skip
    except OSError:
        pytest.skip("no GCC")
    assert done.returncode == 0, done.stderr
    assert ctypes.CDLL(str(library)).sadam_supports(0) == 1
