"""The seven requirements of ``beta="auto"``, whatever rule meets them."""

from __future__ import annotations

import copy
import logging
import math
import sys
import warnings
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW, calibration, chosen_betas
from sadam_integrations.update import softplus

CLASSES = [Sadam, SAMSGrad, SadamW, SAMSGradW]
every_class = pytest.mark.parametrize("cls", CLASSES)
every_backend = pytest.mark.parametrize("foreach", [False, True, None], ids=["for_loop", "foreach", "kernel"])


def parameters(dtype=torch.float32):
    """A vector, a matrix, a 0-dim tensor, an empty one and an embedding, some of whose rows are never used."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in ((50,), (8, 9), (), (0,), (20, 6))]


def gradients(params, t, factor=1.0):
    """Noisy gradients whose size spans three decades over the coordinates; half of the embedding's rows stay zero."""
    for i, p in enumerate(params):
        torch.manual_seed(1000 * i + t)
        sizes = torch.logspace(-4, -1, max(p.numel(), 1), dtype=torch.float32)[: p.numel()].reshape(p.shape)
        grad = torch.randn(p.shape) * sizes
        if p.dim() and p.shape[0] == 20:
            grad[10:] = 0
        p.grad = (grad * factor).to(p.dtype)


def train(optimizer, params, steps, factor=1.0, start=1):
    for t in range(start, start + steps):
        gradients(params, t, factor)
        optimizer.step()
    return [p.detach().clone() for p in params]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# 1. Scale-free


@pytest.mark.parametrize("factor", [1024.0, 1 / 1024, 2.0**-30, 2.0**-40], ids=["1024", "1/1024", "2^-30", "2^-40"])
@every_backend
@every_class
def test_scaling_the_loss_by_a_power_of_two_changes_no_bit(cls, foreach, factor):
    if foreach is None and factor == 2.0**-40:
        pytest.skip("gradients of 1e-18 have subnormal squares, which the kernel takes for zero")
    runs = []
    for f in (1.0, factor):
        params = parameters()
        optimizer = cls(params, lr=0.01, foreach=foreach, weight_decay=0.1 if cls in (SadamW, SAMSGradW) else 0.0)
        runs.append((train(optimizer, params, 70, f), list(chosen_betas(optimizer).values())))
    assert same(runs[0][0], runs[1][0])
    assert not same(runs[0][0], parameters())
    assert all(b == a / factor for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_scaling_a_real_loss_changes_no_bit():
    results = []
    for factor in (1.0, 1024.0, 1 / 1024):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(30, 8), torch.nn.Flatten(), torch.nn.Linear(32, 3))
        optimizer = SadamW(model.parameters(), lr=3e-2)
        for _ in range(40):
            tokens = torch.randint(0, 20, (16, 4))  # rows 20 to 29 never get a gradient
            loss = torch.nn.functional.cross_entropy(model(tokens), tokens[:, 0] % 3)
            optimizer.zero_grad()
            (loss * factor).backward()
            optimizer.step()
        results.append((loss.item(), [p.detach() for p in model.parameters()]))
    assert results[0][0] < 0.9  # it learns
    assert same(results[0][1], results[1][1]) and same(results[0][1], results[2][1])


# 2. AdamW's learning rate transfers: docs/beta.md has the evidence; here, that the step has Adam's size


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 10.0])
@every_class
def test_a_step_is_of_the_order_of_the_learning_rate(cls, scale):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(10_000))
    optimizer = cls([p], lr=1e-3, weight_decay=0.0)
    sizes = torch.randn(10_000).exp()
    for _ in range(64):
        before = p.detach().clone()
        p.grad = scale * sizes * (1 + torch.randn(10_000))
        optimizer.step()
    moved = (p.detach() - before).square().mean().sqrt().item()
    assert 0.1 * 1e-3 < moved < 3e-3


# 3. It is still Sadam


def spread(denominators):
    low, high = torch.quantile(1 / denominators, torch.tensor([0.01, 0.99], dtype=torch.float64))
    return (high / low).item()


