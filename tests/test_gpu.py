"""What has to be seen on a GPU, for every backend that runs there: ``make test-gpu``. Skipped where there is none."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW, backends
from sadam_integrations.backends.for_loop import for_loop
from sadam_integrations.backends.foreach import foreach

module: Any = importlib.import_module("sadam_integrations.backends.triton")  # its name is that of the function
BACKENDS = {"for_loop": for_loop, "foreach": foreach, "triton": module.triton}
CLASSES = [Sadam, SAMSGrad, SadamW, SAMSGradW]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-11}
SHAPES = ((300, 70), (1024,), (5,), (), (0,), (4, 3, 2))

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Every optimizer of the test takes this backend."""
    if request.param == "triton" and (reason := module.unavailable()):
        pytest.skip(reason)
    monkeypatch.setattr(backends, "pick", lambda *_: BACKENDS[request.param])
    return request.param


def make(dtype=torch.float32, device="cuda", shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter(t.to(dtype).to(device)) for t in tensors]


def set_gradients(params, seed, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
        p.grad = gradient.to(p.dtype).to(p.device)


def train(params, optimizer, steps=5, first=0):
    for t in range(first, first + steps):
        set_gradients(params, t)
        optimizer.step()


def assert_close(params, others):
    for a, b in zip(params, others, strict=True):
        tolerance = TOLERANCE[a.dtype]
        torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=tolerance, atol=tolerance)


def on_cpu(cls, monkeypatch, dtype=torch.float32, steps=5, shapes=SHAPES, **options):
    """What the parameters become by the for-loop on a CPU."""
    params = make(dtype, "cpu", shapes)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "pick", lambda *_: for_loop)
        train(params, cls(params, **{**options, "capturable": False}), steps)
    return params


def settled(cls, params, **options):
    """An optimizer that has taken ordinary steps, as a graph's capture needs."""
    optimizer = cls(params, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(params, optimizer, 3)
    torch.cuda.current_stream().wait_stream(stream)
    return optimizer


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"beta": 50.0, "bias_correction": "outer", "weight_decay": 0.1},
        {"beta": 50.0, "bias_correction": "none", "maximize": True}, {"capturable": True, "beta": 1e4},
        {"beta": 1e-2, "betas": (0.0, 0.5)},
    ],
    ids=str,
)  # fmt: skip
def test_equals_the_for_loop_on_a_cpu(backend, monkeypatch, cls, dtype, options):
    params = make(dtype)
    train(params, cls(params, lr=0.01, **options))
    assert_close(params, on_cpu(cls, monkeypatch, dtype, lr=0.01, **options))


def test_unaligned_and_strided_tensors(backend):
    storage, same = torch.randn(3000, device="cuda"), None
    for device in ("cuda", "cpu"):
        flat = storage.to(device).clone()
        params = [torch.nn.Parameter(t) for t in (flat[1:1026], flat[1026:1100], flat[1100:1112].view(3, 4).t())]
        optimizer = SAMSGrad(params, lr=0.01, beta=50.0)
        for t in range(3):
            for i, p in enumerate(params):
                generator = torch.Generator().manual_seed(10 * t + i)
                p.grad = torch.randn(p.numel() + t, generator=generator).to(device)[t:].view(p.shape)
            optimizer.step() if device == "cuda" else for_loop_step(optimizer)
        same = same or params
    assert_close(same, params)


def for_loop_step(optimizer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "pick", lambda *_: for_loop)
        optimizer.step()


def test_many_steps_with_fresh_gradients_and_moved_parameters(backend, monkeypatch):
    params = make()
    optimizer = SadamW(params, lr=1e-3, beta=50.0)
    for first in range(0, 200, 50):
        train(params, optimizer, 50, first)
        for p in params:
            p.data = p.data.clone()
    assert_close(params, on_cpu(SadamW, monkeypatch, steps=200, lr=1e-3, beta=50.0))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_nothing_waits_for_the_gpu(backend, capturable, tensor_lr):
    if not capturable and (tensor_lr or backend != "triton"):
        pytest.skip("torch's own optimizers do not promise it either")
    params = make(shapes=[s for s in SHAPES if s != (0,)])  # what falls back is counted on the host
    lr = torch.tensor(0.01, device="cuda") if tensor_lr else 0.01
    optimizer = SadamW(params, lr=lr, beta=50.0, capturable=capturable)
    train(params, optimizer, 2)
    kept = []
    for t in range(3):
        set_gradients(params, t)
        kept.append([p.grad for p in params])  # so that each step has gradients in new places
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("fresh", [False, True], ids=["static gradients", "gradients of the capture"])
def test_a_cuda_graph_repeats_the_step(backend, monkeypatch, cls, fresh):
    shapes = SHAPES[:4]
    params = make(shapes=shapes)
    lr = torch.tensor(0.01, device="cuda")
    optimizer = settled(cls, params, lr=lr, beta=50.0, capturable=True)
    static = [torch.zeros_like(p) for p in params]
    graph = torch.cuda.CUDAGraph()
    if not fresh:
        for p, g in zip(params, static, strict=True):
            p.grad = g
    with torch.cuda.graph(graph):
        if fresh:
            for p, g in zip(params, static, strict=True):
                p.grad = g * 1.0
        optimizer.step()
    clones = make(shapes=shapes)
    for t in range(3, 6):
        set_gradients(clones, t)
        for g, p in zip(static, clones, strict=True):
            g.copy_(p.grad)
        graph.replay()
    assert_close(params, on_cpu(cls, monkeypatch, steps=6, shapes=shapes, lr=0.01, beta=50.0))
    assert all(optimizer.state[p]["step"] == 6 for p in params)


