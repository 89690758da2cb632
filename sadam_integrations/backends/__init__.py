"""How a step is executed: one function a backend, all with the signature of :class:`Backend`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sadam_integrations.backends import cpu, triton
from sadam_integrations.backends.for_loop import for_loop, pieces
from sadam_integrations.backends.foreach import foreach
from sadam_integrations.update import BiasCorrection

__all__ = ["Backend", "cpu", "for_loop", "foreach", "missing", "pick", "pieces", "triton"]


class Backend(Protocol):
    """Updates the tensors of one parameter group in place; see :func:`sadam_integrations.update.update` for the rule.

    Args:
        params: Parameters, none of them sparse; mixed shapes, dtypes and devices.
        grads: Their gradients.
        exp_avgs: Their first moments.
        exp_avg_sqs: Their second moments.
        max_exp_avg_sqs: Their largest second moments, or all ``None`` for Sadam.
        steps: Each parameter's step count before this step, 0-dim float32; the backend counts it up.
        betas: Each parameter's softplus sharpness; zero keeps the parameter where it is.
        capturable: Nothing may be read from the device.
        memo: What the backend keeps for this group from step to step. It may hold the optimizer's own tensors: it is
            forgotten with the optimizer, and when a state is loaded.

    Returns:
        Whether torch's operators wrote to the state, which autograd counts as changes in place.
    """

    def __call__(  # noqa: D102
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor | None],
        steps: Sequence[Tensor],
        betas: Sequence[float],
        *,
        lr: float | Tensor,
        beta1: float,
        beta2: float,
        weight_decay: float,
        decoupled: bool,
        bias_correction: BiasCorrection,
        maximize: bool,
        gain: float,
        capturable: bool,
        memo: dict[str, Any],
    ) -> bool: ...


def pick(params: Sequence[Tensor], group: dict[str, Any]) -> Backend:
    """The backend that a parameter group's flags ask for; where they leave it open, the fastest one there is.

    On a CPU that is the kernel, or else the for-loop: foreach makes more passes over memory there and is slower. On a
    GPU it is foreach, except for DTensors, for which older versions of torch lack one of its operators; the Triton
    kernel has not been run on a GPU yet and only ``fused=True`` takes it. What torch.compile or autograd has to trace
    is never a kernel.

    Raises:
        RuntimeError: If ``fused=True`` and there is no kernel for a parameter's device.
    """
    traced = group["differentiable"] or torch.compiler.is_compiling()
    if group["fused"] and not traced:
        devices = {p.device.type for p in params}
        for device in sorted(devices):
            if reason := missing(device):
                raise RuntimeError(
                    f"fused=True: a parameter is on {device}, and {reason}. fused=None takes what there is"
                )
        return triton.triton if "cuda" in devices else cpu.cpu
    if group["foreach"] is not None:
        return foreach if group["foreach"] else for_loop
    if group["fused"] is None and not traced and params and params[0].is_cpu and not missing("cpu"):
        return cpu.cpu
    batchable = not group["differentiable"] and (group["capturable"] or not isinstance(group["lr"], Tensor))
    plain = all(p.device.type in ("cuda", "xpu") and not hasattr(p, "to_local") for p in params)
    return foreach if batchable and plain else for_loop


def missing(device: str) -> str | None:
    """Why there is no kernel for a type of device, or None if there is one."""
    if device == "cpu":
        library = cpu.load()
        return library if isinstance(library, str) else None
    return triton.unavailable() if device == "cuda" else f"there is no kernel for {device}"
