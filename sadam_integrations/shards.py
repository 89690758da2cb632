"""Adds up counts over the processes that hold the pieces of a tensor: DTensors, FSDP1's shards, DeepSpeed's partitions.

Only processes that hold a piece take part: they see the same steps, gradients and betas, and so agree on when to count.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from sadam_integrations.said import warn


def add_up(counts: Tensor, of: Tensor, optimizer: Optimizer | None = None) -> Tensor:
    """What all pieces of a tensor hold together.

    Args:
        counts: Integers, counted over this process's piece.
        of: The piece: a DTensor, a parameter of FSDP1, or a partition of DeepSpeed's; of a whole tensor the counts are
            returned as they are.
        optimizer: The optimizer whose parameter it is; only DeepSpeed's partitions are found by it.
    """
    if hasattr(of, "to_local"):
        return _of_dtensor(counts, of)
    if is_of_fsdp1(of):
        return _exchange(counts, *_fsdp1_ranks(of))
    if is_of_deepspeed(of) and optimizer is not None:
        return _exchange(counts, *_deepspeed_ranks(of, optimizer))
    return counts


def is_of_fsdp1(p: Any) -> bool:
    """Whether it is a parameter of FullyShardedDataParallel: an original one, or a flat one that holds several."""
    return getattr(p, "_fsdp_flattened", False)


def is_of_deepspeed(p: Tensor) -> bool:
    """Whether it is a flat partition of DeepSpeed's ZeRO, which has no mark of its own."""
    comm = sys.modules.get("deepspeed.comm")
    in_use = comm is not None and comm.is_initialized()
    return in_use and p.dim() == 1 and not isinstance(p, torch.nn.Parameter)


def warn_flat(name: str, params: Sequence[Tensor]) -> None:
    """Warns, on the first process, of tensors that hold several parameters, if there are any among these."""
    if any(is_of_fsdp1(p) and getattr(p, "_is_flat_param", False) for p in params):
        engine, fix = "FullyShardedDataParallel", "For one for each parameter, give it use_orig_params=True"
    elif any(map(is_of_deepspeed, params)):
        engine, fix = "DeepSpeed", "To have one floor for all, give beta a number"
    else:
        return
    if is_first_process():
        warn(
            f'{name}: beta="auto" measures one beta for each flat tensor that {engine} makes of several parameters. '
            f"{fix}."
        )


def is_first_process() -> bool:
    """Whether this is the only process, or the one that speaks for all."""
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())


def _of_dtensor(counts: Tensor, of: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if p.is_replicate() else Partial("sum") for p in of.placements]
    return DTensor.from_local(counts, of.device_mesh, placements, run_check=False).full_tensor()


_HANDLES: weakref.WeakSet = weakref.WeakSet()
"""FSDP1's that were found."""


def _fsdp1_ranks(p: Tensor) -> tuple[Any, Sequence[int]]:
    """The process group over which FSDP1 shards a parameter, and the ranks in it that hold a piece.

    The parameters of a unit lie end to end in its flat parameter, which is cut into equal shards. Nothing leads from a
    parameter to its unit: the garbage collector has to be asked, once.
    """
    for handle in _handles():
        flat = handle.flat_param
        members = [flat] if p is flat else flat._params or []
        index = next((i for i, member in enumerate(members) if member is p), None)
        if index is None:
            continue
        if not handle.uses_sharded_strategy:
            return None, ()
        if p is flat:
            return handle.process_group, range(handle.process_group.size())
        padded = zip(handle._get_flat_param_offsets(), flat._is_padding_mask, strict=True)
        first, last = [ends for ends, is_padding in padded if not is_padding][index]
        size = flat._sharded_size.numel()
        return handle.process_group, range(first // size, last // size + 1)
    if distributed.is_available() and distributed.is_initialized():
        warn(
            'beta="auto": FullyShardedDataParallel\'s record of a parameter was not found, so only the piece of this '
            "process is measured, and saving may fail. If gc.freeze() was called, call it after the first step; or "
            "give beta a number."
        )
    return None, ()


def _handles() -> Iterator[Any]:
    """FSDP1's units: those that are known, then the rest."""
    yield from (known := list(_HANDLES))
    kind = sys.modules["torch.distributed.fsdp._flat_param"].FlatParamHandle
    for found in gc.get_objects():
        if type(found) is kind and found not in known:
            _HANDLES.add(found)
            yield found


def _deepspeed_ranks(p: Tensor, optimizer: Optimizer) -> tuple[Any, Sequence[int]]:
    """The process group over which DeepSpeed partitions the group that a flat tensor is in; all its ranks hold one."""
    zero = _ZERO.get(optimizer, lambda: None)()
    if zero is None:
        bases = sys.modules["deepspeed.runtime.base_optimizer"].ZeROOptimizer
        found = (it for it in gc.get_objects() if issubclass(type(it), bases) and it.optimizer is optimizer)
        zero = next(found, None)
        if zero is None:
            return None, ()
        _ZERO[optimizer] = weakref.ref(zero)
    index = next(i for i, group in enumerate(optimizer.param_groups) if any(q is p for q in group["params"]))
    groups = getattr(zero, "real_dp_process_group", None)  # ZeRO-3 has one for all
    group = groups[index] if groups else zero.dp_process_group
    return group, range(distributed.get_world_size(group))


_ZERO: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
"""From an optimizer to the one of DeepSpeed's that it is in."""


def _exchange(counts: Tensor, group: Any, ranks: Sequence[int]) -> Tensor:
    if len(ranks) < 2:
        return counts
    mine = counts.to(distributed.distributed_c10d._get_object_coll_device(group))
    if len(ranks) == distributed.get_world_size(group):
        distributed.all_reduce(mine, group=group)
        return mine
    own = distributed.get_rank(group)
    others = [distributed.get_global_rank(group, rank) for rank in ranks if rank != own]
    theirs = [torch.empty_like(mine) for _ in others]
    sent = [distributed.P2POp(distributed.isend, mine, rank, group) for rank in others]
    received = [distributed.P2POp(distributed.irecv, t, rank, group) for t, rank in zip(theirs, others, strict=True)]
    for work in distributed.batch_isend_irecv([*sent, *received]):
        work.wait()
    return torch.stack([mine, *theirs]).sum(0)
