"""The specification applied to one tensor after the other, in pieces that stay in a CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sadam_integrations.update import update

PIECE = 1 << 16
"""Elements updated at once. On BERT-base's shapes this is 4 to 5 times faster than whole tensors: intermediate results
never leave the cache. Half and double the size are both slower, on one thread as on two."""


def for_loop(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    betas: Sequence[float],
    *,
    capturable: bool,
    memo: dict[str, Any] | None = None,
    **options,
) -> bool:
    """See :class:`sadam_integrations.backends.Backend`."""
    counts = counted(steps, capturable)
    for row in zip(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, counts, betas, strict=True):
        tensors, step, beta = [t for t in row[:5] if t is not None], row[5], row[6]
        for param, grad, *state in pieces(tensors):
            stored = [param, *state]
            p, m, v, *v_max = [t.clone() for t in stored] if torch.is_grad_enabled() else stored
            new = update(p, grad, m, v, v_max[0] if v_max else None, step=step, beta=beta, **options)
            for old, value in zip(stored, (t for t in new if t is not None), strict=True):
                old.copy_(value)
    return True


def counted(steps: Sequence[Tensor], capturable: bool) -> Sequence[float | Tensor]:
    """Counts this step, and returns the counts: as numbers, unless nothing may be read from the device or traced."""
    for step in steps:
        step += 1
    as_tensors = capturable or torch.is_grad_enabled() or torch.compiler.is_compiling()
    return steps if as_tensors else [step.item() for step in steps]


def pieces(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Splits tensors of one shape alike, for work that goes element by element; whole ones where that cannot help."""
    size = tensors[0].numel()
    plain = all(t.device.type == "cpu" and not hasattr(t, "to_local") and t.is_contiguous() for t in tensors)
    if size <= PIECE or not plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield tensors
        return
    flat = [t.view(-1) for t in tensors]
    for start in range(0, size, PIECE):
        yield [t[start : start + PIECE] for t in flat]
