"""Rules of an optimizer that the package does not know, as a user would write them; some wrong."""

import triton
import triton.language as tl


@triton.jit
def signum_scalars(hyper, step, memory):
    """Memory is the running product of the momentum, as a warm-up correction."""
    lr, momentum, weight_decay = hyper
    (product,) = memory
    product = product * momentum
    return (lr / (1.0 - product), momentum, 1.0 - momentum, lr * weight_decay), (product,)


@triton.jit
def signum_soft(param, grad, states, scalars):
    (momentum_buffer,) = states
    step_size, momentum, weight, decay = scalars
    momentum_buffer = momentum * momentum_buffer + weight * grad
    direction = momentum_buffer / tl.maximum(tl.abs(momentum_buffer), 0.01)
    param = param - decay * param - step_size * direction
    return param, (momentum_buffer,)


@triton.jit
def signum_none(param, grad, states, scalars):
    """Without momentum: no state, so the memory and two scalars go unused."""
    step_size, _momentum, _weight, decay = scalars
    direction = tl.where(grad > 0.0, 1.0, tl.where(grad < 0.0, -1.0, 0.0))
    param = param - decay * param - step_size * direction
    return param, states


@triton.jit
def indexed_scalars(hyper, step, memory):
    """Its text does not say how many hyper-parameters there are."""
    return (hyper[0], hyper[0], hyper[0], hyper[0]), memory


@triton.jit
def loops_scalars(hyper, step, memory):
    (lr,) = hyper
    return (lr,), memory


@triton.jit
def loops(param, grad, states, scalars):
    """No straight-line arithmetic."""
    (lr,) = scalars
    for _ in range(3):
        param = param - lr * grad
    return param, states


@triton.jit
def hidden_scalars(hyper, step, memory):
    (lr,) = hyper
    return (lr, lr, lr, 16.0 * lr), memory


@triton.jit
def hidden(param, grad, states, scalars):
    """Names that the loops in C have, too, names that C keeps, and one that is not read."""
    key, n = states
    _, i, _, int = scalars
    params = i * grad
    key = 0.5 * key + params
    n = n + int
    param = param - key
    return param, (key, n)


@triton.jit
def swapped_scalars(hyper, step, memory):
    (lr,) = hyper
    return (lr,), memory


@triton.jit
def swapped(grad, param, states, scalars):
    """Arguments in another order."""
    (lr,) = scalars
    param = param - lr * grad
    return param, states


@triton.jit
def named_scalars(hyper, step, memory):
    (lr,) = hyper
    return (lr,), memory


@triton.jit
def named(param, grad, states, scalars):
    """An argument by name, which would be dropped."""
    (lr,) = scalars
    param = param - lr * tl.maximum(grad, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return param, states
