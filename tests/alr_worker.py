"""What one of two processes runs for test_alr_distributed.py: the A-LR of sharded optimizers, against one process."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from distributed_worker import CLASSES, fresh, sharded, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sadam_integrations import alr, moments

CLASSES |= {"AdamW": torch.optim.AdamW}
OPTIONS = {
    "auto": ("SadamW", {"lr": 1e-2}),
    "published": ("SAMSGrad", {"lr": 1e-2, "beta": 50.0, "bias_correction": "outer"}),
    "amsgrad": ("AdamW", {"lr": 1e-2, "amsgrad": True}),
}


def alone(cls, options):
    """One process; the others train on the same rows, so that the mean of their gradients is the same to the bit."""
    model = fresh()
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer)
    return model, optimizer


def plain(samples):
    return [one._replace(root=one.root.tolist(), alr=one.alr.tolist()) for one in samples]


def compare(optimizer, model, cls, options):
    """The same samples as of one process, to the bit, whether all coordinates are drawn or few."""
    other, one = alone(cls, options)
    numbers = torch.get_rng_state()
    for limit, least in ((10**6, 1000), (60, 5)):
        alr.LEAST = least
        want, found = alr.sample(one, other, limit), alr.sample(optimizer, model, limit)
        assert len(found) == 6 and plain(found) == plain(want), (plain(found), plain(want))
        assert alr.summary(found) == alr.summary(want)
    assert sum(len(s.root) for s in found) < 0.7 * sum(s.size for s in found)
    assert torch.equal(torch.get_rng_state(), numbers)


def check_ddp(cls, options):
    model = torch.nn.parallel.DistributedDataParallel(fresh())
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer)
    compare(optimizer, model, cls, options)
    if dist.get_rank() == 0:  # nothing is exchanged
        alr.sample(optimizer)


def check_fsdp2(cls, options):
    """Even shards, uneven ones, and a tensor that is empty on one rank."""
    model = sharded()
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer)
    compare(optimizer, model, cls, options)


def check_tensor_parallel(cls, options):
    mesh = init_device_mesh("cpu", (2,))
    model = parallelize_module(fresh(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer)
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in model.parameters()]
    one = cls([torch.nn.Parameter(t.detach().clone()) for t in whole], **options)
    for p, q in zip(model.parameters(), one.param_groups[0]["params"], strict=True):
        one.state[q] = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in optimizer.state[p].items()}
    found = alr.sample(optimizer)
    assert len(found) == 6 and plain(found) == plain(alr.sample(one))


def check_zero_redundancy(cls, options):
    model = torch.nn.parallel.DistributedDataParallel(fresh())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, **options)
    assert alr.sample(optimizer, model) == []
    train(model, optimizer)
    assert len(moments.unwrap(optimizer).state) < 6
    compare(optimizer, model, cls, options)
    assert [s.name for s in alr.sample(optimizer)] == [f"0.{j}" for j in range(6)]


def check_zero_redundancy_with_nothing_on_one_rank(cls, options):
    p = torch.nn.Parameter(torch.arange(1.0, 8.0))
    optimizer = ZeroRedundancyOptimizer([p], optimizer_class=cls, **options)
    p.grad = torch.arange(7.0) - 1
    optimizer.step()
    assert len(moments.unwrap(optimizer).state) == (dist.get_rank() == 0)
    (found,) = alr.sample(optimizer)
    assert (found.size, found.unseen, len(found.root)) == (7, 1, 6)
    momentum = ZeroRedundancyOptimizer([p], optimizer_class=torch.optim.Adamax)
    momentum.step()
    try:
        alr.sample(momentum)
        raise AssertionError("no error")
    except TypeError as error:
        assert "Adamax keeps no second moment" in str(error)


def flat(optimizer, cls, options, model=None):
    """Flat pieces: other names and positions, but the same coordinates; padding has no gradient."""
    found, want = alr.sample(optimizer, model), alr.sample(alone(cls, options)[1])
    for key in ("root", "alr"):
        a, b = (torch.cat([getattr(s, key) for s in samples]).sort().values for samples in (found, want))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    everyone = [None, None]
    dist.all_gather_object(everyone, plain(found))
    assert everyone[0] == everyone[1]
    return found


def check_fsdp1_of_parameters(cls, options):
    if options.get("beta", "auto") == "auto" and cls is not CLASSES["AdamW"]:
        return  # measures the pieces: not one process's betas
    model = FullyShardedDataParallel(fresh(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer)
    names = [s.name for s in flat(optimizer, cls, options, model)]
    assert set(names) == {name for name, _ in fresh().named_parameters()} and len(names) == 7  # one is cut in two
    metrics = alr.metrics(optimizer, model, layers=True)
    assert len([key for key in metrics if key.startswith("alr_layer/")]) == 18


def check_fsdp1_flat(cls, options):
    if options.get("beta", "auto") == "auto" and cls is not CLASSES["AdamW"]:
        return
    model = FullyShardedDataParallel(fresh(), device_id=torch.device("cpu"))
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer)
    assert [s.size for s in flat(optimizer, cls, options)] == [78, 78]


def check_deepspeed(cls, options):
    """A stand-in: each rank holds half of one flat float32 tensor, inside a wrapper with DeepSpeed's names."""

    class ZeROOptimizer:
        def __init__(self, inner):
            self.optimizer, self.param_groups, self.dp_process_group = inner, inner.param_groups, dist.group.WORLD

    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = cls([p], **options)
    optimizer.state[p] = {
        "step": torch.tensor(5.0), "exp_avg": torch.zeros(3), "beta": 50.0,
        "exp_avg_sq": torch.tensor([1.0, 2.0, 3.0]) + 3 * dist.get_rank(),
    }  # fmt: skip
    found = alr.sample(ZeROOptimizer(optimizer))
    assert [s.name for s in found] == ["0.0", "0.0"]
    correction = 1.0 if options.get("bias_correction") == "outer" else 1 - 0.999**5
    want = (torch.arange(1.0, 7.0) / correction).sqrt()
    torch.testing.assert_close(torch.cat([s.root for s in found]), want)


def cases():
    """From the name of a case to its check, class and options."""
    found = {}
    for kind, check in list(globals().items()):
        if kind.startswith("check_"):
            for name, (cls, options) in OPTIONS.items():
                found[f"{kind.removeprefix('check_')}-{name}"] = (check, CLASSES[cls], options)
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
        alr.LEAST = 1000
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
