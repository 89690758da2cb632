"""One call into a C library for a whole parameter group on a CPU: `_cpu.c`, built with the package where it can be."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import accumulate, compress
from operator import is_
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sadam_integrations.backends.for_loop import PIECE, for_loop, pieces
from sadam_integrations.backends.rows import Layouts, Rows, check_memory, dense, rows_of, similar
from sadam_integrations.update import BIAS_CORRECTIONS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCK = 64
"""Elements in a unit of work, as in _cpu.c."""

FACTORS = 11 * 4
"""Bytes of its `Factors`."""

REBUILD = (
    "with GCC or Clang installed, rebuild it: pip install --no-cache-dir --force-reinstall --no-deps sadam-integrations"
    " (or the path you install it from)"
)


class _Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "weight_decay", "gain")] + [
        (name, ctypes.c_int32) for name in ("decoupled", "maximize", "amsgrad", "correction", "bare")
    ]


class _Columns(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int64)] + [
        (name, ctypes.c_void_p)
        for name in (
            "numel", "first_block", "param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "beta",
            "dtype", "factors",
        )
    ]  # fmt: skip


class _Counting(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("param", "grad", "exp_avg_sq", "max_exp_avg_sq")),
        ("numel", ctypes.c_int64),
        ("counts", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("beta2", "weight_decay", "correction")),
        *((name, ctypes.c_int32) for name in ("decoupled", "maximize", "amsgrad", "dtype")),
    ]


class Library(NamedTuple):
    """The C library as it is used on this machine."""

    handle: ctypes.CDLL
    parallel_for: ctypes.c_void_p | None
    sets: dict[str, int]


@functools.cache
def load() -> Library | str:
    """Loads the library once. Returns the reason as text if it cannot be used."""
    files = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name(f"_cpu{suffix}")).exists()]
    if not files:
        return f"the package was built without a C compiler; {REBUILD}"
    try:
        return open_library(files[0])
    except OSError as error:
        return f"{files[0].name} cannot be loaded ({error}); {REBUILD}"


def open_library(path: str | Path) -> Library | str:
    """Loads a build of the C source and asks which of its instruction sets this CPU has.

    Returns:
        The library, or the reason as text if it is not of this source, as in an editable install that was updated.
    """
    handle = ctypes.CDLL(str(path))
    sizes = [*map(ctypes.sizeof, (_Options, _Columns, _Counting)), FACTORS]
    if not hasattr(handle, "sadam_sizes") or [*(ctypes.c_int64 * len(sizes)).in_dll(handle, "sadam_sizes")] != sizes:
        return f"{Path(path).name} was built from another version of the package; {REBUILD}"
    handle.sadam_instruction_set.restype = ctypes.c_char_p
    handle.sadam_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    handle.sadam_count.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    sets, index = {}, 0
    while name := handle.sadam_instruction_set(index):
        if handle.sadam_supports(index):
            sets[name.decode()] = index
        index += 1
    return Library(handle, _parallel_for(), sets)


def _parallel_for() -> ctypes.c_void_p | None:
    """Torch's own thread pool, for any C code since torch 2.10; without it the kernel runs on one thread."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).with_name("lib") / name
        if path.exists() and (function := getattr(ctypes.CDLL(str(path)), "torch_parallel_for", None)):
            return ctypes.cast(function, ctypes.c_void_p)
    return None


_measuring: dict[str, Any] = {"instruction_set": None, "bare": False}


def instruction_set() -> str | None:
    """Which instruction set the kernel runs with: the best that this CPU has. None where there is no kernel."""
    library = load()
    if isinstance(library, str):
        return None
    return _measuring["instruction_set"] or list(library.sets)[-1]


def force(name: str | None) -> None:
    """Makes the kernel run with another instruction set of this CPU, to test or to measure it; None ends that.

    Raises:
        ValueError: If this CPU, or the library, does not have it.
    """
    library = load()
    known = [] if isinstance(library, str) else list(library.sets)
    if name is not None and name not in known:
        raise ValueError(
            f"instruction_set={name!r} is not one of those that can run here: {', '.join(known) or 'none'}"
        )
    _measuring["instruction_set"] = name


@contextmanager
def bare() -> Iterator[None]:
    """Within this, a step of float32 tensors moves the memory of a step and computes nothing of use: to time that."""
    _measuring["bare"] = True
    try:
        yield
    finally:
        _measuring["bare"] = False


