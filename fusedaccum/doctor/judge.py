"""torch.optim in float64, beside something that accumulates and steps in its own way.

The mean gradient is compared with the exact one, and the updates with the optimizer run in float64
on the own gradients of what is judged, so that no cancellation of theirs is held against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from .checks import STEP_ROUNDINGS, SUM_ROUNDINGS, U, Wrong, host, require_close, require_number
from .forms import Form
from .plan import Plan

# Primes, one element, a chunk of 8,192 and its neighbours, and one that takes all threads.
SHAPES = ((524, 131), (1,), (17,), (127, 129), (8191,), (8192,), (8193,))
# The sum of 8 terms in fp32 is off by a few u of its largest partial sum; of many, by more.
GRAD_ROUNDINGS_PER_MICRO_BATCH = 2
# Two updates of an fp32 implementation, of fewer than 16 roundings each, that may keep its bias
# corrections and its clip coefficient in fp32.
UPDATE_ROUNDINGS = 64
# Large, so that a wrong update stands out from the rounding of the parameter.
LR = 0.1


class Judge:
    """The exact parameters.

    Args:
        params: where they start.
        plan: makes the optimizer.
        clips: whether it clips as the plan says.

    Attributes:
        exact: the parameters, float64, on the CPU.
        moved: how far all updates moved each element, back and forth.
        grad_error: relative L2 error of the mean gradient, the largest of all windows.
    """

    def __init__(self, params: Sequence[Tensor], plan: Plan, *, clips: bool = True) -> None:
        self.plan = plan
        self.exact = [host(p).requires_grad_() for p in params]
        self.start = [p.detach().clone() for p in self.exact]
        self.moved = self.zeros()
        self.optimizer = plan.plain(self.exact)
        self.max_norm = plan.max_norm if clips and plan.max_norm is not None else torch.inf
        self.grad_error = 0.0

    def zeros(self) -> list[Tensor]:
        """For the mean gradient of a window."""
        return [torch.zeros_like(p) for p in self.start]

    def update(self, means: Sequence[Tensor], own: Sequence[Tensor] | None = None) -> float:
        """Clip and step.

        Args:
            means: the mean gradient of the window.
            own: the same as it was accumulated. It is judged here, and the step is made by it.
                None: by `means`.

        Returns:
            The norm.
        """
        grads = means if own is None else [host(grad) for grad in own]
        self.grad_error = max(self.grad_error, relative(grads, means, means))
        for param, grad in zip(self.exact, grads, strict=True):
            param.grad = grad
        norm = float(clip_grad_norm_(self.exact, self.max_norm))
        before = [p.detach().clone() for p in self.exact]
        self.optimizer.step()
        for total, new, old in zip(self.moved, self.exact, before, strict=True):
            total += (new.detach() - old).abs()
        return norm

    def update_error(self, trained: Any) -> float:
        """Relative L2 error of what all updates of a form, or of a training loop, changed."""
        exact = [p.detach() for p in self.exact]
        changes = [new - old for new, old in zip(exact, self.start, strict=True)]
        return relative([host(value) for value in trained.values()], exact, changes)

    def require_exact(self, trained: Any, noise: float = 0.0, *, is_ours: bool = False) -> None:
        """Raise if what claims to be exact is off.

        Args:
            trained: a form, or a training loop: it has `params`, and their precise `values()`.
            noise: relative error that the gradients themselves have from one run to the next.
            is_ours: whether it is held to what the wrapper promises.
        """
        allowed = GRAD_ROUNDINGS_PER_MICRO_BATCH * (self.plan.n + 4) * U + noise
        if not self.grad_error <= allowed:  # so that NaN is refused
            raise Wrong(f"mean gradient off by {self.grad_error:.1e} (allowed {allowed:.1e})")
        # Both windows' roundings: N + 4 of the mean, which a normalised step doubles at most; those
        # of the norm, in the clip coefficient.
        of_mean = 2 * (self.plan.n + 4) + SUM_ROUNDINGS / 2
        everything = zip(
            trained.params, trained.values(), self.exact, self.start, self.moved, strict=True
        )
        for param, value, exact, start, moved in everything:
            right, got = exact.detach(), host(value)
            if is_ours:
                bound = of_mean * moved + 2 * STEP_ROUNDINGS * (right.abs() + moved)
            else:
                bound = UPDATE_ROUNDINGS * (right.abs() + (right - start).abs() + self.plan.lr)
            require_close("precise parameter", got, right, U * bound)
            # A split master's parameter is the nearest too, but a tie goes up and not to even.
            half = torch.finfo(param.dtype).eps / 2 * 1.01 * got.abs() + 2.0**-25
            require_close("parameter", host(param), got, half)


def judge(
    kind: type[Form],
    plan: Plan,
    like: Tensor,
    shapes: Sequence[Sequence[int]] = SHAPES,
    *,
    stepwise: bool = False,
    is_ours: bool = False,
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """Run two windows of a form, the second one with unaligned gradients.

    Args:
        plan: the plan, but for its rate.
        like: dtype and device.
        shapes: of the parameters.
        stepwise: by the form's single operations, without clipping.
        is_ours: see `Judge.require_exact`.
        weights: of a window's micro-batches, which the form knows too; None: they are equal.

    Returns:
        Relative L2 errors: of the mean gradient, and of what the updates changed.

    Raises:
        Wrong: if a form that claims to be exact is not.
    """
    plan = replace(plan, lr=LR)
    start = random(shapes, like.dtype, like.device, seed=60)
    form: Any = kind(start, plan)
    judge = Judge(start, plan, clips=not stepwise)
    own = [1.0] * plan.n if weights is None else weights
    shares = [weight / sum(own) for weight in own]
    for window in range(2):
        means = judge.zeros()
        for index in range(plan.n):
            seed = 61 + window * plan.n + index
            grads = random(shapes, like.dtype, like.device, seed=seed, offset=window)
            if form.loss_is_divided:
                torch._foreach_div_(grads, plan.n)
            for mean, grad in zip(means, grads, strict=True):
                mean += host(grad) * (1 if form.loss_is_divided else shares[index])
            if not stepwise:
                form.micro_batch(grads, index)
            elif 0 < index == plan.n - 1:
                form.add_last(grads)
            else:
                form.add(grads, index)
        right = judge.update(means, form.grads())
        (form.step if stepwise else form.update)()
        if (norm := form.norm()) is not None:
            require_number("norm", norm, right, (SUM_ROUNDINGS / 2 + plan.n + 4) * U)
    if form.is_exact:
        judge.require_exact(form, is_ours=is_ours)
    return judge.grad_error, judge.update_error(form)


def relative(got: Sequence[Tensor], right: Sequence[Tensor], of: Sequence[Tensor]) -> float:
    """L2 norm of got - right, relative to that of `of`."""
    return _norm([a - b for a, b in zip(got, right, strict=True)]) / _norm(of)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.square().sum() for t in tensors]).sum().sqrt())


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
