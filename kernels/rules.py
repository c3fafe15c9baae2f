"""Update rules: what an optimizer does with one element.

A rule is two functions.

`<family>_scalars(hyper, step, memory)` runs once per update and tensor, in float64: `hyper` is the
tuple of the param group's hyper-parameters in the order that `rules/builtin.py` lists them,
`step` the number of this update (1, 2, ...), `memory` what the family keeps per tensor from update
to update (mostly nothing). It returns the scalars that the elements need, which are rounded to
fp32, and the new memory.

`<rule>(param, grad, states, scalars)` runs for every element in fp32 and returns the new parameter
and the tuple of new states. `grad` is already the normalised, clipped mean (negated for
`maximize`).

Rules are straight-line arithmetic on purpose: `+ - * /`, `tl.sqrt`, `tl.abs`, `tl.maximum`,
`tl.minimum`, `tl.where` and comparisons. The CPU's C loops and the torch functions are made from
the same text.
How to add one: README.md beside this file.

Weight decay: `l2` joins the gradient, `decay` multiplies the parameter (decoupled); where one acts
the other is 0 or 1.
"""

import triton
import triton.language as tl


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64, for 0 <= base < 1 (log 0 is -inf, exp of that 0)."""
    return tl.exp(exponent * tl.log(base))


@triton.jit
def adam_scalars(hyper, step, memory):
    """torch.optim.Adam and AdamW."""
    lr, beta1, beta2, eps, weight_decay, is_decoupled = hyper
    step_size = lr / (1.0 - _power(beta1, step))
    inv_sqrt_correction2 = 1.0 / tl.sqrt(1.0 - _power(beta2, step))
    l2 = weight_decay * (1.0 - is_decoupled)
    decay = 1.0 - lr * weight_decay * is_decoupled
    weight1, weight2 = 1.0 - beta1, 1.0 - beta2
    return (step_size, inv_sqrt_correction2, weight1, beta2, weight2, eps, l2, decay), memory


@triton.jit
def adam(param, grad, states, scalars):
    """Kingma and Ba 2015; decoupled decay of Loshchilov and Hutter 2019."""
    exp_avg, exp_avg_sq = states
    step_size, inv_sqrt_correction2, weight1, beta2, weight2, eps, l2, decay = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    denom = tl.sqrt(exp_avg_sq) * inv_sqrt_correction2 + eps
    param = param * decay - step_size * (exp_avg / denom)
    return param, (exp_avg, exp_avg_sq)


@triton.jit
def adam_amsgrad(param, grad, states, scalars):
    """Adam with the running maximum of Reddi et al. 2018, as torch's amsgrad=True."""
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    step_size, inv_sqrt_correction2, weight1, beta2, weight2, eps, l2, decay = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq)
    denom = tl.sqrt(max_exp_avg_sq) * inv_sqrt_correction2 + eps
    param = param * decay - step_size * (exp_avg / denom)
    return param, (exp_avg, exp_avg_sq, max_exp_avg_sq)


# The base of NAdam's momentum schedule is fixed: 0.96 ** (step * momentum_decay).
LOG_0_96 = tl.constexpr(-0.040821994520255166)


@triton.jit
def nadam_scalars(hyper, step, memory):
    """torch.optim.NAdam; memory is the running product of the momentum schedule."""
    lr, beta1, beta2, eps, weight_decay, is_decoupled, momentum_decay = hyper
    (mu_product,) = memory
    mu = beta1 * (1.0 - 0.5 * tl.exp(step * momentum_decay * LOG_0_96))
    mu_next = beta1 * (1.0 - 0.5 * tl.exp((step + 1.0) * momentum_decay * LOG_0_96))
    mu_product = mu_product * mu
    grad_step = lr * (1.0 - mu) / (1.0 - mu_product)
    avg_step = lr * mu_next / (1.0 - mu_product * mu_next)
    inv_sqrt_correction2 = 1.0 / tl.sqrt(1.0 - _power(beta2, step))
    l2 = weight_decay * (1.0 - is_decoupled)
    decay = 1.0 - lr * weight_decay * is_decoupled
    weight1, weight2 = 1.0 - beta1, 1.0 - beta2
    return (
        (grad_step, avg_step, inv_sqrt_correction2, weight1, beta2, weight2, eps, l2, decay),
        (mu_product,),
    )


@triton.jit
def nadam(param, grad, states, scalars):
    """Dozat 2016, as torch.optim.NAdam."""
    exp_avg, exp_avg_sq = states
    grad_step, avg_step, inv_sqrt_correction2, weight1, beta2, weight2, eps, l2, decay = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    denom = tl.sqrt(exp_avg_sq) * inv_sqrt_correction2 + eps
    param = param * decay - grad_step * (grad / denom) - avg_step * (exp_avg / denom)
    return param, (exp_avg, exp_avg_sq)