@pytest.mark.parametrize("sigma", [1.0, 2.0])
@every_class
def test_the_spread_of_the_adaptive_rate_is_at_most_a_third_of_adams(cls, sigma):
    torch.manual_seed(0)
    sizes = (sigma * torch.randn(20_000)).exp() * 1e-4
    ours, theirs = (torch.nn.Parameter(torch.zeros(20_000)) for _ in range(2))
    optimizer, adam = cls([ours], lr=1e-3), torch.optim.Adam([theirs], lr=1e-3)
    for _ in range(64):
        ours.grad = theirs.grad = sizes * torch.randn(20_000)
        optimizer.step(), adam.step()
    correction = 1 / (1 - 0.999**64) ** 0.5
    state = optimizer.state[ours]
    v = state.get("max_exp_avg_sq", state["exp_avg_sq"]).double()
    mine = spread(softplus(v.sqrt() * correction, state["beta"]))
    assert mine <= spread(adam.state[theirs]["exp_avg_sq"].double().sqrt() * correction + 1e-8) / 3
    assert mine > 1.05  # and not momentum SGD: the rate still adapts


# 4. Per tensor


@every_backend
@every_class
def test_one_optimizer_for_all_parameters_equals_one_for_each(cls, foreach):
    together, apart = parameters(), parameters()
    optimizer = cls(together, foreach=foreach)
    optimizers = [cls([p], foreach=foreach) for p in apart]
    for t in range(1, 41):
        gradients(together, t), gradients(apart, t)
        optimizer.step()
        for each in reversed(optimizers):  # as when the step runs in backward
            each.step()
    assert same(together, apart)


@every_class
def test_a_tensors_beta_depends_on_its_own_gradients_alone(cls):
    results = []
    for factor in (1.0, 2.0**20):
        params = parameters()
        optimizer = cls(params, weight_decay=0.0)
        for t in range(1, 41):
            gradients(params, t)
            params[0].grad *= factor
            optimizer.step()
        results.append((params, list(chosen_betas(optimizer).values())))
    (a, betas), (b, scaled) = results
    assert same(a, b) and betas[1:] == scaled[1:] and scaled[0] == betas[0] / 2.0**20


def test_the_rule_does_not_depend_on_the_order_or_shape_of_a_tensor():
    v = torch.rand(24, 50).square()
    views = [v, v.flatten(), v.flatten()[torch.randperm(1200)], v.t(), v.double().float()]
    assert len(set(calibration.measure([calibration.histogram([v]) for v in views], [1.0] * 5))) == 1
    assert calibration.measure([calibration.histogram(v.split(5))], [1.0]) == calibration.measure(
        [calibration.histogram([v])], [1.0]
    )


@pytest.mark.filterwarnings("error")
def test_flat_parameters_of_fsdp1_are_measured_and_that_is_said_once():
    piece = torch.nn.Parameter(torch.ones(40))
    piece._fsdp_flattened = piece._is_flat_param = True  # what FullyShardedDataParallel sets
    optimizer = SadamW([piece])
    piece.grad = torch.randn(40)
    with pytest.warns(UserWarning, match="one beta for each flat tensor.*use_orig_params=True"):
        optimizer.step()
    assert optimizer.state[piece]["beta"] > 0
    optimizer.step()


@pytest.mark.filterwarnings("error")
def test_flat_pieces_of_deepspeed_are_measured_and_that_is_said(monkeypatch):
    class ZeROOptimizer:  # DeepSpeed's, around ours
        pass

    net = torch.nn.Linear(4, 4)
    optimizer = SadamW(net.named_parameters())
    piece = torch.ones(40).requires_grad_()  # ZeRO puts one such tensor, which is no Parameter, in a group's place
    optimizer.param_groups[0]["params"] = [piece]
    piece.grad = torch.randn(40)
    comm = ModuleType("deepspeed.comm")
    comm.is_initialized = lambda: True
    monkeypatch.setitem(sys.modules, "deepspeed.comm", comm)
    base = ModuleType("deepspeed.runtime.base_optimizer")
    base.ZeROOptimizer = ZeROOptimizer
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.base_optimizer", base)
    with pytest.warns(UserWarning, match="each flat tensor that DeepSpeed makes.*give beta a number"):
        optimizer.step()
    optimizer.step()
    betas = chosen_betas(optimizer)
    assert list(betas) == ["0.0"] and betas["0.0"] > 0  # no name: it holds all the parameters

    optimizer.param_groups[0]["params"] = []  # between the steps of ZeRO-3
    assert chosen_betas(optimizer) == {"flat.0": betas["0.0"]}
    own = SadamW([p := torch.nn.Parameter(torch.ones(40))])
    p.grad = torch.randn(40)
    own.step()  # a user's own parameter with one dimension
    comm.is_initialized = lambda: False
    plain = SadamW([p := torch.ones(40).requires_grad_()])
    p.grad = torch.randn(40)
    plain.step()


