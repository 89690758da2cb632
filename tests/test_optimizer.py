"""The four classes: every backend, dtype and flag against the specification, and the optimizer contract."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from sadam_integrations import PUBLISHED, Sadam, SadamW, SAMSGrad, SAMSGradW
from sadam_integrations.backends.for_loop import PIECE
from sadam_integrations.update import update

CLASSES = [Sadam, SAMSGrad, SadamW, SAMSGradW]
TOLERANCE = {
    torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.complex64: 2e-5,
}  # fmt: skip
FLAGS = {
    "default": {},
    "weight_decay": {"weight_decay": 0.1},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "outer": {"bias_correction": "outer", "weight_decay": 0.01},
    "none": {"bias_correction": "none"},
    "betas": {"betas": (0.0, 0.5), "lr": 0.1},
    "capturable": {"capturable": True},
    "tensor lr": {"lr": torch.tensor(0.02), "capturable": True},
    "large beta": {"beta": 1e6},
    "small beta": {"beta": 1e-2},
}

every_class = pytest.mark.parametrize("cls", CLASSES)
every_backend = pytest.mark.parametrize("foreach", [False, True, None], ids=["for_loop", "foreach", "kernel"])


def make(dtype=torch.float32, seed=0):
    """Parameters of every shape: 0-dim, empty, transposed, strided, and larger than a piece of the for-loop."""
    torch.manual_seed(seed)
    tensors = [
        torch.randn((), dtype=torch.float64), torch.randn(0, dtype=torch.float64), torch.randn(17, dtype=torch.float64),
        torch.randn(5, 3, dtype=torch.float64).t(), torch.randn(4, 6, dtype=torch.float64)[:, ::2],
        torch.randn(3, 4, dtype=torch.float64),
    ]  # fmt: skip
    return [torch.nn.Parameter(t.to(dtype) if dtype.is_floating_point else complex_like(t, dtype)) for t in tensors]


def complex_like(t, dtype):
    return torch.complex(t, t.flip(0) if t.dim() else -t).to(dtype)


def set_gradients(params, seed, scale=0.1):
    torch.manual_seed(seed)
    for p in params:
        noise = torch.randn(p.shape[::-1], dtype=p.dtype) * scale
        p.grad = noise.t() if p.dim() == 2 else noise  # a matrix's gradient is not contiguous


def spec(params, steps, options, amsgrad, decoupled, gradients=set_gradients):
    """What the parameters become by the specification."""
    options = {"lr": 0.01, "betas": (0.9, 0.999), "beta": 50.0, "weight_decay": 0.0, "maximize": False, **options}
    options = {"bias_correction": "inner", **options}
    options.pop("capturable", None)
    (beta1, beta2), lr = options.pop("betas"), float(options.pop("lr"))
    rows = [[p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)] for p in params]
    for row in rows:
        row.append(torch.zeros_like(row[0]) if amsgrad else None)
    for t in range(1, steps + 1):
        gradients(params, t)
        for row, p in zip(rows, params, strict=True):
            row[:] = update(
                row[0], p.grad, *row[1:], step=t, lr=lr, beta1=beta1, beta2=beta2, decoupled=decoupled, **options
            )
    return rows


@every_class
@every_backend
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("flags", FLAGS)
def test_equals_the_spec(cls, foreach, dtype, flags):
    amsgrad, decoupled = cls in (SAMSGrad, SAMSGradW), cls in (SadamW, SAMSGradW)
    options = {"lr": 0.01, "beta": 50.0, "weight_decay": 0.0, **FLAGS[flags]}
    params = make(dtype)
    optimizer = cls(params, foreach=foreach, **options)
    want = spec(make(dtype), 12, options, amsgrad, decoupled)
    for t in range(1, 13):
        set_gradients(params, t)
        optimizer.step()
    tolerance = TOLERANCE[dtype]
    for p, row in zip(params, want, strict=True):
        state = optimizer.state[p]
        torch.testing.assert_close(p.detach(), row[0], rtol=tolerance, atol=tolerance)
        for key, value in zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), row[1:], strict=True):
            if value is not None:
                torch.testing.assert_close(state[key], value, rtol=tolerance, atol=tolerance * 0.1)
        assert state["step"] == 12 and state["step"].dtype == torch.float32


@every_class
def test_tensors_larger_than_a_piece_of_the_for_loop(cls):
    sizes = [PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 17]
    options = {"lr": 0.01, "beta": 50.0, "weight_decay": 0.1}
    params = [torch.nn.Parameter(torch.randn(n)) for n in sizes]
    params += [torch.nn.Parameter(torch.randn(300, 400).t()), torch.nn.Parameter(torch.randn(400, 600)[:, ::2])]

    def gradients(params, t):
        for p in params:
            p.grad = torch.sin(torch.arange(p.numel()) * float(t)).reshape(p.shape)

    want = spec(params, 2, options, cls in (SAMSGrad, SAMSGradW), cls in (SadamW, SAMSGradW), gradients)
    optimizer = cls(params, foreach=False, **options)
    for t in (1, 2):
        gradients(params, t)
        optimizer.step()
    for p, row in zip(params, want, strict=True):
        torch.testing.assert_close(p.detach(), row[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], row[2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("beta", ["auto", 50.0])
@every_class
def test_foreach_serves_mixed_dtypes_in_one_group(cls, beta):
    params = [p for dtype in TOLERANCE for p in make(dtype)]
    others = copy.deepcopy(params)
    a, b = cls(params, beta=beta, foreach=True), cls(others, beta=beta, foreach=False)
    for t in range(5):
        for group, optimizer in ((params, a), (others, b)):
            set_gradients(group, t)
            optimizer.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=TOLERANCE[p.dtype], atol=TOLERANCE[p.dtype])


# Signatures and defaults


def test_signatures_are_the_documented_ones():
    want = [
        ("lr", 1e-3), ("betas", (0.9, 0.999)), ("beta", "auto"), ("weight_decay", 0.0), ("bias_correction", "inner"),
        ("maximize", False), ("foreach", None), ("fused", None), ("capturable", False), ("differentiable", False),
    ]  # fmt: skip
    for cls in CLASSES:
        parameters = list(inspect.signature(cls).parameters.values())[1:]
        decay = 1e-2 if cls in (SadamW, SAMSGradW) else 0.0
        assert [(p.name, p.default) for p in parameters] == [(k, decay if k == "weight_decay" else v) for k, v in want]
        keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert keyword_only == [k for k, _ in want[2:]]
        assert all(p.annotation is not p.empty for p in parameters)
        assert cls(make()).defaults == {p.name: p.default for p in parameters}
    assert PUBLISHED == {"lr": 1e-2, "beta": 50.0, "bias_correction": "outer"}


@every_class
def test_is_nobodys_special_case(cls):
    assert not issubclass(cls, (torch.optim.Adam, torch.optim.AdamW)) and issubclass(cls, torch.optim.Optimizer)
    optimizer = cls(make())
    for name in ("optimizer", "train", "eval", "_step_supports_amp_scaling"):
        assert not hasattr(optimizer, name)


@pytest.mark.parametrize("beta", ["auto", 50.0])
@every_class
def test_nothing_on_self_changes(cls, beta):
    params = make()
    optimizer = cls(params, beta=beta)
    before = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    copies = copy.deepcopy(before)
    for t in range(3):
        set_gradients(params, t)
        optimizer.step()
    after = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    assert after["defaults"] == copies["defaults"]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("beta", ["auto", 50.0])
@every_class
def test_state_has_torch_adams_keys_and_types(cls, beta, capturable):
    params = make()
    optimizer = cls(params, beta=beta, capturable=capturable)
    assert not optimizer.state
    set_gradients(params, 1)
    optimizer.step()
    keys = ["step", "exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * (cls in (SAMSGrad, SAMSGradW))
    for p in params:
        state = optimizer.state[p]
        assert sorted(state) == sorted(keys + ["beta"] * (beta == "auto"))
        assert state["step"].shape == () and state["step"].dtype == torch.float32 and state["step"].device.type == "cpu"
        assert all(state[k].shape == p.shape and state[k].dtype == p.dtype for k in keys[1:])
        assert beta != "auto" or type(state["beta"]) is float


# The step


@every_backend
@pytest.mark.parametrize("beta", ["auto", 50.0])
@every_class
def test_a_rate_of_zero_moves_nothing(cls, beta, foreach):
    params = make()
    before = [p.detach().clone() for p in params]
    optimizer = cls(params, lr=0.0, weight_decay=0.1, beta=beta, foreach=foreach)
    for t in range(3):
        set_gradients(params, t)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_closure_runs_once_first_with_gradients_and_is_returned():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer, calls = Sadam([p], beta=50.0), []
    p.grad = torch.full((3,), 1e6)  # must not be used: the closure sets another

    def closure():
        calls.append((torch.is_grad_enabled(), p.detach().clone()))
        optimizer.zero_grad()
        loss = (p * 2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert len(calls) == 1 and calls[0][0] and torch.equal(calls[0][1], torch.ones(3))
    assert loss.item() == 6.0 and torch.equal(p.grad, torch.full((3,), 2.0)) and (p < 1).all()
    assert optimizer.step() is None


@every_backend
def test_per_group_values_are_honoured(foreach):
    groups = [make(seed=i) for i in range(3)]
    own = [{}, {"beta": 5.0, "lr": 0.1}, {"bias_correction": "outer", "weight_decay": 0.3, "maximize": True}]
    alone = copy.deepcopy(groups)
    together = Sadam(
        [{"params": g, **o} for g, o in zip(groups, own, strict=True)], lr=0.01, beta=50.0, foreach=foreach
    )
    separate = [
        Sadam(g, **{"lr": 0.01, "beta": 50.0, "foreach": foreach, **o}) for g, o in zip(alone, own, strict=True)
    ]
    for t in range(3):
        for params in groups + alone:
            set_gradients(params, t)
        for optimizer in [together, *separate]:
            optimizer.step()
    for g, a in zip(groups, alone, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(g, a, strict=True))


@every_backend
@pytest.mark.parametrize("beta", ["auto", 50.0])
def test_parameters_without_a_gradient_are_skipped(beta, foreach):
    a, b, frozen = (torch.nn.Parameter(torch.ones(3), requires_grad=grad) for grad in (True, True, False))
    optimizer = SadamW([a, b, frozen], beta=beta, foreach=foreach)
    a.grad = torch.ones(3)
    optimizer.step()
    assert list(optimizer.state) == [a] and (a < 1).all()
    assert torch.equal(b, torch.ones(3)) and torch.equal(frozen, torch.ones(3))
    b.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[a]["step"] == 2 and optimizer.state[b]["step"] == 1


@every_backend
def test_lr_tensor_is_read_at_each_step_and_never_replaced(foreach):
    lr = torch.tensor(0.01)
    params, others = make(), make()
    a = Sadam(params, lr=lr, beta=50.0, foreach=foreach, capturable=bool(foreach))
    b = Sadam(others, lr=0.01, beta=50.0, foreach=foreach)
    for t in range(4):
        set_gradients(params, t), set_gradients(others, t)
        lr.fill_(0.01 * (t + 1))
        b.param_groups[0]["lr"] = 0.01 * (t + 1)
        a.step(), b.step()
        assert a.param_groups[0]["lr"] is lr
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers(tensor):
    params = make()
    optimizer = SadamW(params, lr=torch.tensor(0.1) if tensor else 0.1)
    schedulers = torch.optim.lr_scheduler
    for scheduler in (
        schedulers.LinearLR(optimizer, total_iters=3),
        schedulers.CosineAnnealingLR(optimizer, 10),
        schedulers.OneCycleLR(optimizer, 0.2, total_steps=10),
    ):
        set_gradients(params, 0)
        optimizer.step()
        rate = float(optimizer.param_groups[0]["lr"])
        scheduler.step()
        assert float(optimizer.param_groups[0]["lr"]) != rate
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == tensor
    plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0)
    plateau.step(1.0), plateau.step(2.0)
    assert float(optimizer.param_groups[0]["lr"]) < rate


def test_add_param_group_fills_in_the_constructors_values():
    optimizer = Sadam([torch.nn.Parameter(torch.ones(2))], beta=7.0, weight_decay=0.5)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.5, "name": "head"})
    group = optimizer.param_groups[1]
    assert (group["beta"], group["weight_decay"], group["lr"], group["name"]) == (7.0, 0.5, 0.5, "head")


def test_named_parameters():
    model = torch.nn.Linear(2, 2)
    optimizer = SadamW(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("beta", ["auto", 50.0])
@every_class
def test_deepcopy_and_pickle_continue_identically(cls, beta, duplicate):
    params = make()
    optimizer = cls(params, beta=beta)
    for t in range(3):
        set_gradients(params, t)
        optimizer.step()
    other = duplicate(optimizer)
    others = other.param_groups[0]["params"]
    for t in range(3, 6):
        set_gradients(params, t), set_gradients(others, t)
        optimizer.step(), other.step()
    assert all(p is not q and torch.equal(p, q) for p, q in zip(params, others, strict=True))


@every_backend
@pytest.mark.parametrize("beta", ["auto", 50.0])
@every_class
def test_capturable_on_a_cpu_is_the_same_step(cls, beta, foreach):
    params, others = make(), make()
    a, b = (cls(p, beta=beta, foreach=foreach, capturable=c) for p, c in ((params, True), (others, False)))
    for t in range(5):
        set_gradients(params, t), set_gradients(others, t)
        a.step(), b.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", ["auto", 50.0])
@every_class
def test_differentiable_lets_gradients_through_the_step(cls, beta):
    torch.manual_seed(0)
    start, first, second = (torch.randn(4, dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        probe = torch.nn.Parameter(start.clone())
        settled = cls([probe], beta=beta)
        probe.grad = first
        settled.step()
        constant = settled.state[probe].get("beta", 50.0)  # beta is a constant under autograd

    def two_steps(theta, g1, g2, lr):
        p = theta.clone()
        optimizer = cls([torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))], beta=constant, differentiable=True)
        optimizer.param_groups[0]["params"], optimizer.param_groups[0]["lr"] = [p], lr
        for p.grad in (g1, g2):
            optimizer.step()
        return p

    leaves = [t.clone().requires_grad_() for t in (start, first, second, torch.tensor(0.1, dtype=torch.float64))]
    assert torch.autograd.gradcheck(two_steps, leaves)


def test_differentiable_takes_beta_auto_as_a_constant():
    g = torch.tensor([0.3, -0.2], requires_grad=True)
    p = torch.zeros(2, requires_grad=True).clone()
    optimizer = Sadam([torch.nn.Parameter(torch.zeros(2))], lr=0.1, differentiable=True)
    optimizer.param_groups[0]["params"], p.grad = [p], g
    optimizer.step()
    assert type(optimizer.state[p]["beta"]) is float
    p.sum().backward()
    assert g.grad.isfinite().all() and (g.grad != 0).all()


@every_backend
@every_class
def test_a_compiled_step_is_the_same_step(cls, foreach):
    torch._dynamo.reset()
    params, others = make()[2:5], make()[2:5]
    a, b = (cls(p, lr=0.01, beta=50.0, weight_decay=0.1, foreach=foreach) for p in (params, others))
    compiled = torch.compile(a.step, backend="eager")
    for t in range(4):
        set_gradients(params, t), set_gradients(others, t)
        compiled(), b.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert a.state[p]["step"] == 4


def test_grad_scaler_on_a_cpu_skips_a_step_with_inf():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = Sadam([p], lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(p.sum() * torch.inf).backward()
    scaler.step(optimizer), scaler.update()
    assert torch.equal(p, torch.ones(2)) and not optimizer.state
    optimizer.zero_grad()
    scaler.scale((p * 3).sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(p.grad, torch.full((2,), 3.0))  # unscaled before the step
    assert (p < 1).all()


def test_step_hooks_run():
    p, seen = torch.nn.Parameter(torch.ones(1)), []
    optimizer = SAMSGradW([p])
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    p.grad = torch.ones(1)
    optimizer.step()
    assert seen == ["before", "after"]
