"""What every operation means, in plain torch: slow, obvious, any floating dtype.

The kernels, the compiled CPU loops and the fallback all follow these functions, name by name and in
the same order of operations. Run in float64 they are checked against `torch.optim`; run in float32
they are what the torch backend falls back to.

`<family>_scalars(hyper, step, memory)` takes and returns Python floats.
`<rule>(param, grad, states, scalars)` takes tensors of one dtype and returns new ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..kernels.layout import CLIP_EPS, ROUND_HALF

Scalars = tuple[float, ...]
States = tuple[Tensor, ...]
Both = tuple[Scalars, Scalars]  # scalars and memory


def accumulate(acc: Tensor, grad: Tensor, scale: float, first: bool) -> Tensor:
    """The accumulator after one more gradient: `(0 if first else acc) + scale * grad`."""
    update = grad.to(acc.dtype) * scale
    return update if first else acc + update


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of all elements of all tensors together, in float64."""
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for tensor in tensors:
        total += tensor.double().square().sum().cpu()
    return total.sqrt()


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """What torch.nn.utils.clip_grad_norm_ multiplies gradients of that norm with."""
    if math.isnan(norm):
        return norm
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + CLIP_EPS))


def join_master(high: Tensor, remainder: Tensor) -> Tensor:
    """fp32 master from its bf16 high half and int16 remainder.

    A remainder that would make a number a NaN came with another parameter (`kernels/_math.py` says
    which do); the parameter then counts alone.
    """
    alone = high.float()
    master = (alone.view(torch.int32) + remainder.int()).view(torch.float32)
    return torch.where(master.isnan(), alone, master)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 high half (nearest, ties away from zero) and int16 remainder of an fp32 master."""
    master = torch.where(master.isnan(), torch.full_like(master, math.nan), master)
    bits = master.view(torch.int32)
    high = (bits + ROUND_HALF) >> 16
    remainder = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def precise(param: Tensor, master: Tensor) -> Tensor:
    """fp32 value of a parameter as it is now and its master, an int16 remainder or fp32.

    An element of an fp32 master counts as long as the parameter is its rounded value. Elsewhere
    somebody wrote the parameter, and the written element counts.
    """
    if master.dtype == torch.int16:
        return join_master(param, master)
    return torch.where(master.to(param.dtype) == param, master, param.float())


def adam_scalars(hyper: Scalars, step: float, memory: Scalars) -> Both:
    """torch.optim.Adam and AdamW."""
    lr, beta1, beta2, eps, weight_decay, is_decoupled = hyper
    step_size = lr / (1.0 - beta1**step)
    inv_sqrt_correction2 = 1.0 / math.sqrt(1.0 - beta2**step)
    l2 = weight_decay * (1.0 - is_decoupled)
    decay = 1.0 - lr * weight_decay * is_decoupled
    weight1, weight2 = 1.0 - beta1, 1.0 - beta2
    return (step_size, inv_sqrt_correction2, weight1, beta2, weight2, eps, l2, decay), memory


def adam(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
    """Kingma and Ba 2015; decoupled decay of Loshchilov and Hutter 2019."""
    exp_avg, exp_avg_sq = states
    step_size, inv_sqrt_correction2, weight1, beta2, weight2, eps, l2, decay = scalars
    grad = grad + l2 * param
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    denom = exp_avg_sq.sqrt() * inv_sqrt_correction2 + eps
    param = param * decay - step_size * (exp_avg / denom)
    return param, (exp_avg, exp_avg_sq)


def adam_amsgrad(
    param: Tensor, grad: Tensor, states: States, scalars: Scalars
) -> tuple[Tensor, States]:
    """Adam with the running maximum of Reddi et al. 2018, as torch's amsgrad=True."""
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    step_size, inv_sqrt_correction2, weight1, beta2, weight2, eps, l2, decay = scalars
    grad = grad + l2 * param
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    denom = max_exp_avg_sq.sqrt() * inv_sqrt_correction2 + eps
    param = param * decay - step_size * (exp_avg / denom)
    return param, (exp_avg, exp_avg_sq, max_exp_avg_sq)


def nadam_scalars(hyper: Scalars, step: float, memory: Scalars) -> Both:
    """torch.optim.NAdam; memory is the running product of the momentum schedule."""
    lr, beta1, beta2, eps, weight_decay, is_decoupled, momentum_decay = hyper
    (mu_product,) = memory
    mu = beta1 * (1.0 - 0.5 * 0.96 ** (step * momentum_decay))
    mu_next = beta1 * (1.0 - 0.5 * 0.96 ** ((step + 1.0) * momentum_decay))
    mu_product = mu_product * mu
    grad_step = lr * (1.0 - mu) / (1.0 - mu_product)
    avg_step = lr * mu_next / (1.0 - mu_product * mu_next)
    inv_sqrt_correction2 = 1.0 / math.sqrt(1.0 - beta2**step)
    l2 = weight_decay * (1.0 - is_decoupled)
    decay = 1.0 - lr * weight_decay * is_decoupled
    weight1, weight2 = 1.0 - beta1, 1.0 - beta2
    return (
        (grad_step, avg_step, inv_sqrt_correction2, weight1, beta2, weight2, eps, l2, decay),
        (mu_product,),
    )


