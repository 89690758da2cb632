"""How a step is executed: one function a backend, all with the signature of :class:`Backend`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from sadam_integrations.backends.for_loop import for_loop, pieces
from sadam_integrations.backends.foreach import foreach
from sadam_integrations.update import BiasCorrection

__all__ = ["Backend", "for_loop", "foreach", "pick", "pieces"]


class Backend(Protocol):
    """Updates the tensors of one parameter group in place; see :func:`sadam_integrations.update.update` for the rule.

    Args:
        params: Parameters, none of them sparse; mixed shapes, dtypes and devices.
        grads: Their gradients.
        exp_avgs: Their first moments.
        exp_avg_sqs: Their second moments.
        max_exp_avg_sqs: Their largest second moments, or all ``None`` for Sadam.
        steps: Each parameter's step count, this step included: numbers, or 0-dim tensors under graph capture.
        betas: Each parameter's softplus sharpness; zero keeps the parameter where it is.
    """

    def __call__(  # noqa: D102
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor | None],
        steps: Sequence[float | Tensor],
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
    ) -> None: ...


def pick(params: Sequence[Tensor], group: dict[str, Any]) -> Backend:
    """The backend that a parameter group's flags ask for; where they leave it open, the fastest one there is.

    On a GPU that is foreach, except for DTensors, for which older versions of torch lack one of its operators. On a CPU
    it is the for-loop: foreach makes more passes over memory there and is slower.
    """
    if group["foreach"] is not None:
        return foreach if group["foreach"] else for_loop
    batchable = not group["differentiable"] and (group["capturable"] or not isinstance(group["lr"], Tensor))
    plain = all(p.device.type in ("cuda", "xpu") and not hasattr(p, "to_local") for p in params)
    return foreach if batchable and plain else for_loop


NO_FUSED = (
    "fused=True asks for a fused kernel, and this version has none: leave fused=None, the fastest backend there is, "
    "or set foreach=True"
)
