"""The convergence study: its problems are what they claim, its batches are exact, its bounds hold, and it resumes."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
from pathlib import Path

import pytest
import torch

from sadam_integrations import PUBLISHED, Sadam

STUDY = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "studies" / "convergence.py"), run_name="study")
CONDITIONS = STUDY["CONDITIONS"]
each_condition = pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)


def points(condition, n=2000, width=6.0):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(n, STUDY["SIZE"], generator=generator, dtype=torch.float64) * 2 - 1) * width


@each_condition
def test_the_problem_has_the_gradient_and_constants_that_it_claims(condition):
    x = points(condition).requires_grad_()
    value, grad = condition.function(x, condition.scale)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x, create_graph=True)[0], grad)
    assert value.min() > 0
    assert condition.function(torch.zeros_like(x), condition.scale)[0].abs().max() == 0
    hessians = torch.stack(
        [
            torch.autograd.functional.hessian(lambda y: condition.function(y, condition.scale)[0], p)
            for p in x.detach()[:50]
        ]
    )
    curvature = torch.linalg.eigvalsh(hessians)
    assert 0.5 * condition.smoothness < curvature.max() <= condition.smoothness * (1 + 1e-9)
    if condition.name == "nonconvex":
        assert curvature.min() < -0.1
    else:
        assert curvature.min() > -1e-12
    if condition.name == "PL":  # flat directions, and half the squared gradient is at least m (f - f*)
        assert (curvature.abs() < 1e-12).sum(-1).tolist() == [12] * 50
        assert ((grad**2).sum(-1) / 2 >= condition.scale.min() * value).all()
        grad = condition.function(torch.full_like(x, condition.start), condition.scale)[1]
    assert (0.5 * condition.steepest * condition.scale < grad.abs().amax(0)).all()
    assert (grad.abs() <= condition.steepest * condition.scale * (1 + 1e-9)).all()


def test_matched_noise_is_in_proportion_to_the_scales_and_shuffled_noise_is_not():
    for condition in CONDITIONS.values():
        matched, shuffled = (STUDY["noise"](name, condition) for name in STUDY["NOISES"])
        torch.testing.assert_close(matched, condition.scale)
        assert torch.equal(shuffled.sort().values, matched.sort().values)
        assert torch.corrcoef(torch.stack([matched.log(), shuffled.log()]))[0, 1].abs() < 0.4


def alone(make, condition, deviation, lr, steps, seed):
    """One run, written out."""
    p = torch.nn.Parameter(torch.full((STUDY["SIZE"],), condition.start, dtype=torch.float64))
    optimizer = make([p])
    generator = torch.Generator().manual_seed(seed)
    noises = (2 * torch.rand(256, STUDY["SIZE"], generator=generator, dtype=torch.float64) - 1) * 3**0.5 * deviation
    errors = []
    for t in range(steps):
        value, grad = condition.function(p.detach(), condition.scale)
        errors.append(float((grad**2).sum() if condition.name == "nonconvex" else value))
        p.grad = grad + noises[t]
        optimizer.param_groups[0]["lr"] = lr / (1 + t / 1000) if condition.name == "PL" else lr / steps**0.5
        optimizer.step()
    last = float(condition.function(p.detach(), condition.scale)[0])
    return last if condition.name == "PL" else sum(errors) / steps


PLAIN = {
    "SGD with momentum": lambda params: torch.optim.SGD(params, momentum=0.9),
    "AMSGrad": lambda params: torch.optim.Adam(params, amsgrad=True),
    "Sadam (beta 50)": lambda params: Sadam(params, **PUBLISHED),
    "Sadam (auto)": Sadam,
}


@each_condition
@pytest.mark.parametrize("optimizer", PLAIN)
def test_a_batch_of_runs_equals_single_runs(condition, optimizer):
    deviation = STUDY["noise"]("shuffled", condition)
    settings = [(0.3, 40), (0.1, 25)]
    errors, betas = STUDY["train"](
        optimizer, condition, deviation, [STUDY["Run"](lr, steps) for lr, steps in settings], [5, 3, 8]
    )
    for k, (lr, steps) in enumerate(settings):
        for s, seed in enumerate([5, 3, 8]):
            single = alone(PLAIN[optimizer], condition, deviation, lr, steps, seed)
            assert errors[k, s].item() == pytest.approx(single, rel=1e-12), (lr, seed)
    assert len(betas) == {"Sadam (beta 50)": 2, "Sadam (auto)": 6}.get(optimizer, 0)


def test_the_noise_has_the_variance_that_the_bound_is_told():
    condition = CONDITIONS["PL"]
    deviation = STUDY["noise"]("shuffled", condition)
    seen = []

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            p = self.param_groups[0]["params"][0]
            seen.append(p.grad - condition.function(p, condition.scale)[1])

    names = STUDY["OPTIMIZERS"]
    names["watch"] = lambda groups: Watch(groups)
    try:
        STUDY["train"]("watch", condition, deviation, [STUDY["Run"](0.1, 600)], range(4))
    finally:
        del names["watch"]
    seen = torch.cat(seen)
    torch.testing.assert_close(seen.std(0), deviation, rtol=0.05, atol=0)
    assert (seen.mean(0).abs() < 0.1 * deviation).all()


@pytest.mark.parametrize("name", ["nonconvex", "convex"])
def test_the_bound_holds_for_plain_sgd_at_its_own_best_rate(name):
    condition = CONDITIONS[name]
    deviation = STUDY["noise"]("shuffled", condition)
    start = torch.full((STUDY["SIZE"],), condition.start, dtype=torch.float64)
    gap, variance, total = float(condition.function(start, condition.scale)[0]), float((deviation**2).sum()), 3000
    square = float((condition.scale**2).sum()) + variance
    lr = (
        min(math.sqrt(2 * gap / (condition.smoothness * variance)), math.sqrt(total) / condition.smoothness)
        if name == "nonconvex"
        else float(start.norm()) / math.sqrt(square)
    )
    names = STUDY["OPTIMIZERS"]
    names["plain"] = torch.optim.SGD
    try:
        errors, _ = STUDY["train"]("plain", condition, deviation, [STUDY["Run"](lr, total)], range(4))
    finally:
        del names["plain"]
    bound = condition.bound(total, deviation, 1.0, 1.0)
    assert 0.01 * bound < errors.mean().item() < bound


@each_condition
def test_how_the_bound_depends_on_the_steps_and_on_the_spread_of_the_alr(condition):
    deviation = STUDY["noise"]("matched", condition)
    total = 10**16
    base = condition.bound(total, deviation, 1.0, 1.0)
    power = {"nonconvex": 1, "convex": 0.5, "PL": 2}[condition.name]
    assert condition.bound(total, deviation, 1.0, 10.0) / base == pytest.approx(10**power, rel=0.01)
    assert condition.bound(total, deviation, 10.0, 10.0) / base == pytest.approx(1.0, rel=0.01)
    ratio = condition.bound(100 * total, deviation, 1.0, 1.0) / base
    assert ratio == pytest.approx(100**condition.theory, rel=0.01)
    if condition.name == "PL":  # without noise it halves in as many steps as the theory delays its step size
        start = torch.full((STUDY["SIZE"],), condition.start, dtype=torch.float64)
        half = condition.bound(18 / float(condition.scale.min()), 0 * deviation, 1.0, 3.0)
        assert half == pytest.approx(float(condition.function(start, condition.scale)[0]) / 2)


def test_the_slope_is_that_of_the_fitted_part():
    size = STUDY["Size"]((10, 100, 1000, 10_000), 100, 100, 2)
    assert STUDY["slope"]([99.0, *(7 * t**-0.5 for t in size.steps[1:])], size) == pytest.approx(-0.5)


def test_the_study_resumes_and_ends_in_tables_figures_and_json(tmp_path, capsys, monkeypatch):
    size = STUDY["Size"]((4, 8, 16), 8, 4, 2)
    STUDY["study"](tmp_path, size)
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if line.startswith("| ")]) == 2 + 36 + 2 + 6
    assert "| PL | shuffled | Sadam (auto) |" in printed
    result = json.loads((tmp_path / "convergence.json").read_text())
    assert len(result["cells"]) == 36 and len(result["sweeps"]) == 6
    for name in ("convergence", "convergence_beta"):
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000

    path = tmp_path / "cells.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:30]]))  # the last one was being written
    kept = path.read_text().count("\n")
    before = [line for line in lines if '"PL", "noise": "shuffled", "optimizer": "beta"' in line]
    for name in ("convergence_figure", "sharpness_figure"):
        monkeypatch.setattr(STUDY["plots"], name, lambda *arguments: None)
    STUDY["study"](tmp_path, size)
    assert capsys.readouterr().out == printed
    assert kept == 41 and before == [lines[-1]]


def test_a_diverged_rate_is_not_chosen():
    condition = dataclasses.replace(CONDITIONS["PL"], middle=10.0)  # so that the upper half of the rates diverges
    deviation = STUDY["noise"]("matched", condition)
    size = STUDY["Size"]((300,), 300, 300, 2)
    [(run, _)] = STUDY["tune"]("SGD with momentum", condition, deviation, size, [None])
    largest = STUDY["Run"](1000.0, 300)
    errors, _ = STUDY["train"]("SGD with momentum", condition, deviation, [largest, run], [0])
    assert errors[0].isnan().all() and errors[1].item() < 1 and run.lr < 1


@pytest.mark.slow
def test_the_smoke_run(tmp_path, capsys):
    assert STUDY["main"](["--smoke", "--output_dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "smoke" / "convergence.json").read_text())["cells"]
    assert all(-3 < row["slope"] < 0 for row in rows)
