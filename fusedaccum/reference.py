"""What every operation means, in plain torch: slow, obvious, any floating dtype.

The kernels, the compiled CPU loops and the fallback all follow these functions, name by name and in
the same order of operations. Run in float64 they are checked against `torch.optim`; run in float32
they are what the torch backend falls back to.

`<rule>_scalars(hyper, step)` takes and returns Python floats.
`<rule>(param, grad, states, scalars)` takes tensors of one dtype and returns new ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Scalars = tuple[float, ...]
States = tuple[Tensor, ...]


def accumulate(acc: Tensor, grad: Tensor, scale: float, first: bool) -> Tensor:
    """The accumulator after one more gradient: `(0 if first else acc) + scale * grad`."""
    update = grad.to(acc.dtype) * scale
    return update if first else acc + update


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of all elements of all tensors together, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors:
        total += tensor.double().square().sum().cpu()
    return total.sqrt()


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """What torch.nn.utils.clip_grad_norm_ multiplies gradients of that norm with."""
    if math.isnan(norm):
        return norm
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))


def join_master(high: Tensor, remainder: Tensor) -> Tensor:
    """fp32 master from its bf16 high half and int16 remainder."""
    bits = high.float().view(torch.int32) + remainder.int()
    return bits.view(torch.float32)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 high half (nearest, ties away from zero) and int16 remainder of an fp32 master."""
    master = torch.where(master.isnan(), torch.full_like(master, math.nan), master)
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    remainder = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def adam_scalars(hyper: Scalars, step: float) -> Scalars:
    """torch.optim.Adam and AdamW; L2 and decoupled decay are told apart by the rule."""
    lr, beta1, beta2, eps, weight_decay = hyper
    step_size = lr / (1.0 - beta1**step)
    inv_sqrt_correction2 = 1.0 / math.sqrt(1.0 - beta2**step)
    decay = 1.0 - lr * weight_decay
    return (
        step_size,
        inv_sqrt_correction2,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
        weight_decay,
        decay,
    )


def _adam_update(
    param: Tensor, grad: Tensor, states: States, scalars: Scalars
) -> tuple[Tensor, States]:
    """What Adam and AdamW share once the decay is applied; a third state means amsgrad."""
    exp_avg, exp_avg_sq, *maximum = states
    step_size, inv_sqrt_correction2, weight1, beta2, weight2, eps, _, _ = scalars
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    maximum = [torch.maximum(m, exp_avg_sq) for m in maximum]
    denom = (maximum or [exp_avg_sq])[0].sqrt() * inv_sqrt_correction2 + eps
    param = param - step_size * (exp_avg / denom)
    return param, (exp_avg, exp_avg_sq, *maximum)


def adamw(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
    """Loshchilov and Hutter 2019, as torch.optim.AdamW."""
    return _adam_update(param * scalars[-1], grad, states, scalars)


def adam(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
    """Kingma and Ba 2015, as torch.optim.Adam: the decay joins the gradient."""
    return _adam_update(param, grad + scalars[-2] * param, states, scalars)


adamw_amsgrad = adamw
adam_amsgrad = adam


def sgd_scalars(hyper: Scalars, step: float) -> Scalars:
    """torch.optim.SGD. The first update copies the gradient into the buffer, undampened."""
    lr, momentum, dampening, weight_decay = hyper
    is_first = step == 1.0
    momentum_in = 0.0 if is_first else momentum
    weight_in = 1.0 if is_first else 1.0 - dampening
    return lr, momentum, momentum_in, weight_in, weight_decay


def sgd(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
    """Plain gradient descent, as torch.optim.SGD with momentum 0."""
    lr, _, _, _, weight_decay = scalars
    grad = grad + weight_decay * param
    return param - lr * grad, states


def sgd_momentum(
    param: Tensor, grad: Tensor, states: States, scalars: Scalars
) -> tuple[Tensor, States]:
    """Heavy-ball momentum as torch.optim.SGD defines it (the rate multiplies the whole buffer)."""
    (momentum_buffer,) = states
    lr, _, momentum_in, weight_in, weight_decay = scalars
    grad = grad + weight_decay * param
    momentum_buffer = momentum_in * momentum_buffer + weight_in * grad
    return param - lr * momentum_buffer, (momentum_buffer,)


def sgd_nesterov(
    param: Tensor, grad: Tensor, states: States, scalars: Scalars
) -> tuple[Tensor, States]:
    """Nesterov momentum, as torch.optim.SGD(nesterov=True)."""
    (momentum_buffer,) = states
    lr, momentum, momentum_in, weight_in, weight_decay = scalars
    grad = grad + weight_decay * param
    momentum_buffer = momentum_in * momentum_buffer + weight_in * grad
    return param - lr * (grad + momentum * momentum_buffer), (momentum_buffer,)
