"""Tensors that look like plain ones to a kernel and are not: the result is the for-loop's, or an error."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch

from sadam_integrations import Sadam, SadamW
from sadam_integrations.backends import cpu as kernel

every_way = pytest.mark.parametrize(
    "flags", [{}, {"foreach": False}, {"foreach": True}], ids=["kernel", "for-loop", "foreach"]
)
with_kernel = pytest.mark.skipif(isinstance(kernel.load(), str), reason="there is no kernel here")


def result(prepare, **flags):
    """The parameter after three steps, the second of which is on the tensors that `prepare` has changed."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = Sadam([p], **{"lr": 0.1, "beta": 50.0, **flags})
    p.grad = torch.randn(8, 8)
    optimizer.step()
    prepare(p, optimizer)
    optimizer.step()
    optimizer.step()
    return p.detach().clone()


def negative(p, optimizer):
    p.grad = torch.complex(torch.zeros(8, 8), p.grad).conj().imag
    assert p.grad.is_neg()


def zero(p, optimizer):
    p.grad = torch._efficientzerotensor((8, 8))


def transposed(p, optimizer):
    p.data = p.data.t()


def half_moments(p, optimizer):
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][key] = optimizer.state[p][key].bfloat16()


@pytest.mark.parametrize("beta", ["auto", 50.0])
@pytest.mark.parametrize("prepare", [negative, zero, transposed, half_moments], ids=lambda f: f.__name__)
@pytest.mark.parametrize("flags", [{}, {"foreach": True}], ids=["kernel", "foreach"])
def test_an_unusual_tensor_gives_the_for_loops_result(prepare, flags, beta):
    torch.testing.assert_close(
        result(prepare, beta=beta, **flags), result(prepare, beta=beta, foreach=False), rtol=1e-5, atol=1e-6
    )


def test_autograds_negative_gradients_are_read_with_their_sign():
    """A parameter of one element that meets a conjugate: its gradient is contiguous and has the sign beside it."""
    phases = []
    for fused in (None, False):
        phase, weight = torch.nn.Parameter(torch.tensor(0.5)), torch.tensor(2.0 + 3.0j)
        optimizer = Sadam([phase], lr=0.01, fused=fused)
        for _ in range(30):
            optimizer.zero_grad()
            loss = ((torch.complex(torch.tensor(0.3), phase).conj() * weight).real - 1) ** 2
            loss.backward()
            optimizer.step()
        assert loss < 0.5  # from 1.2
        phases.append(phase)
    torch.testing.assert_close(*phases)


@pytest.mark.parametrize("view", ["shorter", "half"])
@every_way
def test_a_view_of_the_same_memory_that_no_longer_fits_is_an_error(view, flags):
    p = torch.nn.Parameter(torch.randn(128))
    behind = p.data[64:]
    optimizer = Sadam([p], lr=0.1, beta=50.0, **flags)
    p.grad = torch.randn(128)
    optimizer.step()
    before = behind.clone()
    p.data = p.data[:64] if view == "shorter" else p.data.view(torch.bfloat16)[:128]
    if view == "shorter":
        with pytest.raises(RuntimeError):
            optimizer.step()
    else:
        optimizer.step()
    assert torch.equal(behind, before)


@pytest.mark.parametrize("what", ["param", "grad"])
@with_kernel
def test_freed_memory_is_an_error_while_beta_is_measured_too(what):
    p = torch.nn.Parameter(torch.ones(100))
    optimizer = Sadam([p], weight_decay=0.1)
    p.grad = torch.ones(100)
    {"param": p, "grad": p.grad}[what].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has been freed"):
        optimizer.step()


@every_way
def test_the_default_device_and_dtype_do_not_matter(flags):
    results = []
    for device, dtype in (("cpu", torch.float32), ("meta", torch.float64)):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 3000))
        optimizer = SadamW([p], **flags)
        p.grad = torch.linspace(-3, 3, 3000)
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(p)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("way", ["attribute", "hook", "module"])
@pytest.mark.parametrize("beta", ["auto", 50.0])
@every_way
def test_an_optimizer_that_its_parameters_lead_to_is_freed(way, beta, flags):
    p = torch.nn.Parameter(torch.ones(100))
    optimizer = SadamW([p], beta=beta, **flags)
    if way == "attribute":
        p.optimizer = optimizer
    elif way == "hook":
        p.register_hook(lambda grad, it=optimizer: None)
    else:
        module = torch.nn.Module()
        module.p, module.optimizer = p, optimizer
        p.register_hook(lambda grad, it=module: None)
        del module
    p.grad = torch.ones(100)
    optimizer.step()
    gone = weakref.ref(p)
    del p, optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@with_kernel
def test_a_parameter_that_is_listed_four_times_takes_four_steps():
    torch.manual_seed(0)
    start, grads = torch.randn(200_000), torch.randn(5, 200_000)
    results = []
    for flags in ({}, {"foreach": False}):
        p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(9))
        optimizer = SadamW([p, q, p, p, p], lr=0.1, beta=50.0, bias_correction="none", **flags)
        for grad in grads:
            p.grad, q.grad = grad.clone(), torch.ones(9)
            optimizer.step()
        assert optimizer.state[p]["step"] == 20 and optimizer.state[q]["step"] == 5
        results.append(p)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_state_of_ones_own_may_have_any_shape():
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = SadamW([p])
    p.grad = torch.ones(5)
    optimizer.step()
    optimizer.state[p]["seen"] = torch.zeros(3)
    duplicate = copy.deepcopy(optimizer)
    assert torch.equal(duplicate.state[duplicate.param_groups[0]["params"][0]]["seen"], torch.zeros(3))


@every_way
def test_small_half_precision_gradients_outlive_flushed_denormals(flags):
    p = torch.nn.Parameter(torch.ones(64, dtype=torch.float16))
    optimizer = Sadam([p], lr=0.1, **flags)
    p.grad = torch.full((64,), 1e-5, dtype=torch.float16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        optimizer.step()
    finally:
        torch.set_flush_denormal(False)
    assert (optimizer.state[p]["exp_avg"] > 0).all() and (p < 0.95).all()


@pytest.mark.parametrize("beta", [1e-30, 1e-20, 1e20, 9.9e37])
@every_way
def test_the_ends_of_betas_range(beta, flags):
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = Sadam([p], lr=0.1, beta=beta, **flags)
    p.grad = torch.tensor([0.0, 0.5])
    optimizer.step()
    assert p[0] == 1.0 and math.isfinite(p[1]) and (p[1] < 2.0) == (beta > 1)


@with_kernel
def test_a_bare_step_of_half_precision_stays_within_its_memory():
    p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = Sadam([p], beta=50.0)
    memory = torch.ones(128, dtype=torch.bfloat16)
    p.data, p.grad = memory[:64], torch.ones(64, dtype=torch.bfloat16)
    with kernel.bare():
        optimizer.step()
    assert torch.equal(memory[64:], torch.ones(64, dtype=torch.bfloat16))


@with_kernel
def test_a_library_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(kernel, "FACTORS", kernel.FACTORS + 8)
    found = kernel.load.__wrapped__()
    assert "another version of the package" in found and "pip install" in found


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_autograd_sees_that_a_dtensor_was_changed():
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        optimizer = Sadam([p], beta=50.0)
        loss = (p * p).full_tensor().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    finally:
        torch.distributed.destroy_process_group()