def nadam(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
    """Dozat 2016, as torch.optim.NAdam."""
    exp_avg, exp_avg_sq = states
    grad_step, avg_step, inv_sqrt_correction2, weight1, beta2, weight2, eps, l2, decay = scalars
    grad = grad + l2 * param
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    denom = exp_avg_sq.sqrt() * inv_sqrt_correction2 + eps
    param = param * decay - grad_step * (grad / denom) - avg_step * (exp_avg / denom)
    return param, (exp_avg, exp_avg_sq)


def radam_scalars(hyper: Scalars, step: float, memory: Scalars) -> Both:
    """torch.optim.RAdam; the rectified step while the variance is tractable, else the plain one."""
    lr, beta1, beta2, eps, weight_decay, is_decoupled = hyper
    power2 = beta2**step
    correction2 = 1.0 - power2
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * power2 / correction2
    is_rectified = rho > 5.0
    rect_num = (rho - 4.0) * (rho - 2.0) * rho_inf if is_rectified else 0.0
    rect_den = (rho_inf - 4.0) * (rho_inf - 2.0) * rho if is_rectified else 1.0
    step_size = lr / (1.0 - beta1**step)
    adaptive_step = step_size * math.sqrt(correction2 * rect_num / rect_den)
    plain_step = 0.0 if is_rectified else step_size
    l2 = weight_decay * (1.0 - is_decoupled)
    decay = 1.0 - lr * weight_decay * is_decoupled
    weight1, weight2 = 1.0 - beta1, 1.0 - beta2
    return (adaptive_step, plain_step, weight1, beta2, weight2, eps, l2, decay), memory


def radam(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
    """Liu et al. 2020, as torch.optim.RAdam."""
    exp_avg, exp_avg_sq = states
    adaptive_step, plain_step, weight1, beta2, weight2, eps, l2, decay = scalars
    grad = grad + l2 * param
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    if adaptive_step > 0.0:
        param = param * decay - adaptive_step / (exp_avg_sq.sqrt() + eps) * exp_avg
    else:
        param = param * decay - plain_step * exp_avg
    return param, (exp_avg, exp_avg_sq)


def adamax_scalars(hyper: Scalars, step: float, memory: Scalars) -> Both:
    """torch.optim.Adamax."""
    lr, beta1, beta2, eps, weight_decay = hyper
    step_size = lr / (1.0 - beta1**step)
    return (step_size, 1.0 - beta1, beta2, eps, weight_decay), memory


def adamax(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
    """Adam's infinity-norm variant (Kingma and Ba 2015), as torch.optim.Adamax."""
    exp_avg, exp_inf = states
    step_size, weight1, beta2, eps, l2 = scalars
    grad = grad + l2 * param
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_inf = torch.maximum(beta2 * exp_inf, grad.abs() + eps)
    return param - step_size * (exp_avg / exp_inf), (exp_avg, exp_inf)


def adagrad_scalars(hyper: Scalars, step: float, memory: Scalars) -> Both:
    """torch.optim.Adagrad."""
    lr, lr_decay, eps, weight_decay = hyper
    return (lr / (1.0 + (step - 1.0) * lr_decay), eps, weight_decay), memory


def adagrad(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
    """Duchi et al. 2011, as torch.optim.Adagrad."""
    (total,) = states
    step_size, eps, l2 = scalars
    grad = grad + l2 * param
    total = total + grad * grad
    return param - step_size * (grad / (total.sqrt() + eps)), (total,)


def rmsprop_scalars(hyper: Scalars, step: float, memory: Scalars) -> Both:
    """torch.optim.RMSprop."""
    lr, alpha, eps, weight_decay, momentum = hyper
    return (lr, alpha, 1.0 - alpha, eps, weight_decay, momentum), memory


def _rmsprop(
    param: Tensor,
    grad: Tensor,
    states: States,
    scalars: Scalars,
    centered: bool,
    with_momentum: bool,
) -> tuple[Tensor, States]:
    """All four variants: Hinton 2012; centered as in Graves 2013."""
    square_avg, *rest = states
    lr, alpha, weight, eps, l2, momentum = scalars
    grad = grad + l2 * param
    square_avg = alpha * square_avg + weight * grad * grad
    updated, variance = [square_avg], square_avg
    if centered:
        grad_avg = rest.pop(0)
        grad_avg = grad_avg + weight * (grad - grad_avg)
        updated.append(grad_avg)
        variance = (square_avg - grad_avg * grad_avg).clamp(min=0.0)
    direction = grad / (variance.sqrt() + eps)
    if with_momentum:
        direction = momentum * rest.pop(0) + direction
        updated.append(direction)
    return param - lr * direction, tuple(updated)


def rmsprop(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
    """Hinton 2012, as torch.optim.RMSprop."""
    return _rmsprop(param, grad, states, scalars, False, False)


def rmsprop_momentum(
    param: Tensor, grad: Tensor, states: States, scalars: Scalars
) -> tuple[Tensor, States]:
    """torch.optim.RMSprop(momentum=...)."""
    return _rmsprop(param, grad, states, scalars, False, True)


def rmsprop_centered(
    param: Tensor, grad: Tensor, states: States, scalars: Scalars
) -> tuple[Tensor, States]:
    """torch.optim.RMSprop(centered=True)."""
    return _rmsprop(param, grad, states, scalars, True, False)


def rmsprop_centered_momentum(
    param: Tensor, grad: Tensor, states: States, scalars: Scalars
) -> tuple[Tensor, States]:
    """torch.optim.RMSprop(centered=True, momentum=...)."""
    return _rmsprop(param, grad, states, scalars, True, True)


def adadelta_scalars(hyper: Scalars, step: float, memory: Scalars) -> Both:
    """torch.optim.Adadelta."""
    lr, rho, eps, weight_decay = hyper
    return (lr, rho, 1.0 - rho, eps, weight_decay), memory


def adadelta(
    param: Tensor, grad: Tensor, states: States, scalars: Scalars
) -> tuple[Tensor, States]:
    """Zeiler 2012, as torch.optim.Adadelta."""
    square_avg, acc_delta = states
    lr, rho, weight, eps, l2 = scalars
    grad = grad + l2 * param
    square_avg = rho * square_avg + weight * grad * grad
    delta = (acc_delta + eps).sqrt() / (square_avg + eps).sqrt() * grad
    acc_delta = rho * acc_delta + weight * delta * delta
    return param - lr * delta, (square_avg, acc_delta)


def asgd_scalars(hyper: Scalars, step: float, memory: Scalars) -> Both:
    """torch.optim.ASGD; memory is eta and mu, which torch computes for the next update."""
    lr, lambd, alpha, t0, weight_decay = hyper
    eta, mu = memory
    next_eta = lr / (1.0 + lambd * lr * step) ** alpha
    next_mu = 1.0 / max(1.0, step - t0)
    return (eta, 1.0 - lambd * eta, mu, weight_decay), (next_eta, next_mu)


def asgd(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
    """Polyak and Juditsky 1992, as torch.optim.ASGD."""
    (ax,) = states
    eta, decay, mu, l2 = scalars
    grad = grad + l2 * param
    param = param * decay - eta * grad
    ax = param.clone() if mu == 1.0 else ax + mu * (param - ax)
    return param, (ax,)


def rprop_scalars(hyper: Scalars, step: float, memory: Scalars) -> Both:
    """torch.optim.Rprop."""
    _, eta_minus, eta_plus, step_size_min, step_size_max = hyper
    return (eta_minus, eta_plus, step_size_min, step_size_max), memory


def rprop(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
    """Riedmiller and Braun 1993, as torch.optim.Rprop."""
    prev, step_size = states
    eta_minus, eta_plus, step_size_min, step_size_max = scalars
    product = grad * prev
    factor = torch.ones_like(product)
    factor[product > 0] = eta_plus
    factor[product < 0] = eta_minus
    step_size = (step_size * factor).clamp(step_size_min, step_size_max)
    grad = torch.where(product < 0, torch.zeros_like(grad), grad)
    return param - grad.sign() * step_size, (grad, step_size)


def lion_scalars(hyper: Scalars, step: float, memory: Scalars) -> Both:
    """Lion."""
    lr, beta1, beta2, weight_decay = hyper
    return (lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, 1.0 - lr * weight_decay), memory


def lion(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
    """Chen et al. 2023: the sign of an interpolation, decoupled decay."""
    (exp_avg,) = states
    lr, beta1, weight1, beta2, weight2, decay = scalars
    update = beta1 * exp_avg + weight1 * grad
    param = param * decay - lr * update.sign()
    return param, (beta2 * exp_avg + weight2 * grad,)


def sgd_scalars(hyper: Scalars, step: float, memory: Scalars) -> Both:
    """torch.optim.SGD. The first update copies the gradient into the buffer, undampened."""
    lr, momentum, dampening, weight_decay = hyper
    is_first = step == 1.0
    momentum_in = 0.0 if is_first else momentum
    weight_in = 1.0 if is_first else 1.0 - dampening
    return (lr, momentum, momentum_in, weight_in, weight_decay), memory


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
