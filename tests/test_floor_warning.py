"""The once-only warning of a fixed beta far too small: whom it tells what, and who is left alone."""

from __future__ import annotations

import re
import time
import warnings

import pytest
import torch
from torch import nn

from sadam_integrations import PUBLISHED, Sadam, SadamW, SAMSGradW, calibration

NAME = r"leaves \S+ % of the coordinates on the floor"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A process that has not warned yet."""
    monkeypatch.setattr(calibration, "_WARNED", set())


def told(action):
    """The warnings of this kind that ``action`` gives."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in found if re.search(NAME, str(w.message))]


def numbers(scale=1e-5, shape=(50, 40), **kwargs):
    p = nn.Parameter(torch.zeros(shape, **kwargs))
    p.scale = scale
    return p


def take(optimizer, steps=12, schedule=None):
    """Steps with gradients of each parameter's own scale."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.scale is not None):
            p.grad = (p.scale * (0.5 + torch.rand(p.shape, generator=generator))).to(p.dtype)
        optimizer.step()
        if schedule:
            schedule.step()


# ---------------------------------------------------------------- whom it tells what


def test_what_it_says():
    (message,) = told(lambda: take(SadamW([numbers(1e-5)], lr=5e-5, beta=50)))
    assert message.startswith("SadamW: beta=50 leaves 100 % of the coordinates on the floor")
    assert "ln 2 / beta = 0.014: the median of sqrt(v) is 1e-05" in message
    assert "momentum SGD at 72.1 x lr = 0.0036, not Adam at lr=5e-05" in message
    assert 'beta="auto", or a beta of about 4e+04' in message  # ln 2 / (2 * 1e-5), the quartile is a little lower


def test_it_comes_at_one_step_and_never_again():
    optimizer = SadamW([numbers()], lr=5e-5, beta=50)
    assert not told(lambda: take(optimizer, calibration.LOOKED_AT - 1))
    assert len(told(lambda: take(optimizer, 1))) == 1
    assert not told(lambda: take(optimizer, 100))
    assert not told(lambda: take(SadamW([numbers()], lr=5e-5, beta=50)))  # another optimizer, the same mistake


def test_groups_with_one_beta_are_judged_together_and_others_apart():
    small, large = numbers(1e-5, (100,)), numbers(1.0, (300,))
    groups = [{"params": [small]}, {"params": [large], "weight_decay": 0.0}]
    assert not told(lambda: take(SadamW(groups, lr=1e-3, beta=50)))
    groups = [{"params": [numbers()]}, {"params": [numbers()], "weight_decay": 0.0}]
    assert len(told(lambda: take(SadamW(groups, lr=1e-3, beta=50)))) == 1
    groups = [{"params": [numbers()], "beta": 40}, {"params": [numbers()]}, {"params": [numbers()], "beta": "auto"}]
    found = told(lambda: take(SadamW(groups, lr=1e-3, beta=30)))
    assert sorted(re.findall(r"beta=(\d+)", " ".join(found))) == ["30", "40"]
    groups = [{"params": [large], "beta": 60}, {"params": [small], "beta": 70}]
    assert ["beta=70" in message for message in told(lambda: take(SadamW(groups, lr=1e-3)))] == [True]


def test_an_optimizer_a_parameter_warns_once():
    optimizers = [SadamW([numbers()], lr=1e-3, beta=50) for _ in range(200)]
    assert len(told(lambda: [take(optimizer) for optimizer in optimizers])) == 1
    assert len(told(lambda: take(SAMSGradW([numbers()], lr=1e-3, beta=50)))) == 1


def test_a_warm_up_and_a_tensor_for_a_learning_rate():
    def warm_up(lr):
        optimizer = SadamW([numbers()], lr=lr, beta=50)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / 100))

    optimizer, schedule = warm_up(0.5)
    assert not told(lambda: take(optimizer, schedule=schedule))
    optimizer, schedule = warm_up(5e-5)
    (message,) = told(lambda: take(optimizer, schedule=schedule))
    assert "lr=5e-05" in message
    assert not told(lambda: take(SadamW([numbers()], lr=torch.tensor(0.5), beta=51)))
    assert len(told(lambda: take(SadamW([numbers()], lr=torch.tensor(1e-3), beta=51)))) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_other_dtypes(dtype):
    p = numbers(dtype=dtype)
    assert len(told(lambda: take(SAMSGradW([p], lr=1e-3, beta=50)))) == 1


def test_the_bias_is_corrected_whatever_the_form():
    """Uncorrected, sqrt(v) would be a tenth of what it is here."""
    scale = 0.03 * calibration.LN2 / 50
    assert not told(lambda: take(Sadam([numbers(scale)], lr=1e-3, beta=50, bias_correction="outer")))
    (message,) = told(lambda: take(Sadam([numbers(scale / 3)], lr=1e-3, beta=50, bias_correction="outer")))
    assert f"the median of sqrt(v) is {scale / 3:.1g}" in message


def test_unseen_coordinates_and_late_parameters_do_not_count():
    p, unused = numbers(1.0), numbers(None)
    p.scale = torch.zeros(50, 40)
    p.scale[0] = 1.0  # an embedding of which one row is seen
    assert not told(lambda: take(SadamW([unused, p], lr=1e-3, beta=50)))
    p.scale[0] = 1e-5
    p.data.zero_()
    (message,) = told(lambda: take(SadamW([unused, p], lr=1e-3, beta=50)))
    assert "is 1e-05" in message


# ---------------------------------------------------------------- who is left alone


@pytest.mark.parametrize(
    ("scale", "arguments"),
    [
        (1e-5, {"beta": "auto"}),
        (1e-5, {"beta": 50, "lr": 0.5}),
        (1e-5, {"beta": 50, "lr": 1e-2}),
        (1e-5, {"beta": 50, "lr": 0.0}),
        (0.022 * calibration.LN2 / 1e3, {"beta": 1e3}),
        (0.24 * calibration.LN2 / 50, {"beta": 50}),
        (0.0, {"beta": 50}),
        (float("nan"), {"beta": 50}),
        (float("inf"), {"beta": 50}),
        (1e-5, {"beta": 50, "differentiable": True}),
    ],
)
def test_silent(scale, arguments):
    p = numbers(scale).requires_grad_("differentiable" not in arguments)  # torch's leaves cannot be changed in place
    assert not told(lambda: take(SadamW([p], **{"lr": 1e-3, **arguments})))


def test_nothing_is_read_from_a_device(monkeypatch):
    """A step count that lies elsewhere than on the CPU, as with capturable, is left there."""
    monkeypatch.setattr(calibration, "_look_at_floor", None)
    with torch.device("meta"):
        optimizer = SadamW([nn.Parameter(torch.zeros(3))], lr=1e-3, beta=50, capturable=True)
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.zeros_like(p)
    optimizer.state[p]["step"] = torch.tensor(float(calibration.LOOKED_AT), device="meta")
    calibration.warn_floor(optimizer)


def test_not_while_a_graph_is_captured(monkeypatch):
    optimizer = SadamW([numbers()], lr=1e-3, beta=50)
    monkeypatch.setattr(calibration, "is_frozen", lambda: True)
    assert not told(lambda: take(optimizer))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_of_several_warns(monkeypatch, rank):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    assert len(told(lambda: take(SadamW([numbers()], lr=1e-3, beta=50)))) == 1 - rank


def test_a_shard_is_looked_at_alone(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = nn.Parameter(distribute_tensor(torch.zeros(50, 40), mesh, [Shard(0)]))
        optimizer = SadamW([p], lr=1e-3, beta=50)

        def steps():
            for _ in range(12):
                p.grad = distribute_tensor(torch.full((50, 40), 1e-5), mesh, [Shard(0)])
                optimizer.step()

        assert len(told(steps)) == 1
    finally:
        torch.distributed.destroy_process_group()


def test_between_the_looks_it_costs_next_to_nothing():
    optimizer = SadamW([{"params": [numbers(shape=(2,)) for _ in range(100)]} for _ in range(2)], lr=1e-3, beta=50)
    take(optimizer, 2)
    start = time.perf_counter()
    for _ in range(100):
        calibration.warn_floor(optimizer)
    each = (time.perf_counter() - start) / 100
    start = time.perf_counter()
    for _ in range(10):
        optimizer.step()
    assert each < 0.02 * (time.perf_counter() - start) / 10


# ---------------------------------------------------------------- models


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels):
        super().__init__()
        conv = lambda: nn.Conv2d(channels, channels, 3, padding=1, bias=False)  # noqa: E731
        self.body = nn.Sequential(conv(), nn.BatchNorm2d(channels), nn.ReLU(), conv(), nn.BatchNorm2d(channels))

    def forward(self, x):
        return torch.relu(x + self.body(x))


@pytest.mark.parametrize("lr", [PUBLISHED["lr"], 5e-3])
def test_the_published_setting_on_a_cnn_is_left_alone(lr):
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, Block(16), Block(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    optimizer = Sadam(model.parameters(), **{**PUBLISHED, "lr": lr}, weight_decay=5e-4)

    def train():
        for _ in range(12):
            optimizer.zero_grad()
            images, labels = torch.randn(32, 3, 16, 16), torch.randint(10, (32,))
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    assert not told(train)


@pytest.mark.parametrize(("lr", "expected"), [(5e-5, 1), (0.5, 0)])
def test_a_bert_in_the_trainer_is_told_before_its_first_epoch_ends(tmp_path, lr, expected):
    pytest.importorskip("transformers")
    import hf_tiny
    from transformers import TrainerCallback

    import sadam_integrations.huggingface  # noqa: F401

    when = []

    class Epoch(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            when.append(len(calibration._WARNED))

    keys = {"optim": "sadamw", "optim_args": "beta=50", "learning_rate": lr, "per_device_train_batch_size": 1}
    trainer = hf_tiny.trainer(tmp_path, callbacks=[Epoch()], **keys)
    found = told(trainer.train)
    assert len(found) == expected and when == [expected, expected]
    if found:
        assert re.search(r"momentum SGD at 72.1 x lr = 0.0036, not Adam at lr=5e-05", found[0])
