"""Real DeepSpeed, two processes on a CPU, through the Trainer and through Lightning's strategy.

DeepSpeed is in none of our extras: it builds from source and needs torch to do so. To run these:
``DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed``. It also needs a C++ compiler and ninja, once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")
pytest.importorskip("lightning.pytorch")

import deepspeed_worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Runs every check once, in two processes that torchrun starts and that live through all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    deepspeed_worker.alone(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, deepspeed_worker.__file__, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=900, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads(Path(folder, f"results.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", deepspeed_worker.checks())
def test_two_processes(errors, check):
    assert [rank[check] for rank in errors] == ["", ""], "\n".join(rank[check] for rank in errors)
