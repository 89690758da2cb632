"""The four optimizers: their arguments, parameter groups, state and checkpoints. The arithmetic is in the backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from sadam_integrations import backends, calibration, checkpoint
from sadam_integrations.arguments import check, explained, in_effect, plain
from sadam_integrations.said import warn
from sadam_integrations.update import BiasCorrection

PUBLISHED: dict[str, Any] = {"lr": 1e-2, "beta": 50.0, "bias_correction": "outer"}
"""The setting of the paper's experiments and of the official code: ``Sadam(params, **PUBLISHED)``."""


class Sadam(Optimizer):
    r"""Adam whose step is capped smoothly: the denominator is ``softplus(sqrt(v))`` instead of ``sqrt(v) + eps``.

    Tong, Liang, Bi, "Calibrating the Adaptive Learning Rate to Improve Convergence of ADAM", arXiv 1908.00700. For the
    gradient :math:`g_t` and :math:`\text{sp}_\beta(x) = \log(1 + e^{\beta x}) / \beta`,

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
        \theta_t = \theta_{t-1} - \frac{\text{lr}}{1 - \beta_1^t}
        \frac{m_t}{\text{sp}_\beta\big(\sqrt{v_t / (1 - \beta_2^t)}\big)}

    The denominator is never below ``ln 2 / beta``, so there is no epsilon. The paper's results are for
    ``Sadam(params, **PUBLISHED)`` on CNNs; the default, ``beta="auto"``, is this package's own and keeps AdamW's
    learning rate.

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Learning rate, at least 0; AdamW's value carries over with ``beta="auto"``. The default is Adam's.
        betas: Decay rates of the means of the gradient and of its square, each in [0, 1). The defaults are Adam's.
        beta: Sharpness of the softplus, a positive number in units of 1/gradient, or "auto" to measure it for each
            parameter tensor so that the floor ``ln 2 / beta`` is a fixed fraction of its own ``sqrt(v)``.
            "auto" makes training independent of the loss's scale; a number does not. The paper uses 50.
        weight_decay: Weight decay coefficient, at least 0, added to the gradient as in Adam (L2).
        bias_correction: Where the bias of the moments is corrected. "inner" is Adam's own place, inside the softplus;
            "outer" is the official code's, a factor on the learning rate; "none" is the paper's pseudo-code.
            "auto" needs "inner".
        maximize: Maximize the objective instead of minimizing it.
        foreach: Use torch's multi-tensor operators. None picks: yes on a GPU, no on a CPU, where they are slower.
        fused: Use one kernel for all tensors of a group: a C library on a CPU, where None takes it too if it is there
            (``sadam env`` says), Triton on a GPU, where None does not yet. What a kernel does not serve (float64,
            complex, strided) takes the for-loop, with the same result.
        capturable: Keep the step count on the parameter's device, so that the step can be captured in a CUDA graph.
        differentiable: Let autograd differentiate through the step; beta is a constant then.

    Raises:
        ValueError: If a value is out of its range, "auto" meets a published form of the bias correction, or params is
            empty.
        TypeError: If a value has the wrong type.
        RuntimeError: If ``fused=True`` and there is no kernel for a parameter's device, or another flag forbids it.

    Example::

        optimizer = Sadam(model.parameters(), lr=1e-3)
        loss_fn(model(input), target).backward()
        optimizer.step()
    """

    _amsgrad = False
    _decoupled = False
    _memos: dict[int, dict[str, Any]]
    """What backends and calibration keep between the steps of each parameter group; it is neither saved nor copied."""

    @explained
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        beta: float | Literal["auto"] = "auto",
        weight_decay: float = 0.0,
        bias_correction: BiasCorrection = "inner",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(params, _defaults(locals()))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters after checking its values; missing ones are the constructor's."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got a {type(param_group).__name__}")
        param_group = plain(param_group)
        check(type(self).__name__, {**self.defaults, **param_group})
        if not hasattr(self, "_memos"):  # the constructor comes here, too
            self._memos = {}
        super().add_param_group(param_group)
        try:
            backends.pick(self.param_groups[-1]["params"], self.param_groups[-1])
        except RuntimeError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: Re-evaluates the model and returns the loss. Called once, first, with gradients enabled.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            RuntimeError: If a gradient is sparse, or the module that a closure brings along is trained and has none of
                the optimizer's parameters; no parameter has been changed then.
            ValueError: If a value in ``param_groups`` has been set to one that is not valid; likewise.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        compiling = torch.compiler.is_compiling()
        checked = [(group, None) for group in self.param_groups] if compiling else self._checked(closure)
        memos = {} if compiling else self._memos
        for i, (group, every) in enumerate(checked):
            with torch.set_grad_enabled(group["differentiable"]):
                self._step_group(group, every, memos.setdefault(i, {}), compiling)
        if not compiling:
            calibration.warn_floor(self)
            if any(memo.pop("settled", False) for memo in memos.values()):
                calibration.log_settled(self)
        return loss

    def _checked(self, closure: Any) -> list[tuple[dict[str, Any], list[Tensor | None] | None]]:
        """Each group as it is in effect, with its gradients, after all that may be wrong with a step was looked at."""
        name = type(self).__name__
        checked: list[tuple[dict[str, Any], list[Tensor | None] | None]] = []
        for given in self.param_groups:
            check(f"{name}.step", group := plain(given))
            every = [p.grad for p in group["params"]]
            if any(map(attrgetter("is_sparse"), [grad for grad in every if grad is not None])):
                raise RuntimeError(f"{name} does not support sparse gradients: use torch.optim.SparseAdam for them")
            if group["fused"]:
                backends.pick(group["params"], group)
            checked.append((in_effect(group), every))
        if not self.state:
            _check_in_use(name, self.param_groups, closure)
        return checked

    def _step_group(
        self, group: dict[str, Any], every: list[Tensor | None] | None, memo: dict[str, Any], compiling: bool
    ) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        max_exp_avg_sqs: list[Tensor | None] = []
        steps: list[Tensor] = []
        betas: list[float] = []
        self._init_group(
            group, every, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, betas, memo, compiling
        )
        if not params:
            return
        lr = group["lr"]
        run = backends.pick(params, group)
        by_torch = run(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            betas,
            lr=lr.reshape(()) if isinstance(lr, Tensor) and lr.dim() else lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            decoupled=self._decoupled,
            bias_correction=group["bias_correction"],
            maximize=group["maximize"],
            gain=calibration.GAIN if group["beta"] == "auto" else 1.0,
            capturable=group["capturable"],
            memo=memo,
        )
        if by_torch and "watch" in memo:
            memo["watch"].renew()

    def _init_group(
        self, group, every, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, betas, memo, compiling
    ) -> None:
        """Fills the lists with each parameter that has a gradient, its state and its beta.

        torch.compile runs a method of this name eagerly while it traces ``step``; ``compiling`` says that it does.
        """
        every = [p.grad for p in group["params"]] if every is None else every
        given = [grad is not None for grad in every]
        params += compress(group["params"], given)
        grads += compress(every, given)
        ordered = len(params) == len(self.state) and all(map(is_, params, self.state))  # spares the lookups
        states = list(self.state.values()) if ordered else [self.state[p] for p in params]
        auto = group["beta"] == "auto"
        keys = ("exp_avg", "exp_avg_sq", "step", *(["max_exp_avg_sq"] if self._amsgrad else []))
        columns = [[state.get(key) for state in states] for key in keys]
        measured = [state.get("beta") for state in states] if auto else []
        if not (
            all(issubclass(kind, Tensor) for kind in {*map(type, chain(*columns))})
            and {*map(type, measured)} <= {float}
        ):
            for p, state in zip(params, states, strict=True):
                self._complete(p, state, group)
            columns = [[state[key] for state in states] for key in keys]
        exp_avgs += columns[0]
        exp_avg_sqs += columns[1]
        steps += columns[2]
        max_exp_avg_sqs += columns[3] if self._amsgrad else [None] * len(states)
        if auto and params:
            with torch.no_grad():
                calibration.calibrate(self, group, params, states, columns[1:], memo, compiling)
        betas += [state["beta"] for state in states] if auto else [group["beta"]] * len(states)

    def _complete(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Makes what a parameter's state lacks; a number that others have put in a tensor's place stays its value."""
        fresh = "step" not in state
        if not isinstance(state.get("step"), Tensor):
            device = p.device if group["capturable"] or group["fused"] else "cpu"
            state["step"] = torch.tensor(float(state.get("step", 0.0)), dtype=torch.float32, device=device)
        for moment in ("exp_avg", "exp_avg_sq"):
            if fresh or moment not in state:
                state[moment] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if self._amsgrad and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
        if group["beta"] == "auto":
            state["beta"] = float(state.get("beta", 0.0))

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as torch's optimizers do; a beta that was measured is in it as a 0-dim float64 tensor.

        Engines such as FSDP1 take only tensors along. In ``optimizer.state`` it is a Python float.
        """
        hook = self.register_state_dict_post_hook(checkpoint.make_portable, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a saved state, also one of ``torch.optim.Adam`` or ``AdamW``: their moments and steps are kept.

        The flags ``foreach``, ``fused``, ``capturable`` and ``differentiable`` keep the values given to the
        constructor. Everything else is the checkpoint's; a ``beta`` or ``bias_correction`` that differs from the
        one asked for is named in a warning. What the checkpoint lacks is filled in from the constructor's values, and
        what others have put into it comes back as it was saved.

        Args:
            state_dict: What ``state_dict()`` returned, or what load hooks turn into that.

        Raises:
            ValueError: If the checkpoint does not fit; nothing has been changed then.
            TypeError: If a value in it has the wrong type; likewise.
        """
        if not isinstance(state_dict, Mapping):
            checkpoint.check_form(f"{type(self).__name__}.load_state_dict", state_dict)
        hook = self.register_load_state_dict_pre_hook(checkpoint.adopt)  # the last one
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Completes what an older version, an Adam checkpoint or a pickle may lack; refuses moments that do not fit."""
        checkpoint.check_shapes(type(self).__name__, state["param_groups"], state["state"])
        super().__setstate__(state)
        self._memos = {}
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            on_device = group["capturable"] or group["fused"]
            for p in group["params"]:
                if "step" in (saved := self.state.get(p, {})):
                    device = p.device if on_device else "cpu"
                    saved["step"] = torch.as_tensor(saved["step"], dtype=torch.float32, device=device).squeeze()


class SAMSGrad(Sadam):
    r"""Sadam with the largest second moment so far: AMSGrad with the softplus denominator.

    The same as :class:`Sadam` with :math:`v_t` in the denominator replaced by :math:`\max(v_1, \dots, v_t)`, as in
    Algorithm 2 of arXiv 1908.00700. The maximum is of the raw second moment and is corrected afterwards.

    Args:
        params: Parameters, named parameters or parameter groups to optimize.

    The other arguments, and the errors, are those of :class:`Sadam`.
    """

    _amsgrad = True

    @explained
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        beta: float | Literal["auto"] = "auto",
        weight_decay: float = 0.0,
        bias_correction: BiasCorrection = "inner",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        Optimizer.__init__(self, params, _defaults(locals()))


class SadamW(Sadam):
    r"""Sadam with decoupled weight decay, as AdamW is to Adam.

    The same as :class:`Sadam` except that weight decay does not pass through the moments (Loshchilov, Hutter,
    arXiv 1711.05101): the parameter shrinks by ``1 - lr * weight_decay`` before each step.

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        weight_decay: Weight decay coefficient, at least 0: the parameter shrinks by ``1 - lr * weight_decay`` each
            step. The default is AdamW's.

    The other arguments, and the errors, are those of :class:`Sadam`.
    """

    _decoupled = True

    @explained
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        beta: float | Literal["auto"] = "auto",
        weight_decay: float = 1e-2,
        bias_correction: BiasCorrection = "inner",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        Optimizer.__init__(self, params, _defaults(locals()))


class SAMSGradW(Sadam):
    r"""SAMSGrad with decoupled weight decay, as AdamW is to Adam.

    The same as :class:`SAMSGrad` except that weight decay does not pass through the moments (Loshchilov, Hutter,
    arXiv 1711.05101): the parameter shrinks by ``1 - lr * weight_decay`` before each step.

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        weight_decay: Weight decay coefficient, at least 0: the parameter shrinks by ``1 - lr * weight_decay`` each
            step. The default is AdamW's.

    The other arguments, and the errors, are those of :class:`Sadam`.
    """

    _amsgrad = True
    _decoupled = True

    @explained
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        beta: float | Literal["auto"] = "auto",
        weight_decay: float = 1e-2,
        bias_correction: BiasCorrection = "inner",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        Optimizer.__init__(self, params, _defaults(locals()))


def _defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    defaults = plain({k: v for k, v in arguments.items() if k not in ("self", "params", "__class__")})
    check(type(arguments["self"]).__name__, defaults)
    return defaults


def _check_in_use(name: str, groups: list[dict[str, Any]], closure: Any) -> None:
    """Warns of a first step without any gradient; an error if the closure's module has none of the parameters.

    Lightning's closure is a ``functools.partial`` with the module among its arguments.
    """
    mine = {p for group in groups for p in group["params"] if p.requires_grad}
    if not mine or any(p.grad is not None for p in mine):
        return
    fix = "Build it afterwards: in Lightning, in configure_optimizers, and not by --optimizer (see docs/lightning.md)."
    for module in (arg for arg in getattr(closure, "args", ()) if isinstance(arg, torch.nn.Module)):
        if mine.isdisjoint(module.parameters()) and any(p.grad is not None for p in module.parameters()):
            raise RuntimeError(
                f"{name} has none of the parameters that {type(module).__name__} is trained with: it was built before "
                f"the model was sharded or its parameters were replaced. {fix}"
            )
    warn(
        f"{name}: nothing was updated, because no parameter has a gradient. If this goes on, the optimizer has "
        f"parameters that the model no longer uses: it was built before the model was sharded, wrapped or moved. {fix}"
    )
