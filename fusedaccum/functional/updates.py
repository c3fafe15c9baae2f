"""In-place updates of the optimizers that are no relatives of Adam; `functional` shows them.

Each is the optimizer of `torch.optim` after which it is named (`lion_` that of lion-pytorch), with
its default hyper-parameters and torch's names of its states; `adamw_` documents what all have in
common.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .run import apply

Tensors = Sequence[Tensor]


def _needed(momentum: float, momentum_buffers: Tensors | None) -> Tensors:
    if momentum_buffers is None:
        raise ValueError(f"momentum={momentum} needs momentum_buffers, got None")
    return momentum_buffers


@torch.no_grad()
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
    maximize: bool = False,
    masters: Tensors | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """One Adagrad update (Duchi et al. 2011).

    Args:
        state_sums: fp32 states, torch's `initial_accumulator_value` before the first update.

    The other arguments, effects and errors are those of `adamw_`.
    """
    states = {"state_sums": state_sums}
    hyper = (lr, lr_decay, eps, weight_decay)
    apply("adagrad", hyper, params, grads, states, steps, masters, grad_scale, maximize, backend)


@torch.no_grad()
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
    maximize: bool = False,
    masters: Tensors | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
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
    apply(rule, hyper, params, grads, states, steps, masters, grad_scale, maximize, backend)


@torch.no_grad()
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
    maximize: bool = False,
    masters: Tensors | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """One Adadelta update (Zeiler 2012).

    Arguments, effects and errors are those of `adamw_`.
    """
    states = {"square_avgs": square_avgs, "acc_deltas": acc_deltas}
    hyper = (lr, rho, eps, weight_decay)
    apply("adadelta", hyper, params, grads, states, steps, masters, grad_scale, maximize, backend)


@torch.no_grad()
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
    maximize: bool = False,
    masters: Tensors | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
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
    apply(
        "asgd", hyper, params, grads, states, steps, masters, grad_scale, maximize, backend, memory
    )


@torch.no_grad()
def rprop_(
    params: Tensors,
    grads: Tensors,
    prevs: Tensors,
    step_sizes: Tensors,
    steps: Tensor,
    *,
    etas: tuple[float, float] = (0.5, 1.2),
    step_size_limits: tuple[float, float] = (1e-6, 50.0),
    maximize: bool = False,
    masters: Tensors | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
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
    apply("rprop", hyper, params, grads, states, steps, masters, grad_scale, maximize, backend)


@torch.no_grad()
def lion_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
    masters: Tensors | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """One Lion update (Chen et al. 2023), as lion-pytorch makes it.

    Arguments, effects and errors are those of `adamw_`.
    """
    hyper = (lr, *betas, weight_decay)
    states = {"exp_avgs": exp_avgs}
    apply("lion", hyper, params, grads, states, steps, masters, grad_scale, maximize, backend)


@torch.no_grad()
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
    maximize: bool = False,
    masters: Tensors | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
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
    apply(rule, hyper, params, grads, states, steps, masters, grad_scale, maximize, backend)
