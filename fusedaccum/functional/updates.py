"""In-place updates over lists of tensors; `functional` shows them.

Each is the optimizer of `torch.optim` after which it is named (`lion_` that of lion-pytorch), with
its default hyper-parameters and torch's names of its states; `adamw_` documents what all have in
common.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..backends.untraced import untraced
from .numbers import check_ranges
from .run import Common, Operands, Tensors, apply

P = ParamSpec("P")
SHARED = [inspect.signature(apply).parameters[name] for name in Common.__annotations__]


def _update(function: Callable[P, None]) -> Callable[P, None]:
    """Run a function without autograd; its signature names the keywords that all updates share."""
    own = inspect.signature(function)
    parameters = [*own.parameters.values()][:-1] + SHARED
    known = {parameter.name for parameter in parameters}

    @untraced
    @functools.wraps(function)
    def update(*args: P.args, **kwargs: P.kwargs) -> None:
        for name in kwargs.keys() - known:
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
        check_ranges(function.__name__, kwargs)
        with torch.no_grad():
            function(*args, **kwargs)

    update.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return update


def _moments(
    exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors | None = None
) -> dict[str, Tensors]:
    """Adam's states, and amsgrad's."""
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    return states if max_exp_avg_sqs is None else states | {"max_exp_avg_sqs": max_exp_avg_sqs}


@_update
def adamw_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    max_exp_avg_sqs: Tensors | None = None,
    **common: Unpack[Common],
) -> None:
    """One AdamW update (Loshchilov and Hutter 2019), as `torch.optim.AdamW` makes it.

    Args:
        params: bf16, fp16 or fp32, dense; changed in place.
        grads: fp32 accumulators of the same shapes; only read, `grad_scale` times them is used. One
            in another layout than its parameter is copied first.
        exp_avgs, exp_avg_sqs: fp32 states, zeros before the first update; changed in place.
        steps: fp32 [len(params)], updates so far; advanced in place.
        lr, betas, eps, weight_decay, maximize: as in torch. `lr` may be a 0-d device tensor.
        max_exp_avg_sqs: fp32 states of amsgrad, or None for none.
        masters: for each parameter its int16 remainder (bf16: the parameter is the high half of
            an fp32 number) or its fp32 master; None: the parameters are all there is.
        grad_scale: normalisation, unscale or clip factor, applied in registers.
        backend: None (automatic), "triton" or "torch".

    Raises:
        TypeError: for another dtype, and for what is no number.
        ValueError: for lists, shapes, layouts or devices that do not match, for a tensor that is
            written and shares memory with another one of the call, and for hyper-parameters that
            torch's class refuses.

    Example:
        >>> p, g = [torch.ones(2)], [torch.ones(2)]
        >>> m, v, steps = [torch.zeros(2)], [torch.zeros(2)], torch.zeros(1)
        >>> adamw_(p, g, m, v, steps, lr=0.1, weight_decay=0.0)
        >>> p
        [tensor([0.9000, 0.9000])]
    """
    states = _moments(exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    rule = "adam" if max_exp_avg_sqs is None else "adam_amsgrad"
    hyper = (lr, *betas, eps, weight_decay, 1.0)
    apply(rule, hyper, Operands(params, grads, states, steps), **common)


@_update
def adam_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_exp_avg_sqs: Tensors | None = None,
    **common: Unpack[Common],
) -> None:
    """One Adam update (Kingma and Ba 2015): here the decay joins the gradient.

    Arguments, effects and errors are those of `adamw_`.
    """
    states = _moments(exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    rule = "adam" if max_exp_avg_sqs is None else "adam_amsgrad"
    hyper = (lr, *betas, eps, weight_decay, 0.0)
    apply(rule, hyper, Operands(params, grads, states, steps), **common)


@_update
def nadam_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    mu_products: Tensor,
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    **common: Unpack[Common],
) -> None:
    """One NAdam update (Dozat 2016).

    Args:
        mu_products: fp32 [len(params)], ones before the first update; changed in place.

    The other arguments, effects and errors are those of `adamw_`.
    """
    states = _moments(exp_avgs, exp_avg_sqs)
    hyper = (lr, *betas, eps, weight_decay, float(decoupled_weight_decay), momentum_decay)
    memory = {"mu_products": mu_products}
    apply("nadam", hyper, Operands(params, grads, states, steps, memory), **common)


@_update
def radam_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    **common: Unpack[Common],
) -> None:
    """One RAdam update (Liu et al. 2020).

    Arguments, effects and errors are those of `adamw_`.
    """
    states = _moments(exp_avgs, exp_avg_sqs)
    hyper = (lr, *betas, eps, weight_decay, float(decoupled_weight_decay))
    apply("radam", hyper, Operands(params, grads, states, steps), **common)


@_update
def adamax_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_infs: Tensors,
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    **common: Unpack[Common],
) -> None:
    """One Adamax update (Kingma and Ba 2015).

    Arguments, effects and errors are those of `adamw_`.
    """
    states = {"exp_avgs": exp_avgs, "exp_infs": exp_infs}
    hyper = (lr, *betas, eps, weight_decay)
    apply("adamax", hyper, Operands(params, grads, states, steps), **common)


def _needed(momentum: float, momentum_buffers: Tensors | None) -> Tensors:
    if momentum_buffers is None:
        raise ValueError(f"momentum={momentum} needs momentum_buffers, got None")
    return momentum_buffers


@_update
def adagrad_(
    params: Tensors,
    grads: Tensors,
    state_sums: Tensors,
    steps: Tensor,
    *,
    lr: float | Tensor,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    **common: Unpack[Common],
) -> None:
    """One Adagrad update (Duchi et al. 2011).

    Args:
        state_sums: fp32 states, torch's `initial_accumulator_value` before the first update.

    The other arguments, effects and errors are those of `adamw_`.
    """
    states = {"state_sums": state_sums}
    hyper = (lr, lr_decay, eps, weight_decay)
    apply("adagrad", hyper, Operands(params, grads, states, steps), **common)


@_update
def rmsprop_(
    params: Tensors,
    grads: Tensors,
    square_avgs: Tensors,
    steps: Tensor,
    *,
    lr: float | Tensor,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    momentum_buffers: Tensors | None = None,
    grad_avgs: Tensors | None = None,
    **common: Unpack[Common],
) -> None:
    """One RMSprop update (Hinton 2012), centered (Graves 2013) where there are `grad_avgs`.

    Args:
        momentum_buffers: fp32 states, needed with `momentum`.
        grad_avgs: fp32 states of centered=True, or None.

    The other arguments, effects and errors are those of `adamw_`.
    """
    states, rule = {"square_avgs": square_avgs}, "rmsprop"
    if grad_avgs is not None:
        states["grad_avgs"], rule = grad_avgs, "rmsprop_centered"
    if momentum:
        states["momentum_buffers"] = _needed(momentum, momentum_buffers)
        rule += "_momentum"
    hyper = (lr, alpha, eps, weight_decay, momentum)
    apply(rule, hyper, Operands(params, grads, states, steps), **common)


@_update
def adadelta_(
    params: Tensors,
    grads: Tensors,
    square_avgs: Tensors,
    acc_deltas: Tensors,
    steps: Tensor,
    *,
    lr: float | Tensor,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    **common: Unpack[Common],
) -> None:
    """One Adadelta update (Zeiler 2012).

    Arguments, effects and errors are those of `adamw_`.
    """
    states = {"square_avgs": square_avgs, "acc_deltas": acc_deltas}
    hyper = (lr, rho, eps, weight_decay)
    apply("adadelta", hyper, Operands(params, grads, states, steps), **common)


@_update
def asgd_(
    params: Tensors,
    grads: Tensors,
    axs: Tensors,
    etas_mus: Tensor,
    steps: Tensor,
    *,
    lr: float | Tensor,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
    **common: Unpack[Common],
) -> None:
    """One ASGD update (Polyak and Juditsky 1992).

    Args:
        axs: fp32 averages of the parameters.
        etas_mus: fp32 [len(params), 2], eta and mu of the coming update: `lr` and 1 before the
            first; changed in place.

    The other arguments, effects and errors are those of `adamw_`.
    """
    states, memory = {"axs": axs}, {"etas_mus": etas_mus}
    hyper = (lr, lambd, alpha, t0, weight_decay)
    apply("asgd", hyper, Operands(params, grads, states, steps, memory), **common)


@_update
def rprop_(
    params: Tensors,
    grads: Tensors,
    prevs: Tensors,
    step_sizes: Tensors,
    steps: Tensor,
    *,
    etas: tuple[float, float] = (0.5, 1.2),
    step_size_limits: tuple[float, float] = (1e-6, 50.0),
    **common: Unpack[Common],
) -> None:
    """One Rprop update (Riedmiller and Braun 1993).

    Args:
        prevs: fp32 states, zeros before the first update.
        step_sizes: fp32 states, all `lr` before the first update.
        etas: factors where the sign of a gradient changed, and where it did not.
        step_size_limits: least and largest step size; torch's class calls them `step_sizes`.

    The other arguments, effects and errors are those of `adamw_`.
    """
    states = {"prevs": prevs, "step_sizes": step_sizes}
    hyper = (0.0, *etas, *step_size_limits)
    apply("rprop", hyper, Operands(params, grads, states, steps), **common)


@_update
def lion_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    **common: Unpack[Common],
) -> None:
    """One Lion update (Chen et al. 2023), as lion-pytorch makes it.

    Arguments, effects and errors are those of `adamw_`.
    """
    hyper = (lr, *betas, weight_decay)
    states = {"exp_avgs": exp_avgs}
    apply("lion", hyper, Operands(params, grads, states, steps), **common)


@_update
def sgd_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors | None,
    steps: Tensor,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    **common: Unpack[Common],
) -> None:
    """One SGD update.

    Args:
        momentum_buffers: fp32 states, needed with `momentum`; the first update (steps 0) copies
            the gradient into them.

    The other arguments, effects and errors are those of `adamw_`.
    """
    states, rule = {}, "sgd"
    if momentum:
        states["momentum_buffers"] = _needed(momentum, momentum_buffers)
        rule = "sgd_nesterov" if nesterov else "sgd_momentum"
    hyper = (lr, momentum, dampening, weight_decay)
    apply(rule, hyper, Operands(params, grads, states, steps), **common)
