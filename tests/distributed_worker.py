"""What each of two to four processes runs for test_distributed.py: every check, its errors written to a file."""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from importlib.util import find_spec
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sadam_integrations import Sadam, SadamW, SAMSGrad, SAMSGradW, chosen_betas

CLASSES = {"Sadam": Sadam, "SAMSGrad": SAMSGrad, "SadamW": SadamW, "SAMSGradW": SAMSGradW}
STEPS = 9
DIFFERENCES = []
"""How far each compared tensor was from one process's, for the log."""


class Model(torch.nn.Module):
    """Over two ranks or three: even shards (12 rows), uneven ones (5 rows), a tensor that is empty on some (1 row)."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 12), torch.nn.Linear(12, 5)
        self.head = torch.nn.Linear(5, 1)

    def forward(self, x):
        return self.head(self.down(self.up(x).tanh()).tanh())


def fresh(seed=0):
    torch.manual_seed(seed)
    return Model()


def batch(t):
    torch.manual_seed(100 + t)
    return torch.randn(12, 6)


def loss(model, t, rows=slice(None)):
    return model(batch(t)[rows]).square().mean()


def train(model, optimizer, rows=slice(None), steps=STEPS, start=0):
    for t in range(start, start + steps):
        optimizer.zero_grad()
        loss(model, t, rows).backward()
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
        DIFFERENCES.append((whole(p) - q.detach()).abs().max().item())
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


def rows_of(rank):
    size = 12 // dist.get_world_size()
    return slice(size * rank, size * rank + size)


def my_rows():
    return rows_of(dist.get_rank())


def check_ddp(cls, options):
    model = torch.nn.parallel.DistributedDataParallel(fresh())
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer, my_rows())
    equal_to_one_process(model, options, cls, chosen_betas(optimizer, model.module))


def world_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(mesh=None, **settings):
    model = fresh()
    for layer in (model.up, model.down, model.head, model):
        fully_shard(layer, mesh=mesh or world_mesh(), **settings)
    return model


def check_fsdp2(cls, options):
    model = sharded()
    sizes = [p.to_local().numel() for p in model.parameters()]
    assert (min(sizes) == 0) == (dist.get_rank() > 0)
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer, my_rows())
    equal_to_one_process(model, options, cls, chosen_betas(optimizer, model))


def check_fsdp2_offload(cls, options):
    model = sharded(offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer, my_rows())
    equal_to_one_process(model, options, cls, chosen_betas(optimizer, model))


def check_fsdp2_mixed_precision(cls, options):
    """The weights are float32, the model computes in bfloat16: as one process that casts them itself."""
    model = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = cls(model.parameters(), **options)
    alone = fresh()
    other = cls(alone.parameters(), **options)
    world = dist.get_world_size()
    for t in range(STEPS):
        optimizer.zero_grad(), other.zero_grad()
        loss(model, t, my_rows()).backward()
        for rank in range(world):
            half = {name: p.bfloat16() for name, p in alone.named_parameters()}
            found = torch.func.functional_call(alone, half, batch(t)[rows_of(rank)].bfloat16())
            (found.square().mean() / world).backward()
        optimizer.step(), other.step()
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        # a float32 rounding can be one of bfloat16, 0.4 %: of the nine steps of up to lr, that is 1e-3 at most
        torch.testing.assert_close(whole(p), q.detach(), rtol=0, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def check_optimizer_in_backward(cls, options):
    """One optimizer for each parameter, which steps as soon as the gradient is there."""
    for model, rows in ((fresh(), slice(None)), (sharded(), my_rows())):
        optimizers = {p: cls([p], **options) for p in model.parameters()}

        def step(p, optimizers=optimizers):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for t in range(STEPS):
            loss(model, t, rows).backward()
        betas = {name: chosen_betas(optimizers[p])["0.0"] for name, p in model.named_parameters()}
        equal_to_one_process(model, options, cls, betas)


def fsdp1(use_orig_params, seed=0, **settings):
    """A unit a layer: some parameters are cut anywhere, and some ranks have no piece of others."""
    settings |= {"use_orig_params": use_orig_params, "auto_wrap_policy": ModuleWrapPolicy({torch.nn.Linear})}
    return FullyShardedDataParallel(fresh(seed), device_id=torch.device("cpu"), **settings)


def check_fsdp1(cls, options):
    """With the original parameters, also where they are copied: one process's weights and betas, alike on all ranks."""
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD):
        fsdp1_equals_one_process(fsdp1(use_orig_params=True, sharding_strategy=strategy), cls, options)


def four_fsdp1_hybrid(cls, options):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fsdp1(use_orig_params=True, sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh)
    fsdp1_equals_one_process(model, cls, options)


def fsdp1_equals_one_process(model, cls, options):
    optimizer = cls(model.parameters(), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*beta=")
        train(model, optimizer, my_rows())
    own = chosen_betas(optimizer, model) if options["beta"] == "auto" else {}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: beta for name, beta in own.items() if beta})
    betas = {name: beta for own in everyone for name, beta in own.items()}
    assert all(betas[name] == beta for own in everyone for name, beta in own.items()), everyone
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        equal_to_one_process(model, options, cls, betas or None)


