"""The operations on lists of tensors, for framework authors and micro-benchmarks.

Everything works in place on tensors the caller owns, in one launch per operation on a GPU, and
allocates nothing that grows with the model. `FusedAccumOptimizer` is made of the same operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends import Backend, StepBatch, UpdateRequest, UpdateScalars
from .backends.base import GRAD_DTYPES
from .buffers import is_dense, laid_out_like
from .rules import RULES
from .tables import OWN, count_chunks

__all__ = ["accumulate_", "adam_", "adamw_", "global_norm", "sgd_"]

_backend = lru_cache(maxsize=None)(backends.get)


def _check(name: str, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """Tensors of an operation: allowed dtypes, one device."""
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name} must be a sequence of tensors, got one tensor: use [{name}]")
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(d) for d in dtypes)
            raise TypeError(f"{name}[{i}] has dtype {tensor.dtype}; allowed: {allowed}")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{name}[{i}] is on {tensor.device} and {name}[0] on {tensors[0].device}; "
                "call once per device"
            )


def _check_written(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """Tensors written in place: as many as the first list, same shapes and memory layout."""
    if len(tensors) != len(like):
        raise ValueError(f"{name} has {len(tensors)} tensors, expected {len(like)}")
    for i, (tensor, first) in enumerate(zip(tensors, like, strict=True)):
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(tensor.shape)}, expected {tuple(first.shape)}"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name}[{i}] is on {tensor.device}, expected {first.device}")
        same = tensor.stride() == first.stride() or tensor.is_contiguous() == first.is_contiguous()
        if not is_dense(tensor) or not same:
            raise ValueError(
                f"{name}[{i}] has strides {tensor.stride()}; it is written in place, so it must "
                f"be dense and laid out as its partner {first.stride()}"
            )


@torch.no_grad()
def accumulate_(
    accumulators: Sequence[Tensor],
    grads: Sequence[Tensor],
    scale: float = 1.0,
    *,
    first: bool = False,
    backend: str | None = None,
) -> None:
    """Add scaled gradients into fp32 accumulators.

        acc = (0 if first else acc) + scale * float32(grad)

    Args:
        accumulators: fp32 tensors, dense; changed in place.
        grads: as many tensors of the same shapes, bf16, fp16 or fp32, in any layout (an expanded,
            transposed or sparse one is copied first). Only read.
        scale: 1/N of an N-micro-batch mean, say.
        first: store instead of add, so that accumulators need no zeroing.
        backend: None (automatic), "triton" or "torch".

    Raises:
        TypeError: for another dtype.
        ValueError: for lists, shapes or devices that do not match.

    Example:
        >>> acc = [torch.empty(3)]
        >>> accumulate_(acc, [torch.tensor([1.0, 2.0, 3.0])], 0.5, first=True)
        >>> accumulate_(acc, [torch.tensor([1.0, 2.0, 3.0])], 0.5)
        >>> acc
        [tensor([1., 2., 3.])]
    """
    _check("accumulators", accumulators, (torch.float32,))
    _check("grads", grads, GRAD_DTYPES)
    _check_written("accumulators", accumulators, accumulators)
    if len(accumulators) != len(grads):
        raise ValueError(f"{len(accumulators)} accumulators but {len(grads)} grads")
    for i, (acc, grad) in enumerate(zip(accumulators, grads, strict=True)):
        if acc.shape != grad.shape:
            raise ValueError(
                f"grads[{i}] has shape {tuple(grad.shape)}, its accumulator {tuple(acc.shape)}"
            )
        if acc.device != grad.device:
            raise ValueError(f"grads[{i}] is on {grad.device}, its accumulator on {acc.device}")
    if not accumulators:
        return
    laid_out = [laid_out_like(g, a) for g, a in zip(grads, accumulators, strict=True)]
    _backend(backend, accumulators[0].device).accumulate(accumulators, laid_out, scale, first)


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """L2 norm of all elements of all tensors together, as `clip_grad_norm_` means it.

    Squares are summed in fp32 within 8,192 elements and in float64 beyond; an element above
    1.8e19 in magnitude makes it inf, as in torch.

    Args:
        tensors: bf16, fp16 or fp32, any layout; only read.
        backend: None (automatic), "triton" or "torch".

    Returns:
        0-d fp32 tensor on the tensors' device; nothing waits for it.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    _check("tensors", tensors, GRAD_DTYPES)
    if not tensors:
        return torch.zeros(())
    partials = sum_of_squares(_backend(backend, tensors[0].device), tensors)
    return partials.double().sum().sqrt().float()


def sum_of_squares(backend: Backend, tensors: Sequence[Tensor]) -> Tensor:
    """fp32 partial sums of squares of dense or strided tensors, one per chunk."""
    dense = [t if t.is_contiguous() or is_dense(t) else t.contiguous() for t in tensors]
    cells, end = [], 0
    for tensor in dense:
        cells.append(end)
        end += count_chunks(tensor.numel())
    partials = torch.zeros(end, dtype=torch.float32, device=tensors[0].device)
    backend.sum_of_squares(dense, partials, cells)
    return partials


