"""In-place updates of Adam and its relatives, over lists of tensors; `functional` shows them.

Each is the optimizer of `torch.optim` after which it is named, with its default hyper-parameters
and torch's names of its states; `adamw_` documents what all have in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .run import apply

Tensors = Sequence[Tensor]


def _moments(
    exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors | None = None
) -> dict[str, Tensors]:
    """Adam's states, and amsgrad's."""
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    return states if max_exp_avg_sqs is None else states | {"max_exp_avg_sqs": max_exp_avg_sqs}


@torch.no_grad()
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
    maximize: bool = False,
    masters: Tensors | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
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
        TypeError: for another dtype.
        ValueError: for lists, shapes, layouts or devices that do not match, and for a tensor that
            is written and shares memory with another one of the call.

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
    apply(rule, hyper, params, grads, states, steps, masters, grad_scale, maximize, backend)


@torch.no_grad()
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
    maximize: bool = False,
    masters: Tensors | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """One Adam update (Kingma and Ba 2015): here the decay joins the gradient.

    Arguments, effects and errors are those of `adamw_`.
    """
    states = _moments(exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    rule = "adam" if max_exp_avg_sqs is None else "adam_amsgrad"
    hyper = (lr, *betas, eps, weight_decay, 0.0)
    apply(rule, hyper, params, grads, states, steps, masters, grad_scale, maximize, backend)


@torch.no_grad()
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
    maximize: bool = False,
    masters: Tensors | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """One NAdam update (Dozat 2016).

    Args:
        mu_products: fp32 [len(params)], ones before the first update; changed in place.

    The other arguments, effects and errors are those of `adamw_`.
    """
    states = _moments(exp_avgs, exp_avg_sqs)
    hyper = (lr, *betas, eps, weight_decay, float(decoupled_weight_decay), momentum_decay)
    memory = {"mu_products": mu_products}
    apply(
        "nadam", hyper, params, grads, states, steps, masters, grad_scale, maximize, backend, memory
    )


@torch.no_grad()
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
    maximize: bool = False,
    masters: Tensors | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """One RAdam update (Liu et al. 2020).

    Arguments, effects and errors are those of `adamw_`.
    """
    states = _moments(exp_avgs, exp_avg_sqs)
    hyper = (lr, *betas, eps, weight_decay, float(decoupled_weight_decay))
    apply("radam", hyper, params, grads, states, steps, masters, grad_scale, maximize, backend)


@torch.no_grad()
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
    maximize: bool = False,
    masters: Tensors | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """One Adamax update (Kingma and Ba 2015).

    Arguments, effects and errors are those of `adamw_`.
    """
    states = {"exp_avgs": exp_avgs, "exp_infs": exp_infs}
    hyper = (lr, *betas, eps, weight_decay)
    apply("adamax", hyper, params, grads, states, steps, masters, grad_scale, maximize, backend)
