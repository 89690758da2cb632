"""Two and three processes on a CPU: every engine of torch equals one process; sharded checkpoints; a lost worker."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from distributed_worker import FullyShardedDataParallel, cases, fresh, train

from sadam_integrations import SadamW, chosen_betas


def start(worker, folder, *words, world):
    """Starts a worker's processes, each with its rank, the number of all, and the words; their output goes to logs."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(world):
        with open(folder / f"log.{rank}", "w") as log:
            command = [sys.executable, Path(__file__).with_name(worker), str(rank), str(world), *map(str, words)]
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    return ranks


def finish(ranks, folder, timeout):
    """Waits for all, kills what is left, and returns the exit codes and the ends of the logs."""
    try:
        codes = [rank.wait(timeout=timeout) for rank in ranks]
    except subprocess.TimeoutExpired:
        codes = ["too long"]
    finally:
        for rank in ranks:
            rank.kill()
    return codes, "\n".join((folder / f"log.{rank}").read_text()[-4000:] for rank in range(len(ranks)))


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Runs every case once, in processes that live through all of them."""
    found = {}

    def run(world, everything):
        if (world, everything) not in found:
            folder = tmp_path_factory.mktemp("ranks")
            words = [int(everything), folder / "rendezvous", folder / "results"]
            ranks = start("distributed_worker.py", folder, *words, world=world)
            codes, output = finish(ranks, folder, 1200 if everything else 240)
            assert codes == [0] * world, output
            found[world, everything] = [json.loads((folder / f"results.{rank}").read_text()) for rank in range(world)]
        return found[world, everything]

    return run


@pytest.mark.parametrize("case", cases())
def test_two_processes(errors, case):
    assert [rank[case] for rank in errors(2, False)] == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), [(world, case) for world in (2, 3, 4) for case in cases(True, world)])
def test_every_class_in_two_three_and_four_processes(errors, world, case):
    assert [rank[case] for rank in errors(world, True)] == [""] * world


def test_a_checkpoint_moves_from_one_process_to_two_to_three_to_one_and_survives_a_lost_one(tmp_path):
    from reshard_worker import CLASSES, KINDS, STEPS

    for number, world in enumerate((1, 2, 3, 1)):
        dies = world == 2
        ranks = start("reshard_worker.py", tmp_path, number, int(dies), tmp_path, world=world)
        codes, output = finish(ranks, tmp_path, 100)
        if dies:  # the one that is left ends with an error, and does not wait for ever
            assert codes == [1, 9] and "RuntimeError" in output, (codes, output)
        else:
            assert codes == [0] * world, output
    for name, kind in KINDS.items():
        alone = fresh()
        optimizer = CLASSES[kind.cls](alone.parameters(), **kind.options)
        train(alone, optimizer, steps=4 * STEPS)
        (weights, _), betas, _ = torch.load(tmp_path / f"{name}-3.pt")
        torch.testing.assert_close(weights, dict(alone.state_dict()), rtol=2e-5, atol=1e-6)
        if kind.options["beta"] == "auto":
            assert betas == pytest.approx(chosen_betas(optimizer, alone), rel=1e-4)


def test_fsdp1_behind_a_frozen_garbage_collector():
    """Nothing leads from a parameter to its shards then: it goes on with what this process has, and says so."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(fresh(), device_id=torch.device("cpu"), use_orig_params=True)
        optimizer = SadamW(model.parameters())
        gc.freeze()
        with pytest.warns(UserWarning, match="record of a parameter was not found.*or give beta a number"):
            train(model, optimizer, steps=1)
        assert all(chosen_betas(optimizer).values())
    finally:
        gc.unfreeze()
        dist.destroy_process_group()