# 5. Never fooled


@every_backend
@every_class
def test_a_zero_gradient_measures_nothing_and_moves_nothing(cls, foreach):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = cls(params, weight_decay=0.0, foreach=foreach)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert same(params, before) and set(chosen_betas(optimizer).values()) == {0.0}
    train(optimizer, params, 1)
    assert all(beta > 0 for beta, p in zip(chosen_betas(optimizer).values(), params, strict=True) if p.numel())


@every_backend
@every_class
def test_rows_that_never_get_a_gradient_neither_move_nor_count(cls, foreach):
    results = []
    for unused in (0, 1000):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.cat([torch.randn(10, 4), torch.ones(unused, 4)]))
        optimizer = cls([p], weight_decay=0.0, foreach=foreach)
        for t in range(20):
            torch.manual_seed(t)
            p.grad = torch.cat([torch.randn(10, 4), torch.zeros(unused, 4)])
            optimizer.step()
        assert torch.equal(p[10:], torch.ones(unused, 4))
        results.append((p[:10].detach(), optimizer.state[p]["beta"]))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_backend
@every_class
def test_a_bad_gradient_spoils_what_it_would_spoil_in_adam_and_no_beta(cls, foreach, bad):
    params, adams = parameters(), parameters()
    optimizer, adam = cls(params, weight_decay=0.0, foreach=foreach), torch.optim.Adam(adams)
    for t in range(1, 17):
        gradients(params, t), gradients(adams, t)
        if t in (1, 8):  # both are measured
            params[0].grad[0] = adams[0].grad[0] = bad
        optimizer.step(), adam.step()
    assert all(math.isfinite(beta) for beta in chosen_betas(optimizer).values())
    assert optimizer.state[params[0]]["beta"] > 0
    for p, q in zip(params, adams, strict=True):
        assert torch.equal(p.isnan(), q.isnan())


@every_class
def test_a_gradient_of_nothing_but_nan_leaves_beta_unmeasured(cls):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([p])
    p.grad = torch.full((3,), math.nan)
    optimizer.step()
    assert optimizer.state[p]["beta"] == 0.0


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_backend
@every_class
def test_underflow_and_overflow_in_half_precision(cls, foreach, dtype, size):
    half, full = torch.nn.Parameter(torch.zeros(100, dtype=dtype)), torch.nn.Parameter(torch.zeros(100))
    a, b = cls([half], foreach=foreach), cls([full], foreach=foreach)
    torch.manual_seed(0)
    first = None
    for _ in range(20):
        half.grad = (torch.randn(100) * size).to(dtype)
        full.grad = half.grad.float()
        a.step(), b.step()
        first = first or (a.state[half]["beta"], b.state[full]["beta"])
        assert half.isfinite().all() and 0 < a.state[half]["beta"] < math.inf
    assert first[0] == pytest.approx(first[1], rel=1e-6)  # the square is taken in float32
    assert (half != 0).sum() > 90


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@every_backend
@every_class
def test_the_step_that_torchs_distributed_checkpoint_makes_is_not_measured(cls, foreach, weight_decay):
    params, untouched = parameters(), parameters()
    a, b = (cls(p, foreach=foreach, weight_decay=weight_decay) for p in (params, untouched))
    rate = a.param_groups[0]["lr"]
    for p in params:  # as torch.distributed.checkpoint.state_dict._init_optim_state does
        p.grad = torch.zeros_like(p)
    a.param_groups[0]["lr"] = 0.0
    a.step()
    a.param_groups[0]["lr"] = rate
    assert same(params, untouched)
    if weight_decay == 0 or cls in (SadamW, SAMSGradW):  # coupled decay is a gradient of its own
        assert set(chosen_betas(a).values()) == {0.0}
    gradients(untouched, 1)
    b.step()
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, untouched, strict=True):
            p.copy_(q)
    assert same(train(a, params, 20, start=2), train(b, untouched, 20, start=2))


