"""Lightning in two processes on a CPU: DDP and FSDP2 equal one process and resume; an optimizer built too early."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning.pytorch")
pytest.importorskip("jsonargparse")
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from lightning_worker import checks

from sadam_integrations import SadamW


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Runs every check once, in two processes that torchrun starts and that live through all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = Path(__file__).with_name("lightning_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker, folder]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads((folder / f"results.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", checks())
def test_two_processes(errors, check):
    assert [rank[check] for rank in errors] == ["", ""], "\n".join(rank[check] for rank in errors)


def two_layers():
    return torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)


def backward(module):
    module(torch.ones(1, 2)).sum().backward()


def module_and_closure(module, used):
    """A closure as Lightning makes it: a partial with the module among its arguments."""
    return functools.partial(lambda module: backward(used), module)


def test_a_part_of_the_module_without_a_gradient_is_no_error():
    used, unused = two_layers()
    module = torch.nn.ModuleList([used, unused])
    with pytest.warns(UserWarning, match="nothing was updated"):  # a module without any gradient proves nothing
        SadamW(unused.parameters()).step(functools.partial(lambda module: None, used))
    with pytest.warns(UserWarning, match="nothing was updated, because no parameter has a gradient"):
        SadamW(unused.parameters()).step(module_and_closure(module, used))


def test_a_first_step_without_any_gradient_warns_once():
    optimizer = SadamW(two_layers()[0].parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            optimizer.step()
    (warning,) = caught
    assert warning.category is UserWarning
    assert "built before the model was sharded" in str(warning.message)
    assert "in configure_optimizers, and not by --optimizer (see docs/lightning.md)" in str(warning.message)


@pytest.mark.filterwarnings("error")
def test_steps_that_have_begun_may_lack_gradients():
    layer, other = two_layers()
    optimizer = SadamW([*layer.parameters(), *other.parameters()])
    backward(layer)  # one of two is enough
    optimizer.step()
    optimizer.zero_grad()
    before = [p.clone() for p in layer.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, layer.parameters()))
    SadamW(layer.requires_grad_(False).parameters()).step()  # and frozen ones have none to expect
