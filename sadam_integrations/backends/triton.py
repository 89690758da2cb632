"""One Triton launch for all tensors of a device and dtype on a GPU. Triton itself is imported at the first step."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from itertools import chain, compress
from operator import is_
from typing import Any

import torch
from torch import Tensor

from sadam_integrations.backends.for_loop import for_loop
from sadam_integrations.backends.rows import PLAIN, Layouts, Rows, check_memory, dense, rows_of
from sadam_integrations.update import BiasCorrection, corrections

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
BLOCK = 1024
"""Elements that one program of the launch updates: a chunk."""

constexpr = Any  # from the first step on triton.language's: the kernel's own names are looked up here
tl: Any = None  # likewise triton.language itself


def unavailable() -> str | None:
    """Why the kernel cannot run here, or None if it can: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if not torch.cuda.is_available() and not _interpreted():
        return "torch sees no GPU"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    betas: Sequence[float],
    *,
    capturable: bool,
    memo: dict[str, Any],
    **options,
) -> bool:
    """See :class:`sadam_integrations.backends.Backend`. What the kernel does not serve takes the for-loop, row by row.

    It serves contiguous float32, bfloat16 and float16 tensors whose gradient and moments have the parameter's dtype.
    A CUDA graph holds the addresses that the gradients had when it was captured, as torch's own optimizers do. Where no
    ordinary step came before the capture, the graph holds the for-loop.
    """
    given = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, betas)
    amsgrad = max_exp_avg_sqs[0] is not None
    rows = rows_of(grads, [params, exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if amsgrad else []), steps])  # type: ignore[list-item]
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    table: _Table | None = memo.get("triton")
    if table is not None and not table.holds(rows):
        table = None
    if capturing:
        if table is None or not table.can_be_captured(betas):
            return for_loop(*given, capturable=capturable, **options)
        memo.setdefault("triton in graphs", []).append(table)
    elif table is None:
        table = memo["triton"] = _Table(rows)
    others = [kind is None for kind in table.kinds]
    if any(others):
        for_loop(*(list(compress(column, others)) for column in given), capturable=capturable, **options)  # type: ignore[arg-type]
    for launch in table.launches:
        launch(rows.grads, steps, betas, capturing, **options)
    torch.autograd.graph.increment_version(list(compress(params, table.served)))
    return True


class _Table:
    """The tensors of a group: how each is served, and what they were found to be."""

    def __init__(self, rows: Rows) -> None:
        self.given = rows.stored
        self.kinds = [_kind(*row) for row in rows.each()]
        self.served = [kind is not None for kind in self.kinds]
        kinds = dict.fromkeys(kind for kind in self.kinds if kind is not None)
        self.launches = [_Launch(rows, [k == kind for k in self.kinds]) for kind in kinds]
        self.addresses = rows.addresses(self.served)
        check_memory(*self.addresses)
        self.layouts = Layouts(list(compress(rows.columns[0], self.served)))

    def holds(self, rows: Rows) -> bool:
        """Whether these are the very tensors of the table, where they were, with gradients as they were."""
        grads, params = rows.chosen(self.served)
        return (
            len(rows.stored) == len(self.given)
            and all(map(is_, rows.stored, self.given))
            and all(compress(rows.whole, self.served))
            and rows.addresses(self.served) == self.addresses
            and {*map(type, grads)} <= PLAIN
            and self.layouts.hold(grads, params)
            and (all(self.served) or self.kinds == [_kind(*row) for row in rows.each()])
        )

    def can_be_captured(self, betas: Sequence[float]) -> bool:
        """Whether nothing has to be allocated on the host, which a CUDA graph forbids."""
        return all(it.spare is not None and it.betas == list(compress(betas, it.chosen)) for it in self.launches)


def _kind(whole: bool, grad: Tensor, param: Tensor, *rest: Tensor) -> tuple[Any, ...] | None:
    """What must be the same for the tensors of one launch; None for those that the kernel does not serve."""
    *moments, step = rest
    known = param.dtype in DTYPES and param.numel() > 0 and (param.is_cpu if _interpreted() else param.is_cuda)
    if whole and known and dense((param, grad, *moments)):
        return param.device, param.dtype, step.device
    return None