@pytest.mark.parametrize("until_then", ["no gradient", "zero gradient"])
@every_backend
@every_class
def test_a_first_gradient_at_step_1000_is_measured_there(cls, foreach, until_then):
    late, other = torch.nn.Parameter(torch.zeros(40)), torch.nn.Parameter(torch.zeros(3))
    optimizer = cls([late, other], lr=1e-3, foreach=foreach)
    for t in range(1000):
        torch.manual_seed(t)
        other.grad = torch.randn(3)
        late.grad = None if until_then == "no gradient" else torch.zeros(40)
        optimizer.step()
    assert not late.any() and optimizer.state[late].get("beta", 0.0) == 0.0
    late.grad = torch.randn(40) * 1e-4
    optimizer.step()
    limit = 2e-3 if until_then == "no gradient" else 6.4e-3  # twice Adam's, (1 - beta1) / sqrt(1 - beta2) times lr
    assert optimizer.state[late]["beta"] > 0 and late.all() and late.abs().max() < limit
    for _ in range(100):
        late.grad = torch.randn(40) * 1e-4
        optimizer.step()
    assert late.isfinite().all() and late.abs().max() < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
def test_the_step_keeps_its_size_where_half_precision_cannot_hold_the_second_moment(dtype, size):
    p = torch.nn.Parameter(torch.zeros(400, dtype=dtype))
    optimizer = SadamW([p], lr=1.0, weight_decay=0.0)
    torch.manual_seed(0)
    for _ in range(1024):
        p.grad = (torch.randn(400) * size).to(dtype)
        with torch.no_grad():
            p.zero_()
        optimizer.step()
    assert 0.05 < p.float().square().mean().sqrt() < 2  # lr 1: the update itself


