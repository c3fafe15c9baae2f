"""A form is timed only after it agreed with float64; one that claims no exactness shows its error.

The mean gradient is compared with the exact one, and the updates with the optimizer run in float64
on the form's own gradients, so that no cancellation of theirs is held against it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..doctor.checks import U, Wrong, host
from ..doctor.judge import Judge
from .forms import Form, Plan, build

# Primes, one element, a chunk of 8,192 and its neighbours, and one that takes all threads.
SHAPES = ((524, 131), (1,), (17,), (127, 129), (8191,), (8192,), (8193,))
# The sum of 8 terms in fp32 is off by a few u of its largest partial sum; of many, by more.
GRAD_ROUNDINGS_PER_MICRO_BATCH = 2
# Two updates of an fp32 implementation, of fewer than 16 roundings each, that may keep its bias
# corrections and its clip coefficient in fp32.
UPDATE_ROUNDINGS = 64
# Large, so that a wrong update stands out from the rounding of the parameter.
LR = 0.1


@dataclass(frozen=True)
class Gate:
    """What a form got wrong.

    Attributes:
        grad_error: relative L2 error of the mean gradient.
        update_error: relative L2 error of what two updates changed.
        seconds: what the check took, with whatever had to be compiled.
    """

    grad_error: float
    update_error: float
    seconds: float = 0.0


def gate(
    kind: type[Form], plan: Plan, like: Tensor, shapes: Sequence[Sequence[int]] = SHAPES
) -> Gate:
    """Check whole windows, and the single operations, two of each; the second time with unaligned
    gradients.

    Args:
        kind: a form.
        plan: the plan, but for its rate.
        like: dtype and device.
        shapes: of the parameters.

    Raises:
        Wrong: if a form that claims to be exact is not.
    """
    began = time.perf_counter()
    plan = replace(plan, lr=LR)
    ways = (True, False) if kind.has_operations else (True,)
    found = [_gate(kind, plan, like, shapes, is_whole) for is_whole in ways]
    return Gate(
        max(g.grad_error for g in found),
        max(g.update_error for g in found),
        time.perf_counter() - began,
    )


def _gate(
    kind: type[Form],
    plan: Plan,
    like: Tensor,
    shapes: Sequence[Sequence[int]],
    is_whole: bool,
) -> Gate:
    start = random(shapes, like.dtype, like.device, seed=60)
    (form,) = build([kind], start, plan)
    judge = Judge(start, plan.plain, plan.max_norm if is_whole else None)
    n = 1 if form.loss_is_divided else plan.n
    for window in range(2):
        means = judge.zeros()
        for index in range(plan.n):
            seed = 61 + window * plan.n + index
            grads = random(shapes, like.dtype, like.device, seed=seed, offset=window)
            if form.loss_is_divided:
                for grad in grads:
                    grad /= plan.n
            for mean, grad in zip(means, grads, strict=True):
                mean += host(grad) / n
            if is_whole:
                form.micro_batch(grads, index)
            elif 0 < index == plan.n - 1:
                form.add_last(grads)
            else:
                form.add(grads, index)
        judge.update(means, form.grads())
        (form.update if is_whole else form.step)()
    if form.is_exact:
        require_exact(judge, form.params, form.values(), plan)
    return Gate(judge.grad_error, judge.update_error(form.values()))


def require_exact(
    judge: Judge, params: Sequence[Tensor], values: Sequence[Tensor], plan: Plan, noise: float = 0.0
) -> None:
    """Raise if what claims to be exact is off.

    Args:
        params, values: of a form or a training loop; see `Form.values`.
        noise: relative error that the gradients themselves have from one run to the next.
    """
    allowed = GRAD_ROUNDINGS_PER_MICRO_BATCH * (plan.n + 4) * U + noise
    if not judge.grad_error <= allowed:  # so that NaN is refused
        raise Wrong(f"mean gradient off by {judge.grad_error:.1e} (allowed {allowed:.1e})")
    bounds = [
        UPDATE_ROUNDINGS * (right.detach().abs() + change.abs() + plan.lr)
        for right, change in zip(judge.exact, judge.changes(), strict=True)
    ]
    judge.require(params, values, bounds)


def random(
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int,
    std: float = 1.0,
    offset: int = 0,
) -> list[Tensor]:
    """Normal tensors of these shapes; each starts `offset` elements into its own memory.

    With an offset of 1 they are contiguous and misaligned, as views of other tensors can be.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensors = []
    for shape in shapes:
        memory = torch.empty(offset + math.prod(shape), dtype=dtype, device=device)
        tensors.append(memory.normal_(std=std, generator=generator)[offset:].view(*shape))
    return tensors


def is_finite(form: Form) -> bool:
    """Whether neither parameters nor accumulators hold NaN or Inf: a form that skipped its updates
    would have been fast by that."""
    return all(bool(t.isfinite().all()) for t in (*form.params, *form.grads()))
