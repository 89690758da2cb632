"""Many tensors in few launches, with torch's ``_foreach_`` operators: the plain-torch way on a GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sadam_integrations.backends.for_loop import counted, for_loop
from sadam_integrations.update import HALF, corrections, widen


def foreach(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    betas: Sequence[float],
    *,
    memo: dict[str, Any] | None = None,
    **options,
) -> bool:
    """See :class:`sadam_integrations.backends.Backend`. A parameter whose beta is zero takes the for-loop."""
    batches = defaultdict(list)
    for row in zip(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, betas, strict=True):
        param, grad, beta = row[0], row[1], row[-1]
        dtypes = tuple(None if t is None else t.dtype for t in row[:5])
        kind = None if beta == 0 else (type(param), param.device, dtypes, type(grad), _mesh(param))
        batches[kind].append(row)
    for kind, rows in batches.items():
        columns = [list(column) for column in zip(*rows, strict=True)]
        (for_loop if kind is None else _batch)(*columns, **options)
    return True


def _mesh(param: Tensor):
    return getattr(param, "device_mesh", None)  # DTensors of different meshes cannot share an operator


def _batch(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, betas,
    *, lr, beta1, beta2, weight_decay, decoupled, bias_correction, maximize, gain, capturable,
):  # fmt: skip
    amsgrad = max_exp_avg_sqs[0] is not None
    stored = [params, exp_avgs, exp_avg_sqs] + ([max_exp_avg_sqs] if amsgrad else [])
    work = [[widen(t) for t in tensors] for tensors in stored]
    p, m, v, *v_max = work
    g = [widen(t) for t in grads]

    if maximize:
        g = list(torch._foreach_neg(g))
    if decoupled:
        torch._foreach_mul_(p, 1 - lr * weight_decay)
    elif weight_decay:
        g = list(torch._foreach_add(g, p, alpha=weight_decay))
    torch._foreach_lerp_(m, g, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)
    if amsgrad:
        torch._foreach_maximum_(v_max[0], v)

    factors: Any = [corrections(step, beta1, beta2, bias_correction) for step in counted(steps, capturable)]
    denominators = torch._foreach_sqrt(v_max[0] if amsgrad else v)
    torch._foreach_mul_(denominators, [for_root for _, for_root in factors])
    caps = torch._foreach_mul(denominators, [-beta for beta in betas])
    torch._foreach_exp_(caps)
    torch._foreach_log1p_(caps)
    torch._foreach_div_(caps, betas)
    torch._foreach_add_(denominators, caps)
    updates = torch._foreach_div(m, denominators)
    torch._foreach_mul_(updates, [gain * lr * for_lr for for_lr, _ in factors])
    torch._foreach_sub_(p, updates)

    for tensors, wide in zip(stored, work, strict=True):
        if tensors[0].dtype in HALF:
            for old, new in zip(tensors, wide, strict=True):
                old.copy_(new)