def disturb(how):
    """What others do to the state of a parameter, and to the parameter, between two steps."""

    def zero(optimizer, p):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            optimizer.state[p][key].zero_()

    def zero_moments(optimizer, p):
        optimizer.state[p]["exp_avg"].zero_(), optimizer.state[p]["exp_avg_sq"].zero_()

    def set_back(optimizer, p):
        optimizer.state[p]["step"].fill_(100)

    def number(optimizer, p):
        optimizer.state[p]["step"] = 7

    def replace(optimizer, p):
        optimizer.state[p]["exp_avg_sq"] = torch.zeros_like(p)

    def forget(optimizer, p):
        optimizer.state.clear()

    def grow(optimizer, p):
        state = optimizer.state.pop(p)
        new = torch.nn.Parameter(torch.cat([p.detach(), p.detach()]))
        state |= {key: torch.cat([state[key], 0 * state[key]]) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.param_groups[0]["params"] = [new]
        optimizer.state[new] = state

    return {f.__name__: f for f in (zero, zero_moments, set_back, number, replace, forget, grow)}[how]


@pytest.mark.parametrize("how", ["zero", "zero_moments", "set_back", "number", "replace", "forget", "grow"])
@pytest.mark.parametrize("when", [70, 100, 127])
@every_backend
def test_a_state_that_others_reset_is_measured_again_at_once(foreach, when, how):
    p = torch.nn.Parameter(torch.zeros(64))
    optimizer = SadamW([p], foreach=foreach)

    def take(steps, size):
        for _ in range(steps):
            for q in optimizer.param_groups[0]["params"]:
                q.grad = torch.randn(q.shape) * size
            optimizer.step()
        (state,) = optimizer.state.values()
        return state["beta"]

    before = take(when, 1.0)
    assert take(1, 1.0) == before or when == 127
    disturb(how)(optimizer, p)
    after = take(1, 1e-3)
    assert after != before
    if how in ("zero", "forget"):
        assert after > 100 * before  # of the new gradients alone
    assert take(1, 1e-3) == after or how in ("zero", "forget", "number")  # step 2 or 8 is due in any case


@every_backend
def test_a_state_that_nobody_touches_is_not_measured_again(foreach, monkeypatch):
    """Also where gradients come and go, and where others look at the state, or save it."""
    calls = count_measurements(monkeypatch)
    params = [torch.nn.Parameter(torch.zeros(20)) for _ in range(3)]
    optimizer = SadamW(params, foreach=foreach)
    for t in range(1, 61):
        for i, p in enumerate(params):
            p.grad = None if t > 8 and (t + i) % 3 == 0 else torch.randn(20)
        optimizer.step()
        optimizer.state_dict(), chosen_betas(optimizer), copy.deepcopy(optimizer)
    most = sum(2**k <= int(optimizer.state[p]["step"]) for p in params for k in range(7))
    assert sum(calls) == most


@every_backend
def test_a_restored_parameter_whose_gradient_comes_later_is_not_measured_again(foreach):
    params = [torch.nn.Parameter(torch.zeros(20)) for _ in range(2)]
    optimizer = SadamW(params, foreach=foreach)
    torch.manual_seed(0)
    for _ in range(20):
        for p in params:
            p.grad = torch.randn(20)
        optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = chosen_betas(optimizer)
    for late in (None, torch.randn(20)):
        params[0].grad, params[1].grad = torch.randn(20), late
        optimizer.step()
    assert chosen_betas(optimizer) == before


# 6. Costs little, settles


class Operators(TorchDispatchMode):
    """Lists the operators of a step: those that read values back from more than ten numbers, and all others."""

    def __init__(self):
        super().__init__()
        self.reads, self.others = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        big = any(isinstance(a, torch.Tensor) and a.numel() > 10 for a in args)
        if name in ("_local_scalar_dense", "bincount", "nonzero", "histc", "sort", "unique", "equal", "is_nonzero"):
            if big or name != "_local_scalar_dense":
                self.reads.append(name)
        else:
            self.others.append(name)
        return out


def count_measurements(monkeypatch):
    calls, real = [], calibration.measure

    def counted(exp_avg_sqs, corrections):
        betas = real(exp_avg_sqs, corrections)
        calls.append(len(betas))
        return betas

    monkeypatch.setattr(calibration, "measure", counted)
    return calls


@every_class
def test_each_parameter_is_measured_at_most_log2_of_the_steps_plus_one_times(cls, monkeypatch):
    calls = count_measurements(monkeypatch)
    params = [p for p in parameters() if p.numel()]
    train(cls(params), params, 300)
    assert len(params) * 3 <= sum(calls) <= len(params) * (math.log2(300) + 1)


@every_backend
def test_between_measurements_a_step_is_the_step_of_a_number(monkeypatch, foreach):
    calls = count_measurements(monkeypatch)
    monkeypatch.setattr(calibration, "LOOKED_AT", 0)  # the one look at a number's floor
    auto, number = (torch.nn.Parameter(torch.randn(100)) for _ in range(2))
    a, b = Sadam([auto], foreach=foreach), Sadam([number], beta=50.0, foreach=foreach)
    measured = []
    for _ in range(40):
        auto.grad = number.grad = torch.randn(100)
        before = sum(calls)
        with Operators() as of_auto:
            a.step()
        with Operators() as of_number:
            b.step()
        measured.append(sum(calls) > before)
        if not measured[-1]:
            assert of_auto.reads == of_number.reads == [] and of_auto.others == of_number.others
    assert 3 <= sum(measured) <= math.log2(40) + 1


def test_the_betas_settle():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(500))
    optimizer, betas = SadamW([p]), []
    for _ in range(1000):
        p.grad = torch.randn(500) * torch.linspace(0.01, 1, 500)
        optimizer.step()
        betas.append(optimizer.state[p]["beta"])
    changes = [t for t in range(1, 1000) if betas[t] != betas[t - 1]]
    assert len(changes) <= math.log2(1000) and all(abs(math.log(betas[-1] / b)) < 0.1 for b in betas[100:])


