"""The A-LR in two processes: DDP, FSDP1, FSDP2, tensor parallelism and ZeRO equal one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from alr_worker import cases


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Runs every case once, in two processes that live through all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = Path(__file__).with_name("alr_worker.py")
    logs = [open(folder / f"log.{rank}", "w+") for rank in range(2)]  # noqa: SIM115
    ranks = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), folder / "rendezvous", folder / "results"],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    except subprocess.TimeoutExpired:
        codes = ["too long"]  # the assertion below shows how far the ranks came
    finally:
        for rank in ranks:
            rank.kill()
        output = []
        for log in logs:
            log.seek(0)
            output.append(log.read()[-4000:])
            log.close()
    assert codes == [0, 0], "\n".join(output)
    return [json.loads((folder / f"results.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", cases())
def test_two_processes(errors, case):
    assert [rank[case] for rank in errors] == ["", ""], "\n".join(rank[case] for rank in errors)