class _Table:
    """The tensors of a group that the kernel serves: their addresses, and what these were found to be."""

    def __init__(self, rows: Rows) -> None:
        self.given = rows.stored
        self.served = [_fits(*row) for row in rows.each()]
        columns = [list(compress(column, self.served)) for column in rows.columns]
        self.addresses = rows.addresses(self.served)
        check_memory(*self.addresses)
        self.layouts = Layouts(columns[0])
        n, numels = len(columns[0]), self.layouts.numels
        blocks = accumulate((-(-numel // BLOCK) for numel in numels), initial=0)
        p, m, v, *v_max, step = (array("Q", self.addresses[i * n : (i + 1) * n]) for i in range(len(columns)))
        self.arrays: list[Any] = [
            array("q", numels), array("q", blocks), p, array("Q"), m, v, *(v_max or [array("Q")]), step,
            array("d"), array("B", (DTYPES[dtype] for dtype in self.layouts.dtypes)), array("B", bytes(FACTORS * n)),
        ]  # fmt: skip
        self.columns = _Columns(n, *(a.buffer_info()[0] for a in self.arrays))

    def holds(self, rows: Rows) -> bool:
        """Whether these are the very tensors of the table, where they were, with gradients that fit."""
        return (
            len(rows.stored) == len(self.given)
            and all(map(is_, rows.stored, self.given))
            and all(compress(rows.whole, self.served))
            and rows.addresses(self.served) == self.addresses
            and self.layouts.hold(*rows.chosen(self.served))
            and (all(self.served) or self.served == [_fits(*row) for row in rows.each()])
        )

    def gradients(self, rows: Rows) -> array:
        """Where the gradients lie."""
        return array("Q", map(Tensor.data_ptr, compress(rows.grads, self.served)))


def _fits(whole: bool, grad: Tensor, param: Tensor, *rest: Tensor) -> bool:
    *moments, step = rest
    return whole and _served(param, grad, *moments) and step.is_cpu and step.dtype == torch.float32


def _served(param: Tensor, *others: Tensor) -> bool:
    return _known(param) and dense((param, *others))


def _known(param: Tensor) -> bool:
    return param.is_cpu and param.dtype in DTYPES and param.numel() > 0 and not param.is_inference()


def cpu(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    betas: Sequence[float],
    *,
    memo: dict[str, Any],
    **options,
) -> bool:
    """See :class:`sadam_integrations.backends.Backend`. What the kernel does not serve takes the for-loop, row by row.

    It serves float32, bfloat16 and float16 tensors whose gradient and moments have the parameter's dtype and lie in
    memory as it does, without gaps: contiguous, channels-last, transposed. Large ones that do not are copied in pieces.
    """
    library = load()
    assert isinstance(library, Library), library
    amsgrad = max_exp_avg_sqs[0] is not None
    rows = rows_of(grads, [params, exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if amsgrad else []), steps])  # type: ignore[list-item]
    table: _Table | None = memo.get("cpu")
    grad = table.gradients(rows) if table is not None and table.holds(rows) else None
    if table is None or grad is None or 0 in grad:
        table = memo["cpu"] = _Table(rows)
        grad = table.gradients(rows)
    check_memory(*grad)
    if not all(table.served):
        given = zip(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, betas, strict=True)
        for served, (whole, *local), row in zip(table.served, rows.each(), given, strict=True):
            if not served and not (whole and _in_pieces(*local, beta=row[-1], **options)):
                for_loop(*([cell] for cell in row), **options)  # type: ignore[arg-type]
    if not grad:
        return True
    beta = array("d", compress(betas, table.served))
    table.columns.grad, table.columns.beta = grad.buffer_info()[0], beta.buffer_info()[0]
    settings = _Options(
        *(float(options[name]) for name in ("lr", "beta1", "beta2", "weight_decay", "gain")),
        options["decoupled"], options["maximize"], amsgrad, BIAS_CORRECTIONS.index(options["bias_correction"]),
        _measuring["bare"],
    )  # fmt: skip
    which = library.sets[instruction_set()]  # type: ignore[index]
    library.handle.sadam_step(ctypes.byref(table.columns), ctypes.byref(settings), which, library.parallel_for)
    torch.autograd.graph.increment_version(list(compress(params, table.served)))
    return not all(table.served)


def _in_pieces(grad: Tensor, param: Tensor, *rest: Tensor, beta: float, **options) -> bool:
    """Steps a large tensor that only the order of its parts in memory keeps from the kernel; returns whether it did."""
    *moments, step = rest
    tensors = [param, grad, *moments]
    if not (_known(param) and similar(tensors) and param.numel() > PIECE and step.is_cpu):
        return False
    for p, g, m, v, *v_max in pieces(tensors, changed=[0, *range(2, len(tensors))]):
        cpu([p], [g], [m], [v], v_max or [None], [step.clone()], [beta], memo={}, **options)
    step += 1
    return True


def count(
    grad: Tensor,
    param: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    beta2: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    correction: float,
) -> Tensor | None:
    """The histogram by which beta is measured, see :func:`sadam_integrations.calibration.histogram`.

    Args:
        grad: The gradient of the coming step.
        param: The parameter, same shape.
        exp_avg_sq: Its second moment before the step, same shape.
        max_exp_avg_sq: For SAMSGrad, the largest second moment so far.
        beta2: Decay rate of the second moment.
        weight_decay: Weight decay coefficient.
        decoupled: Whether weight decay leaves the gradient alone.
        maximize: Ascend instead of descend.
        correction: ``1 - beta2**step``, the factor of the gradient's square where a half-precision state underflows.

    Returns:
        int64 of shape (2048,), or ``None`` if the kernel is not there or does not serve these tensors.
    """
    library = load()
    moments = (exp_avg_sq,) if max_exp_avg_sq is None else (exp_avg_sq, max_exp_avg_sq)
    if isinstance(library, str) or not _served(param, grad, *moments):
        return None
    check_memory(*map(Tensor.data_ptr, (param, grad, *moments)))
    counts = torch.zeros(2048, dtype=torch.int64, device="cpu")
    largest = None if max_exp_avg_sq is None else max_exp_avg_sq.data_ptr()
    work = _Counting(
        param.data_ptr(), grad.data_ptr(), exp_avg_sq.data_ptr(), largest, param.numel(), counts.data_ptr(),
        beta2, weight_decay, correction, decoupled, maximize, largest is not None, DTYPES[param.dtype],
    )  # fmt: skip
    which = library.sets[instruction_set()]  # type: ignore[index]
    library.handle.sadam_count(ctypes.byref(work), which, library.parallel_for)
    return counts