class _Launch:
    """The tensors of one device and dtype, as the kernel reads them.

    Attributes:
        table: On the device, a row each: element counts, addresses of the parameters and of their moments.
        chunks: On the device: of each chunk its tensor, and which of that tensor's chunks it is.
    """

    def __init__(self, rows: Rows, chosen: list[bool]) -> None:
        self.chosen = chosen
        self.params, *moments, _ = ([*compress(column, chosen)] for column in rows.columns)
        self.device, self.dtype = self.params[0].device, self.params[0].dtype
        self.amsgrad = len(moments) == 3
        addresses = [list(map(Tensor.data_ptr, column)) for column in (self.params, *moments)]
        sizes = torch.tensor([p.numel() for p in self.params])
        counts = (sizes + BLOCK - 1) // BLOCK
        owners = torch.repeat_interleave(counts)
        within = torch.arange(len(owners)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        self.aligned = _aligned(chain(*addresses))
        self.table = _upload(torch.cat([sizes[None], torch.tensor(addresses)]), self.device)
        self.chunks = _upload(torch.stack([owners, within]).int(), self.device)
        self.addresses: list[int] = []
        self.betas: list[float] = []
        self.gradients = self.sharpness = self.table
        self.spare: Tensor | None = None
        self.in_graphs: list[Any] = []

    def __call__(
        self, grads, steps, betas, capturing, *, beta1, beta2, weight_decay, decoupled, maximize, **options
    ) -> None:
        addresses = list(map(Tensor.data_ptr, compress(grads, self.chosen)))
        check_memory(*addresses)
        steps = list(compress(steps, self.chosen))
        if steps[0].is_cpu:
            torch._foreach_add_(steps, torch.ones((), device="cpu"), alpha=1)  # four times as fast as adding a number
        else:
            torch._foreach_add_(steps, 1)
        gradients = self._find(addresses, capturing)
        decay = weight_decay if decoupled else 0.0
        factors = self._factors(steps, list(compress(betas, self.chosen)), beta1, beta2, decay=decay, **options)
        coupled = weight_decay != 0 and not decoupled
        numbers = (beta1, 1 - beta1, beta2, 1 - beta2, weight_decay)
        with torch.cuda.device_of(self.params[0]):
            _kernel()[(self.chunks.shape[1],)](
                self.table, gradients, self.chunks, factors, len(steps), *map(float, numbers),
                DTYPE=getattr(tl, DTYPES[self.dtype]), BLOCK=BLOCK, AMSGRAD=self.amsgrad, MAXIMIZE=maximize,
                COUPLED=coupled, ALIGNED=self.aligned and _aligned(addresses), enable_fp_fusion=True,
            )  # fmt: skip

    def _find(self, addresses: list[int], capturing: bool) -> Tensor:
        """The gradients' addresses on the device; a new tensor for new ones, as an earlier step may still read the old.

        A CUDA graph copies them from host memory at each replay. That memory has to be there when it is captured, and
        stays what it is.
        """
        if capturing:
            if addresses == self.addresses:
                gradients = self.gradients
            else:
                assert self.spare is not None
                gradients = self.spare.copy_(torch.tensor(addresses)).to(self.device, non_blocking=True)
            self.in_graphs.append((gradients, self.spare, self.sharpness))
            self.spare = None
            return gradients
        if self.spare is None:
            pinned = self.device.type == "cuda"
            self.spare = torch.empty(len(addresses), dtype=torch.int64, device="cpu", pin_memory=pinned)
        if addresses != self.addresses:
            self.gradients, self.addresses = _upload(torch.tensor(addresses), self.device), addresses
        return self.gradients

    def _factors(
        self, steps: list[Tensor], betas: list[float], beta1: float, beta2: float,
        *, decay: float, lr: float | Tensor, bias_correction: BiasCorrection, gain: float,
    ) -> Tensor:  # fmt: skip
        """What the kernel multiplies by, in float64 where the steps are counted: a row each, a column a parameter.

        With ``s = beta * for_root``: ``s * log2(e)``, ``1 / s``, the rate and the shrinking of decoupled weight decay.
        """
        counts = torch.stack(steps)
        if isinstance(lr, Tensor) and not lr.is_cpu:
            counts, lr = _upload(counts, self.device), lr.to(self.device)
        if betas != self.betas or self.sharpness.device != counts.device:
            sharpness = torch.tensor([[beta or 1.0 for beta in betas], [beta != 0 for beta in betas]]).double()
            self.sharpness, self.betas = _upload(sharpness, counts.device), betas
        sharp, moves = self.sharpness
        for_lr, for_root = corrections(counts, beta1, beta2, bias_correction)
        s = sharp * for_root
        rate = moves * (gain * lr * for_lr / for_root)
        shrink = torch.ones_like(s) * (1 - lr * decay)
        return _upload(torch.stack([(s / math.log(2)).clamp(max=3e38), 1 / s, rate, shrink]).float(), self.device)


def _aligned(addresses) -> bool:
    return not any(address % 16 for address in addresses)


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """Moves values without waiting for the device: from page-locked memory, which torch keeps until they are there."""
    if values.device == device:
        return values
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language

    update = triton.jit(getattr(_update, "fn", _update))
    globals().update(tl=triton.language, constexpr=triton.language.constexpr, _update=update)
    return triton.jit(_program, do_not_specialize=["n"])


def _program(
    table, gradients, chunks, factors, n, beta1, rest1, beta2, rest2, weight_decay,
    DTYPE: constexpr, BLOCK: constexpr, AMSGRAD: constexpr, MAXIMIZE: constexpr, COUPLED: constexpr, ALIGNED: constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    owner = tl.load(chunks + chunk)
    start = tl.load(chunks + tl.num_programs(0) + chunk).to(tl.int64) * BLOCK
    remaining = tl.load(table + owner) - start
    p = tl.load(table + n + owner).to(tl.pointer_type(DTYPE))
    m = tl.load(table + 2 * n + owner).to(tl.pointer_type(DTYPE))
    v = tl.load(table + 3 * n + owner).to(tl.pointer_type(DTYPE))
    top = tl.load(table + (4 if AMSGRAD else 3) * n + owner).to(tl.pointer_type(DTYPE))
    g = tl.load(gradients + owner).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
        m = tl.multiple_of(m, 16)
        v = tl.multiple_of(v, 16)
        top = tl.multiple_of(top, 16)
        g = tl.multiple_of(g, 16)
    x = tl.load(factors + owner)
    c = tl.load(factors + n + owner)
    rate = tl.load(factors + 2 * n + owner)
    shrink = tl.load(factors + 3 * n + owner)
    p, g, m, v, top = p + start, g + start, m + start, v + start, top + start
    if remaining >= BLOCK:  # without a mask loads and stores are of 16 bytes
        _update(
            p, g, m, v, top, remaining, x, c, rate, shrink, beta1, rest1, beta2, rest2, weight_decay,
            BLOCK, AMSGRAD, MAXIMIZE, COUPLED, False,
        )  # fmt: skip
    else:
        _update(
            p, g, m, v, top, remaining, x, c, rate, shrink, beta1, rest1, beta2, rest2, weight_decay,
            BLOCK, AMSGRAD, MAXIMIZE, COUPLED, True,
        )  # fmt: skip


def _update(
    p_at, g_at, m_at, v_at, top_at, remaining, x, c, rate, shrink, beta1, rest1, beta2, rest2, weight_decay,
    BLOCK: constexpr, AMSGRAD: constexpr, MAXIMIZE: constexpr, COUPLED: constexpr, MASKED: constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    mask = lanes < remaining if MASKED else None
    p = tl.load(p_at + lanes, mask).to(tl.float32)
    g = tl.load(g_at + lanes, mask).to(tl.float32)
    m = tl.load(m_at + lanes, mask).to(tl.float32)
    v = tl.load(v_at + lanes, mask).to(tl.float32)
    if MAXIMIZE:
        g = -g
    if COUPLED:
        g += weight_decay * p
    m = beta1 * m + rest1 * g
    v = beta2 * v + (rest2 * g) * g
    tl.store(m_at + lanes, m.to(m_at.dtype.element_ty), mask)
    tl.store(v_at + lanes, v.to(v_at.dtype.element_ty), mask)
    if AMSGRAD:
        v = tl.maximum(tl.load(top_at + lanes, mask).to(tl.float32), v, propagate_nan=tl.PropagateNan.ALL)
        tl.store(top_at + lanes, v.to(top_at.dtype.element_ty), mask)
    r = tl.sqrt_rn(v)
    e = tl.exp2(-(x * r))
    log1p = 5.232691437e-3 * e - 2.950522745e-2  # log1p(e) / e on [0, 1], relative error 3e-8
    log1p = log1p * e + 7.822593343e-2
    log1p = log1p * e - 1.366324423e-1
    log1p = log1p * e + 1.910600602e-1
    log1p = log1p * e - 2.484298303e-1
    log1p = log1p * e + 3.331909678e-1
    log1p = log1p * e - 4.999949314e-1
    log1p = log1p * e + 9.999999699e-1
    step = rate * tl.div_rn(m, r + c * (log1p * e))
    tl.store(p_at + lanes, (p * shrink - step).to(p_at.dtype.element_ty), mask)
