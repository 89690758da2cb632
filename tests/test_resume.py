"""A run that is killed (SIGKILL, every process) and started again ends as one that went through, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resume_worker import ENGINES, STEPS

pytestmark = pytest.mark.slow
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)
WORKER = Path(__file__).with_name("resume_worker.py")


def run(engine, folder, out, *die_at):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [sys.executable, *(torchrun if "-" in engine else []), WORKER, engine, folder, out, *die_at],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=200, cwd=folder.parent,
    )  # fmt: skip


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_run_goes_on_as_if_it_had_not_been(engine, tmp_path):
    pytest.importorskip("transformers" if engine.startswith("trainer") else "lightning.pytorch")
    if "zero" in engine:
        pytest.importorskip("deepspeed")
    through, killed, out = tmp_path / "through", tmp_path / "killed", tmp_path / "out.pt"
    through.mkdir(), killed.mkdir()
    done = run(engine, through, out)
    assert done.returncode == 0, done.stderr[-4000:]
    want = torch.load(out, weights_only=True)
    out.unlink()

    dead = run(engine, killed, out, "5")
    assert dead.returncode != 0 and not out.exists()
    (checkpoint,) = killed.iterdir()  # of step 3 or 4
    assert "-9" in dead.stderr or "SIGKILL" in dead.stderr or dead.returncode == -9, dead.stderr[-4000:]
    done = run(engine, killed, out)
    assert done.returncode == 0, done.stderr[-4000:]
    got = torch.load(out, weights_only=True)
    assert got[0] == want[0] == STEPS and len(got[2]) > 1
    assert same(got, want), checkpoint