def test_compile_uses_beta_as_it_stands_and_warns_once_if_it_had_not_settled():
    torch._dynamo.reset()
    params, others = parameters()[:2], parameters()[:2]
    a, b = SadamW(params), SadamW(others)
    train(a, params, 3), train(b, others, 3)
    betas = chosen_betas(a)
    compiled = torch.compile(a.step, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(4, 12):
            gradients(params, t)
            compiled()
    ours = [w for w in caught if 'beta="auto"' in str(w.message)]
    if not ours and torch.__version__ < "2.7":
        pytest.skip("this torch does not trace the step but its parts: beta is measured as ever")
    assert len(ours) == 1 and "torch.compile" in str(ours[0].message)
    assert chosen_betas(a) == betas
    b.param_groups[0]["beta"] = "auto"
    for t in range(4, 12):  # the same betas, by hand
        gradients(others, t)
        for p, q in zip(params, others, strict=True):
            b.state[q]["beta"] = a.state[p]["beta"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "is_due", lambda *_: False)
            b.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_compile_is_silent_once_settled():
    torch._dynamo.reset()
    params = parameters()[:2]
    optimizer = SadamW(params)
    train(optimizer, params, calibration.SETTLED)
    compiled = torch.compile(optimizer.step, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(3):
            gradients(params, t)
            compiled()
    assert not [w for w in caught if 'beta="auto"' in str(w.message)]


def test_graph_capture_reads_nothing_and_warns(monkeypatch):
    calls = count_measurements(monkeypatch)
    params = parameters()
    optimizer = Sadam(params, capturable=True)
    train(optimizer, params, 3)
    betas, before = chosen_betas(optimizer), sum(calls)
    monkeypatch.setattr(calibration, "is_frozen", lambda: True)
    gradients(params, 4)
    with pytest.warns(UserWarning, match="is not measured again under CUDA graph capture"):
        optimizer.step()
    assert sum(calls) == before and chosen_betas(optimizer) == betas


# 7. Saved, restored, readable


@every_backend
@every_class
def test_a_restored_run_continues_bit_for_bit(cls, foreach, tmp_path):
    params = parameters()
    optimizer = cls(params, foreach=foreach)
    train(optimizer, params, 11)
    assert all(type(optimizer.state[p]["beta"]) is float for p in params)
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    restored = [torch.nn.Parameter(p.detach()) for p in saved["params"]]
    other = cls(restored, foreach=foreach)
    other.load_state_dict(saved["optimizer"])
    assert chosen_betas(other) == chosen_betas(optimizer)
    assert same(train(optimizer, params, 30, start=12), train(other, restored, 30, start=12))
    assert chosen_betas(other) == chosen_betas(optimizer)


def test_chosen_betas_are_named_and_reading_them_changes_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    plain = Sadam(model.parameters())
    assert chosen_betas(plain) == {"0.0": 0.0, "0.1": 0.0, "0.2": 0.0, "0.3": 0.0}
    assert not plain.state and not plain.state_dict()["state"]
    assert list(chosen_betas(plain, model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    named = Sadam([{"params": list(model.named_parameters()), "beta": 3}])
    assert chosen_betas(named) == dict.fromkeys(["0.weight", "0.bias", "1.weight", "1.bias"], 3.0)
    with pytest.raises(TypeError, match="AdamW has no softplus beta"):
        chosen_betas(torch.optim.AdamW(model.parameters()))


def test_chosen_betas_sees_through_wrappers():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer, self.defaults, self.param_groups = optimizer, {}, optimizer.param_groups

    p = torch.nn.Parameter(torch.ones(2))
    assert chosen_betas(Wrapper(Wrapper(Sadam([p], beta=4.0)))) == {"0.0": 4.0}


def test_one_log_line_when_the_betas_settle(caplog):
    params = [p for p in parameters() if p.numel()]
    optimizer = SadamW(params)
    with caplog.at_level(logging.INFO, logger="sadam_integrations"):
        train(optimizer, params, 300)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("sadam_integrations")]
    assert len(lines) == 1 and "SadamW" in lines[0] and f"{len(params)} parameters" in lines[0]


def test_one_line_for_all_groups(caplog):
    first, second = parameters(), parameters()
    optimizer = SadamW([{"params": first}, {"params": second}])
    with caplog.at_level(logging.INFO, logger="sadam_integrations.calibration"):
        for t in range(1, calibration.SETTLED + 1):
            gradients(first, t), gradients(second, t)
            optimizer.step()
    assert len([r for r in caplog.records if "settled" in r.message]) == 1


def test_a_compiled_step_with_a_group_that_has_no_gradients():
    torch._dynamo.reset()
    params, frozen = parameters()[:2], parameters()[:1]
    optimizer = SadamW([{"params": frozen}, {"params": params}])
    gradients(params, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(optimizer.step, backend="eager")()
    assert chosen_betas(optimizer)["1.0"] > 0 and not optimizer.state.get(frozen[0])