@triton.jit
def radam_scalars(hyper, step, memory):
    """torch.optim.RAdam; the rectified step while the variance is tractable, else the plain one."""
    lr, beta1, beta2, eps, weight_decay, is_decoupled = hyper
    power2 = _power(beta2, step)
    correction2 = 1.0 - power2
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * power2 / correction2
    is_rectified = rho > 5.0
    # Whatever the branch, no square root of a negative number.
    rect_num = tl.where(is_rectified, (rho - 4.0) * (rho - 2.0) * rho_inf, 0.0)
    rect_den = tl.where(is_rectified, (rho_inf - 4.0) * (rho_inf - 2.0) * rho, 1.0)
    step_size = lr / (1.0 - _power(beta1, step))
    adaptive_step = step_size * tl.sqrt(correction2 * rect_num / rect_den)
    plain_step = tl.where(is_rectified, 0.0, step_size)
    l2 = weight_decay * (1.0 - is_decoupled)
    decay = 1.0 - lr * weight_decay * is_decoupled
    weight1, weight2 = 1.0 - beta1, 1.0 - beta2
    return (adaptive_step, plain_step, weight1, beta2, weight2, eps, l2, decay), memory


@triton.jit
def radam(param, grad, states, scalars):
    """Liu et al. 2020, as torch.optim.RAdam."""
    exp_avg, exp_avg_sq = states
    adaptive_step, plain_step, weight1, beta2, weight2, eps, l2, decay = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    adaptive = adaptive_step / (tl.sqrt(exp_avg_sq) + eps)
    step_size = tl.where(adaptive_step > 0.0, adaptive, plain_step)
    param = param * decay - step_size * exp_avg
    return param, (exp_avg, exp_avg_sq)


@triton.jit
def adamax_scalars(hyper, step, memory):
    """torch.optim.Adamax."""
    lr, beta1, beta2, eps, weight_decay = hyper
    step_size = lr / (1.0 - _power(beta1, step))
    return (step_size, 1.0 - beta1, beta2, eps, weight_decay), memory


@triton.jit
def adamax(param, grad, states, scalars):
    """Adam's infinity-norm variant (Kingma and Ba 2015), as torch.optim.Adamax."""
    exp_avg, exp_inf = states
    step_size, weight1, beta2, eps, l2 = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_inf = tl.maximum(beta2 * exp_inf, tl.abs(grad) + eps)
    param = param - step_size * (exp_avg / exp_inf)
    return param, (exp_avg, exp_inf)


@triton.jit
def adagrad_scalars(hyper, step, memory):
    """torch.optim.Adagrad."""
    lr, lr_decay, eps, weight_decay = hyper
    return (lr / (1.0 + (step - 1.0) * lr_decay), eps, weight_decay), memory


@triton.jit
def adagrad(param, grad, states, scalars):
    """Duchi et al. 2011, as torch.optim.Adagrad."""
    (total,) = states
    step_size, eps, l2 = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    total = total + grad * grad
    param = param - step_size * (grad / (tl.sqrt(total) + eps))
    return param, (total,)


@triton.jit
def rmsprop_scalars(hyper, step, memory):
    """torch.optim.RMSprop."""
    lr, alpha, eps, weight_decay, momentum = hyper
    return (lr, alpha, 1.0 - alpha, eps, weight_decay, momentum), memory


@triton.jit
def rmsprop(param, grad, states, scalars):
    """Hinton 2012, as torch.optim.RMSprop."""
    (square_avg,) = states
    lr, alpha, weight, eps, l2, momentum = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    square_avg = alpha * square_avg + weight * grad * grad
    param = param - lr * (grad / (tl.sqrt(square_avg) + eps))
    return param, (square_avg,)


@triton.jit
def rmsprop_momentum(param, grad, states, scalars):
    """torch.optim.RMSprop(momentum=...)."""
    square_avg, momentum_buffer = states
    lr, alpha, weight, eps, l2, momentum = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    square_avg = alpha * square_avg + weight * grad * grad
    momentum_buffer = momentum * momentum_buffer + grad / (tl.sqrt(square_avg) + eps)
    param = param - lr * momentum_buffer
    return param, (square_avg, momentum_buffer)


@triton.jit
def rmsprop_centered(param, grad, states, scalars):
    """Graves 2013, as torch.optim.RMSprop(centered=True).

    The variance estimate is not let below zero, where rounding may take it; a NaN stays one.
    """
    square_avg, grad_avg = states
    lr, alpha, weight, eps, l2, momentum = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    square_avg = alpha * square_avg + weight * grad * grad
    grad_avg = grad_avg + weight * (grad - grad_avg)
    variance = square_avg - grad_avg * grad_avg
    variance = tl.where(variance < 0.0, 0.0, variance)
    param = param - lr * (grad / (tl.sqrt(variance) + eps))
    return param, (square_avg, grad_avg)


@triton.jit
def rmsprop_centered_momentum(param, grad, states, scalars):
    """torch.optim.RMSprop(centered=True, momentum=...)."""
    square_avg, grad_avg, momentum_buffer = states
    lr, alpha, weight, eps, l2, momentum = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    square_avg = alpha * square_avg + weight * grad * grad
    grad_avg = grad_avg + weight * (grad - grad_avg)
    variance = square_avg - grad_avg * grad_avg
    variance = tl.where(variance < 0.0, 0.0, variance)
    momentum_buffer = momentum * momentum_buffer + grad / (tl.sqrt(variance) + eps)
    param = param - lr * momentum_buffer
    return param, (square_avg, grad_avg, momentum_buffer)


