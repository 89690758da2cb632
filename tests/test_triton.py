"""The Triton kernel: run on a CPU by Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Reference
from torch import Tensor

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW, backends
from sadam_integrations.backends.for_loop import for_loop
from sadam_integrations.update import BIAS_CORRECTIONS

module: Any = importlib.import_module("sadam_integrations.backends.triton")  # its name is that of the function
triton = module.triton

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 3e-2}  # the interpreter truncates
DEFAULTS = {
    "lr": 0.01, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "decoupled": False, "bias_correction": "inner",
    "maximize": False, "gain": 1.0, "capturable": False,
}  # fmt: skip
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
pytestmark = needs_triton


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """Triton looks at the variable when a kernel is made, which is at the first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        module._kernel.cache_clear()
        yield
    module._kernel.cache_clear()


class Group:
    """What an optimizer keeps of a parameter group, stepped by a backend."""

    def __init__(self, params, backend=triton, *, amsgrad=False, beta=50.0, **options):
        self.params, self.backend, self.memo = list(params), backend, {}
        self.m, self.v = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.v_max = [torch.zeros_like(p) if amsgrad else None for p in self.params]
        self.steps = [torch.zeros((), device=p.device) for p in self.params]
        self.betas = list(beta) if isinstance(beta, list) else [beta] * len(self.params)
        self.options = {**DEFAULTS, **options}

    def step(self, grads):
        columns = (self.params, grads, self.m, self.v, self.v_max, self.steps, self.betas)
        self.backend(*columns, memo=self.memo, **self.options)

    @property
    def tensors(self):
        return [t for column in (self.params, self.m, self.v, self.v_max, self.steps) for t in column if t is not None]


def pair(params, **options):
    """The same group twice: for the kernel, and for the for-loop."""
    return Group([p.clone() for p in params], **options), Group([p.clone() for p in params], for_loop, **options)


def step_both(groups, grads):
    for group in groups:
        group.step([g.clone() for g in grads])


def assert_same(groups, dtype=torch.float32, scale=1.0):
    for a, b in zip(groups[0].tensors, groups[1].tensors, strict=True):
        assert type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale, equal_nan=True)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shifted(t, offset):
    """The same numbers, ``offset`` elements into a storage."""
    return torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)


