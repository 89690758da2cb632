"""The tensors that a kernel is given: plain ones as they are, of DTensors the local shards."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import chain, compress
from operator import and_, attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

PLAIN = {Tensor, torch.nn.Parameter}


class Rows(NamedTuple):
    """A group's tensors.

    Attributes:
        grads: The gradients; of DTensors the local shards.
        columns: The parameters, their moments and their steps, likewise.
        stored: These in one list, the DTensors themselves.
        whole: Whether a row's tensors are all plain, or all sharded alike.
    """

    grads: Sequence[Tensor]
    columns: Sequence[Sequence[Tensor]]
    stored: list[Tensor]
    whole: Sequence[bool]

    def each(self) -> Iterator[tuple]:
        """The rows: whether a kernel can take it at all, the gradient, and the rest.

        Of a parameter that is listed twice it takes the first row alone: threads would update both at the same time.
        """
        seen: dict[int, int] = {}
        first = [seen.setdefault(id(p), i) == i for i, p in enumerate(self.stored[: len(self.grads)])]
        return zip(map(and_, self.whole, first), self.grads, *self.columns, strict=True)

    def chosen(self, served: list[bool]) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients and the parameters of the rows that are served."""
        if all(served):
            return list(self.grads), list(self.columns[0])
        return list(compress(self.grads, served)), list(compress(self.columns[0], served))

    def addresses(self, served: list[bool]) -> list[int]:
        """Where the tensors of the columns lie, without the rows that are not served."""
        tensors = chain(*self.columns)
        return list(map(Tensor.data_ptr, tensors if all(served) else compress(tensors, served * len(self.columns))))


class Layouts:
    """What a kernel relies on in gradients and parameters beside their addresses, to be compared at each step."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.dtypes = [p.dtype for p in params]
        self.numels = [p.numel() for p in params]
        self.bytes = [p.nbytes for p in params]
        self.orders = [order(p) for p in params]
        self.contiguous = not any(self.orders)
        self.single = [n == 1 for n in self.numels]

    def hold(self, grads: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
        """Whether all are as they were: ``p.data`` may have been replaced by another view of the same memory."""
        return (
            list(map(attrgetter("dtype"), grads)) == self.dtypes
            and list(map(Tensor.numel, grads)) == self.numels
            and list(map(attrgetter("nbytes"), params)) == self.bytes
            and self._in_order(grads)
            and self._in_order(params)
            and not any(map(Tensor.is_neg, compress(grads, self.single)))  # larger ones have gaps
        )

    def _in_order(self, tensors: Sequence[Tensor]) -> bool:
        if self.contiguous:
            return all(map(Tensor.is_contiguous, tensors))
        return list(map(order, tensors)) == self.orders


def order(t: Tensor) -> tuple[int, ...] | None:
    """In which order the elements of a tensor lie in memory: None if it is contiguous, else its strides."""
    if t.is_contiguous():
        return None
    return tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)


@functools.lru_cache(maxsize=1024)
def fills(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor is one run of memory without gaps or overlaps, in whatever order: channels-last, transposed."""
    run = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != run:
            return False
        run *= size
    return True


def dense(tensors: Sequence[Tensor]) -> bool:
    """Whether these are similar, and each of them is one run of memory in the order of the first one."""
    first = tensors[0]
    return similar(tensors) and fills(tuple(first.shape), first.stride()) and len(set(map(order, tensors))) == 1


def similar(tensors: Sequence[Tensor]) -> bool:
    """Whether the memory of these holds their very values, all of one dtype, shape and device."""
    first = tensors[0]
    return all(
        type(t) in PLAIN
        and t.layout == torch.strided
        and t.dtype == first.dtype
        and t.shape == first.shape
        and t.device == first.device
        and not t.is_neg()  # autograd leaves the sign of a conjugate's imaginary part for later
        and not t._is_zerotensor()
        for t in tensors
    )


def check_memory(*addresses: int) -> None:
    """Raises where there is no memory at an address of the tensors of a step."""
    if 0 in addresses:
        raise RuntimeError("the memory of a parameter, of its gradient or of its state has been freed")


def rows_of(grads: Sequence[Tensor], columns: Sequence[Sequence[Tensor]]) -> Rows:
    """Takes the gradients, and the parameters, moments and steps."""
    stored = list(chain(*columns))
    if {*map(type, grads), *map(type, columns[0])} <= PLAIN:
        return Rows(grads, columns, stored, [True] * len(grads))
    whole = [len({_sharding(t) for t in row}) == 1 for row in zip(grads, *columns[:-1], strict=True)]
    grads, *columns = [[t.to_local() if hasattr(t, "to_local") else t for t in c] for c in (grads, *columns)]
    return Rows(grads, columns, stored, whole)


def _sharding(t: Any) -> Any:
    if not hasattr(t, "to_local"):
        return None if type(t) in PLAIN else object()
    partial = any(p.is_partial() for p in t.placements)
    return object() if partial else (t.device_mesh, tuple(t.placements))
