"""What each process runs for one stage of test_distributed.py's resharding: loads, compares, trains, saves."""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_worker import CLASSES, dcp, load, my_rows, save, sharded, train, whole

from sadam_integrations import chosen_betas

STEPS = 4
KINDS = {"SadamW": {"lr": 1e-2, "beta": "auto"}, "SAMSGrad": {"lr": 1e-2, "beta": 50.0}}


def whole_state(model, optimizer):
    """Everything that must survive, as plain tensors."""
    state = [
        {key: value if key == "beta" else whole(value) for key, value in s.items()} for s in optimizer.state.values()
    ]
    return [whole(p) for p in model.parameters()], state, chosen_betas(optimizer, model)


def stage(folder, number, name, options, dies):
    """Trains from the checkpoint of the last stage, if there is one, to the next."""
    model = sharded()
    optimizer = CLASSES[name](model.parameters(), **options)
    if number:
        weights, state = dcp.get_state_dict(model, optimizer)
        load({"model": weights, "optimizer": state}, checkpoint_id=folder / f"{name}-{number - 1}")
        dcp.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        want = torch.load(folder / f"{name}-{number - 1}.pt")
        torch.testing.assert_close(whole_state(model, optimizer), want, rtol=0, atol=0)
    train(model, optimizer, my_rows(), STEPS, STEPS * number)
    weights, state = dcp.get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": state}, checkpoint_id=folder / f"{name}-{number}", no_dist=False)
    found = whole_state(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{name}-{number}.pt")
    if dies:
        if dist.get_rank() == dist.get_world_size() - 1:
            os._exit(9)
        train(model, optimizer, my_rows(), STEPS)


def main(rank, world, number, dies, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rendezvous = f"file://{folder}/rendezvous-{number}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for name, options in KINDS.items():
        stage(Path(folder), number, name, options, dies and name == list(KINDS)[-1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), sys.argv[5])