# The numbers


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, *TOLERANCE]))
    every = st.sampled_from([(), (1,), (7,), (3, 5), (1023,), (1024,), (2, 600)])
    shapes = draw(st.lists(every, min_size=1, max_size=4))
    scale = 10.0 ** draw(st.integers(-12, 6) if dtype == torch.float32 else st.integers(-1, 0))
    zeros = draw(st.sampled_from([0.0, 0.0, 0.5, 1.0]))
    thetas = [torch.tensor(rng.standard_normal(shape)).to(dtype) for shape in shapes]

    def gradient(shape):
        g = scale * rng.standard_normal(shape) * 10 ** rng.uniform(-2, 0, shape) * (rng.random(shape) >= zeros)
        return torch.tensor(g).to(dtype)

    gradients = [[gradient(shape) for shape in shapes] for _ in range(draw(st.integers(1, 4)))]
    beta1, beta2 = draw(st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.95, 0.0), (0.8, 0.9)]))
    options = {
        "lr": draw(st.sampled_from([0.0, 1e-5, 1e-3, 0.1])), "beta1": beta1, "beta2": beta2,
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.3])), "decoupled": draw(st.booleans()),
        "bias_correction": draw(st.sampled_from(BIAS_CORRECTIONS)), "maximize": draw(st.booleans()),
    }  # fmt: skip
    betas = [10.0 ** draw(st.floats(-6, 12)) for _ in shapes]
    offsets = [draw(st.sampled_from([0, 0, 1, 2, 4])) for _ in shapes]
    return thetas, gradients, options, betas, draw(st.booleans()), offsets


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems())
def test_equals_the_independent_transcription(problem):
    thetas, gradients, options, betas, amsgrad, offsets = problem
    dtype = thetas[0].dtype
    group = Group(
        [shifted(t, offset) for t, offset in zip(thetas, offsets, strict=True)], amsgrad=amsgrad, beta=betas, **options
    )
    for grads in gradients:
        group.step([shifted(g, offset) for g, offset in zip(grads, offsets, strict=True)])
    settings_ = {k: options[k] for k in ("lr", "weight_decay", "decoupled", "bias_correction", "maximize")}
    for i, theta in enumerate(thetas):
        pair_of_betas = (options["beta1"], options["beta2"])
        reference = Reference(theta.double(), betas=pair_of_betas, beta=betas[i], amsgrad=amsgrad, **settings_)
        moved, largest_g = np.abs(reference.theta), 0.0
        for grads in gradients:
            before = reference.theta
            reference.step(grads[i].double())
            moved = np.maximum(moved, np.abs(reference.theta)) + np.abs(reference.theta - before)
            largest_g = np.maximum(largest_g, np.abs(grads[i].double().numpy()) + options["weight_decay"] * moved)
        tiny = {torch.float32: 1e-38, torch.bfloat16: 1e-38, torch.float16: 1e-4}[dtype]
        pairs = [(group.m[i], reference.m, largest_g), (group.v[i], reference.v, largest_g**2)]
        pairs += [(group.v_max[i], reference.largest_v, largest_g**2)] if amsgrad else []
        if dtype == torch.float32:  # a parameter's error is bounded by its movement only where the moments keep theirs
            pairs.append((group.params[i], reference.theta, moved))
        for got, expected, bound in pairs:
            assert got.dtype == dtype and got.shape == theta.shape
            error = np.abs(got.double().numpy() - expected)
            assert (error <= 2 * TOLERANCE[dtype] * bound + tiny).all(), (error / (bound + tiny)).max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_equals_the_for_loop_in_every_dtype(dtype, amsgrad):
    params = [randn(*shape, dtype=dtype) for shape in ((5,), (1025,), (), (2, 3))]
    groups = pair(params, amsgrad=amsgrad, weight_decay=0.1, decoupled=amsgrad, beta=[50.0, 1e-3, 1e6, 0.5])
    for t in range(4):
        step_both(groups, [randn(*p.shape, seed=t, dtype=dtype) * 0.1 for p in params])
    assert_same(groups, dtype, 2.0)


