"""The tensors that a kernel is given: plain ones as they are, of DTensors the local shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, compress
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
        """The rows: whether the tensors belong together, the gradient, and the rest."""
        return zip(self.whole, self.grads, *self.columns, strict=True)

    def addresses(self, served: list[bool]) -> list[int]:
        """Where the tensors of the columns lie, without the rows that are not served."""
        return list(map(Tensor.data_ptr, compress(chain(*self.columns), served * len(self.columns))))


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