def check_fsdp1_flat(cls, options):
    """A fixed beta as one process; "auto" measures the flat parameters, says so once, and ends within seed noise."""
    ends = []
    for seed in range(4 if options["beta"] == "auto" else 1):
        model = fsdp1(use_orig_params=False, seed=seed)
        optimizer = cls(model.parameters(), **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optimizer, my_rows())
        said = [w for w in caught if "one beta for each flat tensor" in str(w.message)]
        expected = options["beta"] == "auto" and dist.get_rank() == 0
        assert len(said) == expected, [str(w.message) for w in caught]
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, chosen_betas(optimizer, model))
        assert all(other == everyone[0] for other in everyone) and all(everyone[0].values()), everyone
        if options["beta"] != "auto":
            with FullyShardedDataParallel.summon_full_params(model, writeback=False):
                equal_to_one_process(model, options, cls)
            continue
        alone = fresh(seed)
        train(alone, cls(alone.parameters(), **options))
        with torch.no_grad():
            ends.append([loss(m, 0).item() for m in (model, alone, fresh(seed))])
    if ends:
        ours, theirs, before = zip(*ends, strict=True)
        assert max(theirs) < min(before)
        assert abs(statistics.mean(ours) - statistics.mean(theirs)) < statistics.stdev(theirs), ends


def check_tensor_parallel(cls, options):
    model = parallelize_module(fresh(), world_mesh(), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    kinds = {type(p) for p in model.parameters()}
    assert DTensor in kinds and len(kinds) == 2  # the head's parameters are plain
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer)
    equal_to_one_process(model, options, cls, chosen_betas(optimizer, model))


def four_hsdp(cls, options):
    model = sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    optimizer = cls(model.parameters(), **options)
    train(model, optimizer, my_rows())
    equal_to_one_process(model, options, cls, chosen_betas(optimizer, model))


def four_tensor_parallel_and_fsdp2(cls, options):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(fresh(), mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for layer in (model.up, model.down, model.head, model):
        fully_shard(layer, mesh=mesh["dp"])
    optimizer = cls(model.parameters(), **options)
    half = 6 * mesh["dp"].get_local_rank()
    train(model, optimizer, slice(half, half + 6))
    equal_to_one_process(model, options, cls, chosen_betas(optimizer, model))


def check_zero_redundancy(cls, options):
    model = torch.nn.parallel.DistributedDataParallel(fresh())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, **options)
    train(model, optimizer, my_rows())
    equal_to_one_process(model, options, cls)


def check_zero_redundancy_checkpoint(cls, options):
    """Gathered on rank 0 and loaded by all, as its documentation says; DDP's first step sums in an order of its own."""
    models = [torch.nn.parallel.DistributedDataParallel(fresh(seed)) for seed in (0, 1)]
    one, other = (ZeroRedundancyOptimizer(m.parameters(), optimizer_class=cls, **options) for m in models)
    train(models[0], one, my_rows())
    one.consolidate_state_dict(to=0)
    saved = [one.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    models[1].load_state_dict(models[0].state_dict())
    other.load_state_dict(copy.deepcopy(saved[0]))
    assert chosen_betas(one) == chosen_betas(other)
    train(models[0], one, my_rows(), STEPS, STEPS), train(models[1], other, my_rows(), STEPS, STEPS)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def shared_folder():
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return folder[0]


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
        folder = shared_folder()
        save({"model": weights, "optimizer": state}, checkpoint_id=folder, no_dist=False)
        weights, state = dcp.get_state_dict(other, restored, options=settings)
        load({"model": weights, "optimizer": state}, checkpoint_id=folder)
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


FSDP1_TYPES = {
    "full": (StateDictType.FULL_STATE_DICT, FullStateDictConfig(), FullOptimStateDictConfig(False)),
    "rank0": (StateDictType.FULL_STATE_DICT, FullStateDictConfig(), FullOptimStateDictConfig(False, rank0_only=True)),
    "sharded": (StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig(False)),
}
"""Without offload_to_cpu (False): on a CPU FSDP then saves one moment in the other's place, of AdamW too."""


def by_fsdp(model, optimizer, other, restored, kind):
    """FSDP's own functions."""
    with FullyShardedDataParallel.state_dict_type(model, *FSDP1_TYPES[kind]):
        weights, state = model.state_dict(), FullyShardedDataParallel.optim_state_dict(model, optimizer)
    with FullyShardedDataParallel.state_dict_type(other, *FSDP1_TYPES[kind]):
        other.load_state_dict(weights)
        restored.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(other, restored, state))


def by_checkpoint(model, optimizer, other, restored, kind):
    """torch.distributed.checkpoint."""
    full = kind != "sharded"
    settings = dcp.StateDictOptions(full_state_dict=full, broadcast_from_rank0=kind == "rank0")
    weights, state = dcp.get_state_dict(model, optimizer, options=dcp.StateDictOptions(full_state_dict=full))
    if kind == "rank0" and dist.get_rank():
        weights, state = {}, {}
    dcp.set_model_state_dict(other, weights, options=settings)  # one by one: on rank 1 both are empty
    dcp.set_optimizer_state_dict(other, restored, state, options=settings)