def test_a_graph_survives_ordinary_steps_with_other_gradients(backend, monkeypatch):
    params = make(shapes=SHAPES[:4])
    optimizer = settled(Sadam, params, lr=0.01, beta=50.0, capturable=True)
    static = [torch.zeros_like(p) for p in params]
    for p, g in zip(params, static, strict=True):
        p.grad = g
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    train(params, optimizer, 1, 3)  # eager, with gradients of its own
    for g, p in zip(static, params, strict=True):
        g.copy_(p.grad)
        p.grad = None
    torch.cuda.empty_cache()
    graph.replay()  # the gradients of step 3 once more
    others = make(device="cpu", shapes=SHAPES[:4])
    monkeypatch.setattr(backends, "pick", lambda *_: for_loop)
    reference = Sadam(others, lr=0.01, beta=50.0)
    train(others, reference, 4)
    train(others, reference, 1, 3)
    assert_close(params, others)


def test_a_capture_without_an_ordinary_step_before_it_is_correct(backend, monkeypatch):
    params = make(shapes=SHAPES[:4])
    optimizer = Sadam(params, lr=0.01, beta=50.0, capturable=True)
    for p in params:  # the state must not be born in the graph
        optimizer.state[p] = {
            "step": torch.zeros((), device="cuda"), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)
        }  # fmt: skip
    set_gradients(params, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    assert_close(params, on_cpu(Sadam, monkeypatch, steps=1, shapes=SHAPES[:4], lr=0.01, beta=50.0))


def test_grad_scaler_with_clipping_equals_unscaled_training(backend):
    runs = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1)).cuda()
        optimizer = SadamW(model.parameters(), lr=0.01, beta=50.0)
        scaler = torch.amp.GradScaler("cuda", enabled=scaled, init_scale=2.0**10, growth_interval=3)
        for t in range(8):
            torch.manual_seed(t)
            scaler.scale(model(torch.randn(16, 20, device="cuda")).square().mean() * 100).backward()
            if scaled and t == 4:
                next(model.parameters()).grad[0, 0] = float("inf")  # this step must be left out
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if scaled or t != 4:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert all(optimizer.state[p]["step"] == 7 for p in model.parameters())
        runs.append(list(model.parameters()))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [None, True])
def test_torch_compile_of_the_step(monkeypatch, fused):
    if fused and (reason := module.unavailable()):
        pytest.skip(reason)
    params = make(shapes=SHAPES[:3])
    optimizer = SadamW(params, lr=torch.tensor(0.01, device="cuda"), beta=50.0, capturable=True, fused=fused)
    step = torch.compile(optimizer.step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(4):
            set_gradients(params, t)
            step()
    assert_close(params, on_cpu(SadamW, monkeypatch, steps=4, shapes=SHAPES[:3], lr=0.01, beta=50.0))


def test_fused_true_keeps_the_steps_on_the_gpu(monkeypatch):
    if reason := module.unavailable():
        pytest.skip(reason)
    params = make()
    optimizer = SadamW(params, lr=0.01, fused=True)
    train(params, optimizer)
    assert all(optimizer.state[p]["step"].is_cuda for p in params)
    assert_close(params, on_cpu(SadamW, monkeypatch, lr=0.01))


def test_peak_memory_is_not_above_that_of_torchs_fused_adamw():
    if reason := module.unavailable():
        pytest.skip(reason)
    peaks = []
    for make_optimizer in (
        lambda params: torch.optim.AdamW(params, fused=True),
        lambda params: SadamW(params, beta=50.0, fused=True),
    ):
        params = make(shapes=[(1000, 1000)] * 8)
        optimizer = make_optimizer(params)
        train(params, optimizer, 2)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del params, optimizer
    assert peaks[1] <= peaks[0] + 100_000


def test_a_tensor_of_more_than_two_billion_elements():
    if reason := module.unavailable():
        pytest.skip(reason)
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    p = torch.nn.Parameter(torch.zeros(2**31 + 1030, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    Sadam([p], lr=0.01, beta=50.0, fused=True).step()
    torch.cuda.synchronize()
    assert p.detach()[0] < 0
    for start in range(0, p.numel(), 2**28):
        assert (p.detach()[start : start + 2**28] == p.detach()[0]).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_two_gpus(backend, monkeypatch):
    params = [p.detach().to(f"cuda:{i % 2}").requires_grad_() for i, p in enumerate(make())]
    with torch.cuda.device(0):
        train(params, SAMSGradW(params, lr=0.01, beta=50.0))
    assert_close(params, on_cpu(SAMSGradW, monkeypatch, lr=0.01, beta=50.0))
