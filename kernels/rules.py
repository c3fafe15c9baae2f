"""Update rules: what an optimizer does with one element.

A rule is two functions.

`<rule>_scalars(hyper, step)` runs once per update in float64: `hyper` is the tuple of the param
group's hyper-parameters in the order that `fusedaccum/rules.py` lists them, `step` the number of
this update (1, 2, ...). It returns the scalars that the elements need, which are rounded to fp32.

`<rule>(param, grad, states, scalars)` runs for every element in fp32 and returns the new parameter
and the tuple of new states. `grad` is already the normalised, clipped mean (negated for
`maximize`). States start as zeros.

Rules are straight-line arithmetic on purpose: `+ - * /`, `tl.sqrt`, `tl.abs`, `tl.maximum`,
`tl.minimum`, `tl.where` and comparisons. The CPU backend compiles the same text to a C loop.
How to add one: README.md beside this file.
"""

import triton
import triton.language as tl


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64, for 0 <= base < 1 (log 0 is -inf, exp of that 0)."""
    return tl.exp(exponent * tl.log(base))


@triton.jit
def adam_scalars(hyper, step):
    """torch.optim.Adam and AdamW; L2 and decoupled decay are told apart by the rule."""
    lr, beta1, beta2, eps, weight_decay = hyper
    step_size = lr / (1.0 - _power(beta1, step))
    inv_sqrt_correction2 = 1.0 / tl.sqrt(1.0 - _power(beta2, step))
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


@triton.jit
def adamw(param, grad, states, scalars):
    """Loshchilov and Hutter 2019, as torch.optim.AdamW."""
    exp_avg, exp_avg_sq = states
    step_size, inv_sqrt_correction2, weight1, beta2, weight2, eps, weight_decay, decay = scalars
    param = param * decay
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    denom = tl.sqrt(exp_avg_sq) * inv_sqrt_correction2 + eps
    param = param - step_size * (exp_avg / denom)
    return param, (exp_avg, exp_avg_sq)


@triton.jit
def adamw_amsgrad(param, grad, states, scalars):
    """AdamW with the running maximum of Reddi et al. 2018, as torch's amsgrad=True."""
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    step_size, inv_sqrt_correction2, weight1, beta2, weight2, eps, weight_decay, decay = scalars
    param = param * decay
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq)
    denom = tl.sqrt(max_exp_avg_sq) * inv_sqrt_correction2 + eps
    param = param - step_size * (exp_avg / denom)
    return param, (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def adam(param, grad, states, scalars):
    """Kingma and Ba 2015, as torch.optim.Adam: the decay joins the gradient."""
    exp_avg, exp_avg_sq = states
    step_size, inv_sqrt_correction2, weight1, beta2, weight2, eps, weight_decay, decay = scalars
    grad = grad + weight_decay * param
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    denom = tl.sqrt(exp_avg_sq) * inv_sqrt_correction2 + eps
    param = param - step_size * (exp_avg / denom)
    return param, (exp_avg, exp_avg_sq)


@triton.jit
def adam_amsgrad(param, grad, states, scalars):
    """Adam with the running maximum of Reddi et al. 2018, as torch's amsgrad=True."""
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    step_size, inv_sqrt_correction2, weight1, beta2, weight2, eps, weight_decay, decay = scalars
    grad = grad + weight_decay * param
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq)
    denom = tl.sqrt(max_exp_avg_sq) * inv_sqrt_correction2 + eps
    param = param - step_size * (exp_avg / denom)
    return param, (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def sgd_scalars(hyper, step):
    """torch.optim.SGD. The first update copies the gradient into the buffer, undampened."""
    lr, momentum, dampening, weight_decay = hyper
    is_first = step == 1.0
    momentum_in = tl.where(is_first, 0.0, momentum)
    weight_in = tl.where(is_first, 1.0, 1.0 - dampening)
    return lr, momentum, momentum_in, weight_in, weight_decay


@triton.jit
def sgd(param, grad, states, scalars):
    """Plain gradient descent, as torch.optim.SGD with momentum 0."""
    lr, momentum, momentum_in, weight_in, weight_decay = scalars
    grad = grad + weight_decay * param
    param = param - lr * grad
    return param, states


@triton.jit
def sgd_momentum(param, grad, states, scalars):
    """Heavy-ball momentum as torch.optim.SGD defines it (the rate multiplies the whole buffer)."""
    (momentum_buffer,) = states
    lr, momentum, momentum_in, weight_in, weight_decay = scalars
    grad = grad + weight_decay * param
    momentum_buffer = momentum_in * momentum_buffer + weight_in * grad
    param = param - lr * momentum_buffer
    return param, (momentum_buffer,)


@triton.jit
def sgd_nesterov(param, grad, states, scalars):
    """Nesterov momentum, as torch.optim.SGD(nesterov=True)."""
    (momentum_buffer,) = states
    lr, momentum, momentum_in, weight_in, weight_decay = scalars
    grad = grad + weight_decay * param
    momentum_buffer = momentum_in * momentum_buffer + weight_in * grad
    param = param - lr * (grad + momentum * momentum_buffer)
    return param, (momentum_buffer,)