def by_accelerate(model, optimizer, other, restored, kind):
    """accelerate's functions, which the Trainer calls."""
    from accelerate import PartialState
    from accelerate.utils import fsdp_utils

    PartialState(cpu=True)  # its loggers ask for one
    types = dict(
        zip(("state_dict_type", "state_dict_config", "optim_state_dict_config"), FSDP1_TYPES[kind], strict=True)
    )
    plugin = SimpleNamespace(fsdp_version=1, **types)
    process = SimpleNamespace(process_index=dist.get_rank(), num_processes=dist.get_world_size())
    process.is_main_process, process.wait_for_everyone = dist.get_rank() == 0, dist.barrier
    folder = shared_folder()
    fsdp_utils.save_fsdp_optimizer(plugin, process, optimizer, model, folder)
    dist.barrier()
    with FullyShardedDataParallel.state_dict_type(model, *FSDP1_TYPES["full"]):
        weights = model.state_dict()
    with FullyShardedDataParallel.state_dict_type(other, *FSDP1_TYPES["full"]):
        other.load_state_dict(weights)
    fsdp_utils.load_fsdp_optimizer(plugin, process, restored, other, folder)


def check_fsdp1_checkpoints(cls, options):
    """Every way of saving and loading, as AdamW goes through it: the rest of training is bit for bit the same."""
    ways = [by_fsdp, by_checkpoint, *([by_accelerate] if find_spec("accelerate") else [])]
    for kind, way, use_orig_params in itertools.product(FSDP1_TYPES, ways, (False, True)):
        if (kind, way) == ("sharded", by_accelerate):  # which fails with AdamW, too: "Missing key ... param_groups"
            continue
        model, other = fsdp1(use_orig_params), fsdp1(use_orig_params, seed=1)
        optimizer, restored = (cls(m.parameters(), **options) for m in (model, other))
        train(model, optimizer, my_rows())
        way(model, optimizer, other, restored, kind)
        betas = {name: beta for name, beta in chosen_betas(optimizer, model).items() if beta}
        assert betas == {name: beta for name, beta in chosen_betas(restored, other).items() if beta}
        train(model, optimizer, my_rows(), STEPS, STEPS), train(other, restored, my_rows(), STEPS, STEPS)
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q), (kind, way.__name__, use_orig_params, name)


def check_adamw_checkpoints(cls, options):
    """A sharded checkpoint of AdamW goes on in ours, and one of ours in AdamW, each with a partial load."""
    amsgrad = {"amsgrad": cls in (SAMSGrad, SAMSGradW)}
    for first, second in ((torch.optim.AdamW, cls), (cls, torch.optim.AdamW)):
        arguments = [amsgrad if kind is torch.optim.AdamW else options for kind in (first, second)]
        model, other = sharded(), sharded()
        saved, loaded = first(model.parameters(), **arguments[0]), second(other.parameters(), **arguments[1])
        train(model, saved, my_rows())
        folder = shared_folder()
        save({"optimizer": dcp.get_optimizer_state_dict(model, saved)}, checkpoint_id=folder, no_dist=False)
        state = {"optimizer": dcp.get_optimizer_state_dict(other, loaded)}
        load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
        dcp.set_optimizer_state_dict(other, loaded, state["optimizer"])
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            for key in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                if key in saved.state[p]:
                    assert torch.equal(whole(saved.state[p][key]), whole(loaded.state[q][key])), key
        train(other, loaded, my_rows(), 2, STEPS)
        if second is cls:
            assert all(chosen_betas(loaded, other).values())


def cases(everything=False, world=2):
    """From the name of a case to its check, class and arguments: a few for each check, or all there are."""
    prefix = "four_" if world == 4 else "check_"
    few = [("SadamW", "auto", None), ("SAMSGrad", "auto", True), ("SAMSGradW", 50.0, False), ("Sadam", 50.0, None)]
    every = list(itertools.product(CLASSES, ("auto", 50.0), (None, False, True)))
    found = {}
    for kind, check in list(globals().items()):
        if kind.startswith(prefix):
            for name, beta, foreach in every if everything else few:
                how = {None: "default", False: "for-loop", True: "foreach"}[foreach]
                options = {"lr": 1e-2, "beta": beta, "foreach": foreach, "weight_decay": 0.1}
                found[f"{kind.removeprefix(prefix)}-{name}-{beta}-{how}"] = (check, CLASSES[name], options)
    return found


def main(rank, world, everything, rendezvous, results):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    errors = {}
    for name, (check, cls, options) in cases(everything, world).items():
        print(name, end=" ", flush=True)
        DIFFERENCES.clear()
        try:
            check(cls, options)
            errors[name] = ""
            print(f"differs by {max(DIFFERENCES, default=0.0):.1e} at most", flush=True)
        except Exception:
            errors[name] = traceback.format_exc()
            print(errors[name], flush=True)
        dist.barrier()
    with open(f"{results}.{rank}", "w") as file:
        json.dump(errors, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *sys.argv[4:])