@triton.jit
def adadelta_scalars(hyper, step, memory):
    """torch.optim.Adadelta."""
    lr, rho, eps, weight_decay = hyper
    return (lr, rho, 1.0 - rho, eps, weight_decay), memory


@triton.jit
def adadelta(param, grad, states, scalars):
    """Zeiler 2012, as torch.optim.Adadelta."""
    square_avg, acc_delta = states
    lr, rho, weight, eps, l2 = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    square_avg = rho * square_avg + weight * grad * grad
    delta = tl.sqrt(acc_delta + eps) / tl.sqrt(square_avg + eps) * grad
    acc_delta = rho * acc_delta + weight * delta * delta
    param = param - lr * delta
    return param, (square_avg, acc_delta)


@triton.jit
def asgd_scalars(hyper, step, memory):
    """torch.optim.ASGD; memory is eta and mu, which torch computes for the next update."""
    lr, lambd, alpha, t0, weight_decay = hyper
    eta, mu = memory
    next_eta = lr / tl.exp(alpha * tl.log(1.0 + lambd * lr * step))
    next_mu = 1.0 / tl.maximum(1.0, step - t0)
    return (eta, 1.0 - lambd * eta, mu, weight_decay), (next_eta, next_mu)


@triton.jit
def asgd(param, grad, states, scalars):
    """Polyak and Juditsky 1992, as torch.optim.ASGD."""
    (ax,) = states
    eta, decay, mu, l2 = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    param = param * decay - eta * grad
    ax = tl.where(mu == 1.0, param, ax + mu * (param - ax))
    return param, (ax,)


@triton.jit
def rprop_scalars(hyper, step, memory):
    """torch.optim.Rprop."""
    lr, eta_minus, eta_plus, step_size_min, step_size_max = hyper
    return (eta_minus, eta_plus, step_size_min, step_size_max), memory


@triton.jit
def rprop(param, grad, states, scalars):
    """Riedmiller and Braun 1993, as torch.optim.Rprop."""
    prev, step_size = states
    eta_minus, eta_plus, step_size_min, step_size_max = scalars
    product = grad * prev
    factor = tl.where(product > 0.0, eta_plus, tl.where(product < 0.0, eta_minus, 1.0))
    step_size = tl.minimum(tl.maximum(step_size * factor, step_size_min), step_size_max)
    grad = tl.where(product < 0.0, 0.0, grad)
    direction = tl.where(grad > 0.0, 1.0, tl.where(grad < 0.0, -1.0, 0.0))
    param = param - direction * step_size
    return param, (grad, step_size)


@triton.jit
def lion_scalars(hyper, step, memory):
    """Lion."""
    lr, beta1, beta2, weight_decay = hyper
    return (lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, 1.0 - lr * weight_decay), memory


@triton.jit
def lion(param, grad, states, scalars):
    """Chen et al. 2023: the sign of an interpolation, decoupled decay."""
    (exp_avg,) = states
    lr, beta1, weight1, beta2, weight2, decay = scalars
    update = beta1 * exp_avg + weight1 * grad
    direction = tl.where(update > 0.0, 1.0, tl.where(update < 0.0, -1.0, update))
    param = param * decay - lr * direction
    exp_avg = beta2 * exp_avg + weight2 * grad
    return param, (exp_avg,)


@triton.jit
def sgd_scalars(hyper, step, memory):
    """torch.optim.SGD. The first update copies the gradient into the buffer, undampened."""
    lr, momentum, dampening, weight_decay = hyper
    is_first = step == 1.0
    momentum_in = tl.where(is_first, 0.0, momentum)
    weight_in = tl.where(is_first, 1.0, 1.0 - dampening)
    return (lr, momentum, momentum_in, weight_in, weight_decay), memory


@triton.jit
def sgd(param, grad, states, scalars):
    """Plain gradient descent, as torch.optim.SGD with momentum 0."""
    lr, momentum, momentum_in, weight_in, l2 = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    param = param - lr * grad
    return param, states


@triton.jit
def sgd_momentum(param, grad, states, scalars):
    """Heavy-ball momentum as torch.optim.SGD defines it (the rate multiplies the whole buffer)."""
    (momentum_buffer,) = states
    lr, momentum, momentum_in, weight_in, l2 = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    momentum_buffer = momentum_in * momentum_buffer + weight_in * grad
    param = param - lr * momentum_buffer
    return param, (momentum_buffer,)


@triton.jit
def sgd_nesterov(param, grad, states, scalars):
    """Nesterov momentum, as torch.optim.SGD(nesterov=True)."""
    (momentum_buffer,) = states
    lr, momentum, momentum_in, weight_in, l2 = scalars
    grad = grad + tl.where(l2 == 0.0, 0.0, l2 * param)
    momentum_buffer = momentum_in * momentum_buffer + weight_in * grad
    param = param - lr * (grad + momentum * momentum_buffer)
    return param, (momentum_buffer,)
