"""What one of two processes runs for test_distributed.py: every check, its errors written to a file."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW, chosen_betas

CLASSES = {"Sadam": Sadam, "SAMSGrad": SAMSGrad, "SadamW": SadamW, "SAMSGradW": SAMSGradW}
STEPS = 9


class Model(torch.nn.Module):
    """Over two ranks: even shards (8 rows), uneven ones (5 rows) and a tensor that is empty on one rank (1 row)."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 5)
        self.head = torch.nn.Linear(5, 1)

    def forward(self, x):
        return self.head(self.down(self.up(x).tanh()).tanh())


def fresh():
    torch.manual_seed(0)
    return Model()


def batch(t):
    torch.manual_seed(100 + t)
    return torch.randn(8, 6)


def train(model, optimizer, rows=slice(None), steps=STEPS, start=0):
    for t in range(start, start + steps):
        optimizer.zero_grad()
        model(batch(t)[rows]).square().mean().backward()
        optimizer.step()


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def equal_to_one_process(model, options, cls, betas=None):
    """Compares with a run of one process on the whole batch, and the betas between the ranks."""
    alone = fresh()
    optimizer = cls(alone.parameters(), **options)
    train(alone, optimizer)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach(), rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(q, dict(fresh().named_parameters())[name.removeprefix("module.")])
    if betas is not None:
        want = chosen_betas(optimizer, alone)
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, betas)
        assert all(other == betas for other in everyone), f"the ranks differ: {everyone}"
        assert betas.keys() == want.keys()
        for name in want:
            assert abs(betas[name] / want[name] - 1) < 1e-4, (name, betas[name], want[name])


def my_rows():
    return slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)


def check_ddp(cls, options):
    model = torch.nn.parallel.DistributedDataParallel(fresh())
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer, my_rows())
    equal_to_one_process(model, options, cls, chosen_betas(optimizer, model.module))


def sharded():
    model = fresh()
    for layer in (model.up, model.down, model.head, model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    return model


def check_fsdp2(cls, options):
    model = sharded()
    sizes = [p.to_local().numel() for p in model.parameters()]
    assert (min(sizes) == 0) == (dist.get_rank() == 1)
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer, my_rows())
    equal_to_one_process(model, options, cls, chosen_betas(optimizer, model))


def check_tensor_parallel(cls, options):
    mesh = init_device_mesh("cpu", (2,))
    model = parallelize_module(fresh(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    kinds = {type(p) for p in model.parameters()}
    assert DTensor in kinds and len(kinds) == 2  # the head's parameters are plain
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer)
    equal_to_one_process(model, options, cls, chosen_betas(optimizer, model))


def check_zero_redundancy(cls, options):
    model = torch.nn.parallel.DistributedDataParallel(fresh())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, **options)
    train(model, optimizer, my_rows())
    equal_to_one_process(model, options, cls)


def checkpoint(cls, options, full):
    """Trains, saves, loads into a fresh sharded model and compares the rest of training bit for bit."""
    model = sharded()
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer, my_rows())
    settings = dcp.StateDictOptions(full_state_dict=full, cpu_offload=full)
    weights, state = dcp.get_state_dict(model, optimizer, options=settings)
    other = sharded()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    restored = cls(other.parameters(), **options)
    if full:  # only rank 0 has it: it is broadcast
        settings = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        weights, state = copy.deepcopy((weights, state))
    else:
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        save({"model": weights, "optimizer": state}, checkpoint_id=folder[0], no_dist=False)
        weights, state = dcp.get_state_dict(other, restored, options=settings)
        load({"model": weights, "optimizer": state}, checkpoint_id=folder[0])
    dcp.set_model_state_dict(other, weights, options=settings)  # one by one: on rank 1 both are empty
    dcp.set_optimizer_state_dict(other, restored, state, options=settings)
    betas = chosen_betas(optimizer, model)
    assert chosen_betas(restored, other) == betas, (chosen_betas(restored, other), betas)
    train(model, optimizer, my_rows(), 4, STEPS), train(other, restored, my_rows(), 4, STEPS)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(p), whole(q)), name


def check_full_checkpoint(cls, options):
    checkpoint(cls, options, full=True)


def check_sharded_checkpoint(cls, options):
    checkpoint(cls, options, full=False)


def cases():
    """From the name of a case to its check, class and arguments."""
    found = {}
    for kind, check in list(globals().items()):
        if not kind.startswith("check_"):
            continue
        for beta in ("auto", 50.0):
            for foreach in (False, True):
                for name in ("SadamW", "SAMSGrad") if beta == "auto" else ("SAMSGradW",):
                    key = f"{kind.removeprefix('check_')}-{name}-{beta}-{'foreach' if foreach else 'for-loop'}"
                    options = {"lr": 1e-2, "beta": beta, "foreach": foreach, "weight_decay": 0.1}
                    found[key] = (check, CLASSES[name], options)
    return found


def main(rank, rendezvous, results):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    errors = {}
    for name, (check, cls, options) in cases().items():
        print(name, flush=True)
        try:
            check(cls, options)
            errors[name] = ""
        except Exception:
            errors[name] = traceback.format_exc()
            print(errors[name], flush=True)
        dist.barrier()
    with open(f"{results}.{rank}", "w") as file:
        json.dump(errors, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