def _update(
    rule_name: str,
    hyper: tuple[Any, ...],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    steps: Tensor,
    masters: Sequence[Tensor] | None,
    grad_scale: float,
    maximize: bool,
    backend: str | None,
) -> None:
    """Validate and run one rule over lists of tensors."""
    rule = RULES[rule_name]
    _check("params", params, GRAD_DTYPES)
    _check("grads", grads, (torch.float32,))
    _check_written("params", params, params)
    _check_written("grads", grads, params)
    for name, tensors in zip(rule.states, states, strict=True):
        _check(f"{name}s", tensors, (torch.float32,))
        _check_written(f"{name}s", tensors, params)
    if steps.shape != (len(params),) or steps.dtype != torch.float32:
        raise ValueError(
            f"steps must be a float32 tensor of shape ({len(params)},), one count per parameter, "
            f"got {steps.dtype} of shape {tuple(steps.shape)}"
        )
    if not params:
        return
    device = params[0].device
    runner = _backend(backend, device)
    scalars = UpdateScalars(0, rule.family.n_scalars, device)
    scalars.steps = steps
    scalars.scalars = torch.empty(len(params), OWN + rule.family.n_scalars, device=device)
    scalars.memory = torch.empty(len(params), 0, device=device)
    batches: dict[tuple[torch.dtype, str], StepBatch] = {}
    for i, param in enumerate(params):
        kind = "none"
        if masters is not None:
            kind = _master_kind(i, param, masters[i])
        batch = batches.setdefault((param.dtype, kind), StepBatch(rule, kind))
        batch.params.append(param)
        batch.accs.append(grads[i])
        batch.states.append(tuple(s[i] for s in states))
        batch.rows.append(i)
        batch.groups.append(0)
        if masters is not None and kind != "none":
            batch.masters.append(masters[i])
    row = (-1.0 if maximize else 1.0, *hyper)
    request = UpdateRequest(rule.family, [row], None, grad_scale, None, False)
    runner.finalize(request, list(batches.values()), scalars)
    for batch in batches.values():
        runner.step(batch, scalars)
    torch.autograd.graph.increment_version(list(params))


def _master_kind(index: int, param: Tensor, master: Tensor) -> str:
    """How `master` keeps the precise value of `param`."""
    _check_written(f"masters[{index}:]", [master], [param])
    if master.dtype == torch.int16 and param.dtype == torch.bfloat16:
        return "split"
    if master.dtype == torch.float32 and param.dtype != torch.float32:
        return "fp32"
    raise TypeError(
        f"masters[{index}] has dtype {master.dtype} for a {param.dtype} parameter; allowed: int16 "
        "remainders for bf16 parameters, float32 masters for bf16 and fp16 ones"
    )


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    maximize: bool = False,
    masters: Sequence[Tensor] | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """One AdamW update (Loshchilov and Hutter 2019), as `torch.optim.AdamW` makes it.

    Args:
        params: bf16, fp16 or fp32, dense; changed in place.
        grads: fp32 accumulators of the same shapes; only read, `grad_scale` times them is used.
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
        ValueError: for lists, shapes, layouts or devices that do not match.

    Example:
        >>> p, g = [torch.ones(2)], [torch.ones(2)]
        >>> m, v, steps = [torch.zeros(2)], [torch.zeros(2)], torch.zeros(1)
        >>> adamw_(p, g, m, v, steps, lr=0.1, weight_decay=0.0)
        >>> p
        [tensor([0.9000, 0.9000])]
    """
    states = [exp_avgs, exp_avg_sqs] + ([] if max_exp_avg_sqs is None else [max_exp_avg_sqs])
    name = "adam" if max_exp_avg_sqs is None else "adam_amsgrad"
    hyper = (lr, *betas, eps, weight_decay, 1.0)
    _update(
        name, hyper, params, grads, states, steps, masters, grad_scale, maximize, backend
    )  # fmt: skip


@torch.no_grad()
def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    maximize: bool = False,
    masters: Sequence[Tensor] | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """One Adam update (Kingma and Ba 2015), as `torch.optim.Adam`: the decay joins the gradient.

    Arguments, effects and errors are those of `adamw_`.
    """
    states = [exp_avgs, exp_avg_sqs] + ([] if max_exp_avg_sqs is None else [max_exp_avg_sqs])
    name = "adam" if max_exp_avg_sqs is None else "adam_amsgrad"
    hyper = (lr, *betas, eps, weight_decay, 0.0)
    _update(
        name, hyper, params, grads, states, steps, masters, grad_scale, maximize, backend
    )  # fmt: skip


@torch.no_grad()
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    steps: Tensor,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    masters: Sequence[Tensor] | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """One SGD update, as `torch.optim.SGD` makes it.

    Args:
        momentum_buffers: fp32 states, needed with `momentum`; the first update (steps 0) copies
            the gradient into them.

    The other arguments, effects and errors are those of `adamw_`.
    """
    if momentum and momentum_buffers is None:
        raise ValueError(f"momentum={momentum} needs momentum_buffers, got None")
    name = ("sgd_nesterov" if nesterov else "sgd_momentum") if momentum else "sgd"
    states = [momentum_buffers] if momentum and momentum_buffers is not None else []
    hyper = (lr, momentum, dampening, weight_decay)
    _update(
        name, hyper, params, grads, states, steps, masters, grad_scale, maximize, backend
    )  # fmt: skip
