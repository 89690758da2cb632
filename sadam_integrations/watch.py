"""Notices what others did to a parameter's state since the last step: replaced it, reset it in place, moved it on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_

from torch import Tensor

_version = attrgetter("_version")


class Watch:
    """What the parameters of a group and their state were after the last step.

    A tensor is recognised by its identity and by autograd's count of changes in place, for which no device has to be
    asked. What is written through ``.data`` or past torch does not count.

    Args:
        known: Parameters and the tensors of their state, as they are now.
    """

    def __init__(self, known: Iterable[tuple[Tensor, Sequence[Tensor]]]) -> None:
        self._params: list[Tensor] = []
        self._state: list[Tensor] = []
        self._versions: list[int] = []
        self._others = {p: (state, _versions(state)) for p, state in known}

    def look(
        self, params: Sequence[Tensor], columns: Sequence[Sequence[Tensor]], members: Iterable[Tensor]
    ) -> tuple[bool, Collection[int]]:
        """Compares what a step begins with to what the last one left.

        Args:
            params: The parameters of the step.
            columns: Their state, a list for each key.
            members: All parameters of the group; what is known of others is forgotten.

        Returns:
            Whether these are the parameters of the last step; and the indices of those whose state is not what a step
            left behind, or that are new to the group.
        """
        state = list(chain(*columns))
        versions = _versions(state)
        same = _same(params, self._params)
        if same and versions == self._versions and _same(state, self._state):
            return True, ()
        before = {**self._others, **self._rows()}
        self._params, self._state, self._versions = list(params), state, versions
        now = self._rows()
        self._others = {p: before[p] for p in members if p in before and p not in now}
        return same, {i for i, p in enumerate(params) if p not in before or not _equal(before[p], now[p])}

    def renew(self) -> None:
        """Takes note of the changes in place that the step itself has made."""
        self._versions = _versions(self._state)

    def _rows(self) -> dict[Tensor, tuple[Sequence[Tensor], list[int]]]:
        n = len(self._params)
        return {p: (self._state[i::n], self._versions[i::n]) for i, p in enumerate(self._params)}


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _equal(a: tuple[Sequence[Tensor], list[int]], b: tuple[Sequence[Tensor], list[int]]) -> bool:
    return a[1] == b[1] and _same(a[0], b[0])


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(_version, tensors))
    except RuntimeError:  # those that were made in inference mode have none
        return []