@pytest.mark.parametrize("bias_correction", BIAS_CORRECTIONS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_its_error_is_no_larger_than_that_of_torchs_float32_loop(bias_correction, amsgrad):
    rng = np.random.default_rng(0)
    scale = 10 ** rng.uniform(-8, 2, 1000)
    theta = rng.standard_normal(1000).astype(np.float32)
    options = {"lr": 0.01, "bias_correction": bias_correction}
    groups = pair([torch.tensor(theta)], amsgrad=amsgrad, **options)
    reference = Reference(theta, betas=(0.9, 0.999), beta=50.0, amsgrad=amsgrad, **options)
    for _ in range(20):
        gradient = (rng.standard_normal(1000) * scale).astype(np.float32)
        reference.step(gradient)
        step_both(groups, [torch.tensor(gradient)])
    ours, loop = (np.abs(group.params[0].double().numpy() - reference.theta) for group in groups)
    assert ours.mean() < 1.05 * loop.mean() and ours.max() < 1.5 * loop.max() < 1e-5


def test_three_hundred_steps_do_not_drift():
    rng = np.random.default_rng(1)
    options = {"weight_decay": 0.01, "decoupled": True, "lr": 1e-3}
    start = np.float32([1.0, -1.0, 0.5])
    group = Group([torch.tensor(start)], amsgrad=True, **options)
    reference = Reference(start, betas=(0.9, 0.999), beta=50.0, amsgrad=True, **options)
    for gradient in np.float32(rng.standard_normal((300, 3)) * [1e-4, 1e-2, 1.0]):
        group.step([torch.tensor(gradient)])
        reference.step(gradient)
    np.testing.assert_allclose(group.params[0], reference.theta, rtol=1e-5)
    assert group.steps[0] == 300


@pytest.mark.parametrize("decoupled", [False, True])
def test_beta_zero_moves_nothing_but_keeps_the_moments(decoupled):
    params = [randn(9), randn(1500, seed=1)]
    groups = pair(params, amsgrad=True, beta=[0.0, 50.0], weight_decay=0.1, decoupled=decoupled)
    for t in range(2):
        step_both(groups, [randn(9, seed=t), randn(1500, seed=t)])
    assert_same(groups)
    assert torch.equal(groups[0].params[0], groups[1].params[0])
    assert torch.equal(groups[0].params[0], params[0]) != decoupled


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("beta", [50.0, 0.0])
def test_infinite_and_missing_numbers_go_where_they_go_in_the_for_loop(amsgrad, beta):
    groups = pair([randn(6)], amsgrad=amsgrad, beta=beta)
    step_both(groups, [torch.tensor([1e30, float("nan"), 1.0, 0.0, 1e-30, 1.0])])
    step_both(groups, [torch.tensor([1.0, 1.0, float("inf"), float("nan"), 0.0, -1e30])])
    assert_same(groups)


def test_an_offset_beyond_two_billion_elements():
    first_chunk = 2**31 // module.BLOCK + 3
    groups = pair([randn(1030)])
    step_both(groups, [randn(1030, seed=1)])
    (launch,) = groups[0].memo["triton"].launches
    launch.table[0] += first_chunk * module.BLOCK
    launch.table[1:] -= first_chunk * module.BLOCK * 4
    launch.chunks[1] += first_chunk
    gradient = randn(1030, seed=2)
    launch.addresses, launch.gradients = [gradient.data_ptr()], torch.tensor([gradient.data_ptr()])
    launch.gradients -= first_chunk * module.BLOCK * 4
    groups[0].step([gradient])
    groups[1].step([gradient])
    assert_same(groups)


# Which tensors


@pytest.mark.parametrize("amsgrad", [False, True])
def test_what_the_kernel_does_not_serve_takes_the_for_loop(amsgrad):
    params = [
        randn(5), randn(5).double(), torch.view_as_complex(randn(4, 2)), randn(3, 4).t(), randn(0), randn(4, 6)[:, ::2],
        randn(7, dtype=torch.bfloat16), randn(1025), randn(2, 3),
    ]  # fmt: skip
    groups = pair(params, amsgrad=amsgrad)
    for group in groups:
        group.params[3], group.params[5] = randn(3, 4).t(), randn(4, 6)[:, ::2]
        group.m[7] = group.m[7].bfloat16()
    for t in range(3):
        grads = [randn(*p.shape, seed=t).to(p.dtype) for p in params]
        for group in groups:
            group.step([*(g.clone() for g in grads[:-1]), grads[-1].t().contiguous().t()])
    kinds = [kind and kind[1] for kind in groups[0].memo["triton"].kinds]
    assert kinds == [torch.float32, *[None] * 5, torch.bfloat16, None, None]
    assert_same(groups, torch.bfloat16, 0.1)
    assert torch.equal(groups[0].params[1], groups[1].params[1]) and groups[0].steps[1] == 3


def test_a_gradient_that_is_strided_for_one_step():
    groups = pair([randn(4, 3)])
    for t, strided in enumerate([False, True, False, False]):
        grad = randn(4, 3, seed=t)
        for group in groups:
            group.step([grad.t().contiguous().t() if strided else grad.clone()])
        assert all(groups[0].memo["triton"].served) != strided
    assert_same(groups)


def test_the_table_is_kept_and_fresh_gradients_are_found():
    groups = pair([randn(1025), randn(6)])
    tables, kept = [], []
    for t in range(4):
        grads = [shifted(randn(1025, seed=t), t % 3), randn(6, seed=t)]
        kept.append(grads)  # so that no address comes again
        groups[0].step(grads)
        groups[1].step(grads)
        tables.append(groups[0].memo["triton"])
    assert all(table is tables[0] for table in tables)
    assert_same(groups)


def test_moved_and_replaced_tensors_are_never_read_where_they_were():
    groups = pair([torch.nn.Parameter(randn(1025)), randn(6)], amsgrad=True)
    old = []

    def change(what):
        for group in groups:
            if what == "param.data":
                old.append(group.params[0].data)
                group.params[0].data = group.params[0].data.clone()
            elif what == "set_":
                old.append(group.m[0].detach().view(-1)[:])
                group.m[0].set_(group.m[0].clone())
            elif what == "replaced":
                old.extend([group.v[1], group.v_max[1]])
                group.v[1], group.v_max[1] = group.v[1].clone(), group.v_max[1].clone()
            elif what == "strided":  # at the same address
                wide = torch.stack([group.m[1], group.m[1]], 1)
                group.m[1].set_(wide.view(-1)[:6].copy_(group.m[1].clone()))
                group.step([g.clone() for g in still])
                wide[:, 0] = group.m[1].clone()
                group.m[1] = wide[:, 0]
            elif what == "fewer":
                for column in (group.params, group.m, group.v, group.v_max, group.steps, group.betas):
                    column.pop(0)

    with torch.no_grad():
        for t, what in enumerate(["", "param.data", "set_", "replaced", "", "strided", "fewer", ""]):
            still = [torch.zeros_like(p) for p in groups[0].params]
            change(what)
            before = [t.clone() for t in old]
            step_both(groups, [randn(*p.shape, seed=t) for p in groups[0].params])
            assert all(torch.equal(a, b) for a, b in zip(old, before, strict=True)), what
            assert_same(groups)


def test_the_compiler_is_told_of_an_alignment_only_where_there_is_one(monkeypatch):
    module._kernel()
    told = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **compiled_in: told.append(compiled_in["ALIGNED"])

    monkeypatch.setattr(module, "_kernel", Kernel)
    for param_offset, grad_offset in ((0, 0), (1, 0), (4, 4), (0, 3)):
        group = Group([randn(8), shifted(randn(20), param_offset)])
        group.step([randn(8), shifted(randn(20), grad_offset)])
        group.step([randn(8), randn(20)])
    assert told == [True, True, False, False, True, True, False, True]


def test_autograd_sees_that_the_parameter_has_changed():
    p = torch.nn.Parameter(randn(5))
    product = (p * p).sum()
    with torch.no_grad():
        Group([p]).step([randn(5)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.fixture
def mesh():
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_dtensors_are_updated_by_their_shards(mesh):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    params = [randn(1026), randn(3, 4), randn(5)]
    plain = Group([p.clone() for p in params], for_loop)
    sharded = Group([*(distribute_tensor(p, mesh, [Shard(0)]) for p in params[:2]), params[2].clone()])
    old = sharded.params[0].to_local()
    for t in range(4):
        if t == 3:  # what a wrapper does that moves or reshards a module
            before = old.clone()
            sharded.params[0]._local_tensor = old.clone()
        grads = [randn(*p.shape, seed=t) for p in params]
        other = [DTensor.from_local(grads[1], mesh, [Partial()]), distribute_tensor(grads[1], mesh, [Replicate()])]
        second = other[t] if t < 2 else distribute_tensor(grads[1], mesh, [Shard(0)])
        sharded.step([distribute_tensor(grads[0], mesh, [Shard(0)]), second, grads[2]])
        plain.step(grads)
        assert sharded.memo["triton"].served == [True, t >= 2, True]
        for a, b in zip(sharded.tensors, plain.tensors, strict=True):
            torch.testing.assert_close(a.full_tensor() if hasattr(a, "full_tensor") else a, b, rtol=2e-5, atol=2e-5)
    assert torch.equal(old, before)


# The optimizers


@pytest.mark.parametrize("cls", [Sadam, SAMSGrad, SadamW, SAMSGradW])
@pytest.mark.parametrize(
    "options", [{}, {"beta": 50.0, "bias_correction": "outer"}, {"weight_decay": 0.1, "maximize": True}], ids=str
)
def test_the_four_classes(monkeypatch, cls, options):
    runs = []
    for backend in (triton, for_loop):
        monkeypatch.setattr(backends, "pick", lambda *_, backend=backend: backend)
        params = [torch.nn.Parameter(randn(*shape)) for shape in ((40, 30), (30,), ())]
        optimizer = cls([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], lr=0.01, **options)
        for t in range(5):
            for i, p in enumerate(params):
                p.grad = randn(*p.shape, seed=10 * t + i)
            optimizer.step()
            if t == 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# CUDA graphs, as far as they can be seen without a GPU


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=str)
def test_capturable_reads_nothing_from_the_device(monkeypatch, lr):
    groups = pair([randn(1025), randn(6)], capturable=True, lr=lr, weight_decay=0.1, decoupled=True)
    for name in ("item", "tolist", "numpy", "__float__", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, None)
    groups[0].step([randn(1025, seed=1), randn(6, seed=1)])
    monkeypatch.undo()
    groups[1].step([randn(1025, seed=1), randn(6, seed=1)])
    assert_same(groups)


def test_a_captured_step_keeps_all_that_it_reads(monkeypatch):
    groups = pair([randn(1025), randn(6)], capturable=True)
    memo, kept_grads = groups[0].memo, []

    def step(capturing):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capturing)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        grads = [randn(1025, seed=3), randn(6, seed=3)]
        kept_grads.append(grads)  # so that no address comes again
        for group in groups:
            group.step(grads)
        return grads

    step(capturing=True)
    assert not memo, "the kernel ran without the step before the capture that it needs"
    step(capturing=False)
    (launch,) = memo["triton"].launches
    row, spare = launch.gradients, launch.spare
    grads = step(capturing=True)
    captured, kept, sharpness = launch.in_graphs[0]
    assert kept is spare and spare.tolist() == [g.data_ptr() for g in grads] and sharpness is launch.sharpness
    assert captured is not row and launch.gradients is row and memo["triton in graphs"] == [memo["triton"]]
    step(capturing=False)
    assert launch.spare is not spare and spare.tolist() == [g.data_ptr() for g in grads]
    groups[0].betas = groups[1].betas = [40.0, 50.0]
    step(capturing=True)
    assert len(launch.in_graphs) == 1, "betas that are not on the device yet cannot be captured"
    assert_same(groups)


# A real GPU's compiler, which runs without one

COMPILE = """
import re, sys
import sadam_integrations.backends.triton
module = sys.modules["sadam_integrations.backends.triton"]
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kernel = module._kernel()
names = ["DTYPE", "BLOCK", "AMSGRAD", "MAXIMIZE", "COUPLED", "ALIGNED"]
for dtype, flag in ((tl.float32, True), (tl.bfloat16, False), (tl.float16, True)):
    for aligned in (True, False):
        types = ["*i64", "*i64", "*i32", "*fp32", "i32", *["fp32"] * 5, *["constexpr"] * 6]
        source = ASTSource(
            fn=kernel, signature=dict(zip(kernel.arg_names, types)),
            constexprs=dict(zip(names, [dtype, 1024, flag, flag, not flag, aligned])),
            attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
        )
        options = {"enable_fp_fusion": True}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        assert "sqrt.rn.f32" in ptx and "div.rn.f32" in ptx and ".f64" not in ptx
        print(dtype, aligned, len(re.findall(r"(?:ld|st)\\.global\\.v4", ptx)))
"""


def test_the_kernel_compiles_for_a_gpu_with_sixteen_byte_loads_and_stores(tmp_path):
    if not importlib.util.find_spec("triton.backends.nvidia"):
        pytest.skip("this Triton has no compiler for NVIDIA's GPUs")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    output = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=200)
    assert not output.returncode, output.stderr[-4000:]
    found = {tuple(line.split()[:2]): int(line.split()[2]) for line in output.stdout.splitlines()}
    assert found == {
        ("fp32", "True"): 18, ("fp32", "False"): 0, ("bf16", "True"): 7, ("bf16", "False"): 0,
        ("fp16", "True"): 9, ("fp16", "False"): 0,
    }  # fmt: skip


# Where it can run


def test_it_says_why_it_cannot_run(monkeypatch):
    assert module.unavailable() is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.unavailable() == "torch sees no GPU"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in module.unavailable()


def test_importing_the_module_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import sadam_integrations.backends.triton as t; assert t"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
