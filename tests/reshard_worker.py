"""What each process runs for one stage of test_distributed.py's resharding: loads, compares, trains, saves."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from distributed_worker import CLASSES, dcp, fsdp1, load, my_rows, save, sharded, train

from sadam_integrations import chosen_betas

STEPS = 4
WHOLE = dcp.StateDictOptions(full_state_dict=True)


class Kind(NamedTuple):
    """A model that is sharded in some way, and its optimizer."""

    build: Callable
    cls: str
    options: dict


KINDS = {
    "fsdp2": Kind(sharded, "SadamW", {"lr": 1e-2, "beta": "auto"}),
    "fsdp2-fixed": Kind(sharded, "SAMSGrad", {"lr": 1e-2, "beta": 50.0}),
    "fsdp1": Kind(partial(fsdp1, use_orig_params=True), "SadamW", {"lr": 1e-2, "beta": "auto"}),
    "fsdp1-flat": Kind(partial(fsdp1, use_orig_params=False), "Sadam", {"lr": 1e-2, "beta": 50.0}),
}


def whole_state(model, optimizer):
    """Weights and state, all that must survive."""
    weights, saved = dcp.get_state_dict(model, optimizer, options=WHOLE)
    return weights, saved["state"]


def stage(folder, number, name, kind, dies):
    """Trains from the checkpoint of the last stage, if there is one, to the next.

    FSDP1's goes through a file that holds the whole: its shards torch.distributed.checkpoint cannot load, of AdamW
    either.
    """
    model = kind.build()
    optimizer = CLASSES[kind.cls](model.parameters(), **kind.options)
    settings = WHOLE if "fsdp1" in name else dcp.StateDictOptions()
    if number:
        last = folder / f"{name}-{number - 1}"
        want, _, saved = torch.load(last.with_suffix(".pt"), weights_only=True)
        if settings is not WHOLE:
            weights, state = dcp.get_state_dict(model, optimizer)
            load({"model": weights, "optimizer": state}, checkpoint_id=last)
            saved = weights, state
        dcp.set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=settings)
        torch.testing.assert_close(whole_state(model, optimizer), want, rtol=0, atol=0)
    train(model, optimizer, my_rows(), STEPS, STEPS * number)
    weights, state = dcp.get_state_dict(model, optimizer, options=settings)
    if settings is not WHOLE:
        save({"model": weights, "optimizer": state}, checkpoint_id=folder / f"{name}-{number}", no_dist=False)
        weights, state = {}, {}
    found = whole_state(model, optimizer), chosen_betas(optimizer, model), (weights, state)
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
    for name, kind in KINDS.items():
        stage(Path(folder), number, name, kind, dies and name == list(KINDS)[-1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), sys.argv[5])
