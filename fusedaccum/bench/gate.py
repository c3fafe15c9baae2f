"""A form is timed only after it agreed with float64; one that claims no exactness shows its error.

The mean gradient is compared with the exact one, and the updates with the optimizer run in float64
on the form's own gradients, so that no cancellation of theirs is held against it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ..doctor.checks import U, Wrong, host, normal
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
    start = random(shapes, like, seed=60)
    (form,) = build([kind], start, plan)
    exact = [host(p).requires_grad_() for p in start]
    optimizer = plan.plain(exact)
    grad_error = 0.0
    for window in range(2):
        means = [torch.zeros_like(p) for p in exact]
        for index in range(plan.n):
            seed = 61 + window * plan.n + index
            grads = random(shapes, like, seed=seed, offset=window)
            if form.loss_is_divided:
                for grad in grads:
                    grad /= plan.n
            for mean, grad in zip(means, grads, strict=True):
                mean += host(grad) / (1 if form.loss_is_divided else plan.n)
            if is_whole:
                form.micro_batch(grads, index)
            elif 0 < index == plan.n - 1:
                form.add_last(grads)
            else:
                form.add(grads, index)
        own = [host(grad) for grad in form.grads()]
        grad_error = max(grad_error, _relative(own, means, means))
        for param, grad in zip(exact, own, strict=True):
            param.grad = grad
        if is_whole:
            if plan.max_norm is not None:
                clip_grad_norm_(exact, plan.max_norm)
            form.update()
        else:
            form.step()
        optimizer.step()
    kept = [host(value) for value in form.values()]
    right = [p.detach() for p in exact]
    moved = [p - host(old) for p, old in zip(right, start, strict=True)]
    found = Gate(grad_error, _relative(kept, right, moved))
    if form.is_exact:
        _require_exact(form, plan, found, kept, right, moved)
    return found


def _require_exact(
    form: Form,
    plan: Plan,
    found: Gate,
    kept: Sequence[Tensor],
    right: Sequence[Tensor],
    moved: Sequence[Tensor],
) -> None:
    """Raise if the form is off; negated comparisons, so that NaN is refused."""
    allowed = GRAD_ROUNDINGS_PER_MICRO_BATCH * (plan.n + 4) * U
    if not found.grad_error <= allowed:
        raise Wrong(f"mean gradient off by {found.grad_error:.1e} (allowed {allowed:.1e})")
    for param, value, wanted, change in zip(form.params, kept, right, moved, strict=True):
        off = (value - wanted).abs()
        bound = UPDATE_ROUNDINGS * U * (wanted.abs() + change.abs() + plan.lr)
        if not bool((off <= bound).all()):
            worst = int((off / bound).nan_to_num(nan=torch.inf).argmax())
            raise Wrong(
                f"parameter off by {float(off.flatten()[worst]):.1e} after two updates (allowed "
                f"{float(bound.flatten()[worst]):.1e}), where it moved by "
                f"{float(change.abs().flatten()[worst]):.1e}"
            )
        half = torch.finfo(param.dtype).eps / 2 * 1.01 * value.abs() + 2.0**-25
        if not bool(((host(param) - value).abs() <= half).all()):
            raise Wrong("parameter is not its precise value rounded")


def _relative(got: Sequence[Tensor], right: Sequence[Tensor], of: Sequence[Tensor]) -> float:
    """L2 norm of got - right, relative to that of `of`."""
    differences = [a - b for a, b in zip(got, right, strict=True)]
    return _norm(differences) / _norm(of)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.square().sum() for t in tensors]).sum().sqrt())


def random(
    shapes: Sequence[Sequence[int]], like: Tensor, *, seed: int, offset: int = 0
) -> list[Tensor]:
    """Normal tensors; each starts `offset` elements into its own memory."""
    found = []
    for shape in shapes:
        n = torch.Size(shape).numel()
        memory = torch.empty(offset + n, dtype=like.dtype, device=like.device)
        memory[offset:].copy_(normal(n, seed))
        found.append(memory[offset:].view(*shape))
    return found


def is_finite(form: Form) -> bool:
    """Whether neither parameters nor accumulators hold NaN or Inf: a form that skipped its updates
    would have been fast by that."""
    return all(bool(t.isfinite().all()) for t in (*form.params, *form.grads()))
