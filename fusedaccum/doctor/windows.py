"""Checks of whole windows through `FusedAccumOptimizer`, against torch.optim in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import FusedAccumOptimizer
from . import checks
from .checks import Check, Wrong, host, normal
from .judge import Judge, Make
from .sums import short

N, MAX_NORM = 4, 1.0
WEIGHTS = (3.0, 5.0, 2.0)  # of a window that flush() closes: one fewer than N
SHAPES = ((33, 31), (1,), (8193,), (127,), (300, 257))


def adamw(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def sgd(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9)


def all_checks(device: torch.device, backend: str | None, full: bool) -> Iterator[Check]:
    """AdamW in every dtype and SGD in bf16, even, weighted and partial; a NaN window."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    makes: list[tuple[Make, torch.dtype]] = [(adamw, dtype) for dtype in dtypes]
    makes += [(sgd, dtype) for dtype in (dtypes if full else dtypes[1:2])]
    for make, dtype in makes:
        name = f"window of {N}, {make.__name__}, {short(dtype)}, clipped"
        yield Check(name, _window(device, backend, make, dtype, None))
    name = "partial window with token weights, adamw, bf16, clipped"
    yield Check(name, _window(device, backend, adamw, torch.bfloat16, WEIGHTS))
    yield Check("window with a NaN is skipped", lambda: _nan_window(device, backend))


class _Emit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        # detach() makes a tensor that nobody else holds: autograd may keep it without a copy.
        return None, *(grad.detach() for grad in ctx.grads)


def deliver(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """A backward that costs nothing and brings `grads` to `params` through AccumulateGrad."""
    _Emit.apply(grads, *params).backward()  # type: ignore[no-untyped-call]


def _params(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    made = (normal(math.prod(shape), 30).view(shape).to(device, dtype) for shape in SHAPES)
    return [param.requires_grad_() for param in made]


def _grads(device: torch.device, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Micro-gradients whose sums do not cancel: an element has the same sign in each."""
    found = []
    for shape in SHAPES:
        n = math.prod(shape)
        spread = 1 + 0.1 * normal(n, seed).clamp(-3, 3)
        found.append((normal(n, 31) * spread).view(shape).to(device, dtype))
    return found


def _wrap(params: list[Tensor], make: Make, backend: str | None) -> FusedAccumOptimizer:
    return FusedAccumOptimizer(make(params), N, max_grad_norm=MAX_NORM, backend=backend)


def _window(
    device: torch.device,
    backend: str | None,
    make: Make,
    dtype: torch.dtype,
    weights: tuple[float, ...] | None,
) -> Callable[[], None]:
    """Two windows. The second's gradients are weighted and one too few, if there are weights."""

    def run() -> None:
        params = _params(device, dtype)
        ours, judge = _wrap(params, make, backend), Judge(params, make, MAX_NORM)
        for window in range(2):
            is_weighted = weights is not None and window == 1
            own = weights if weights and is_weighted else (1.0,) * N
            means = judge.zeros()
            for i, weight in enumerate(own):
                grads = _grads(device, dtype, 40 + N * window + i)
                for mean, grad in zip(means, grads, strict=True):
                    mean += host(grad) * (weight / sum(own))
                with ours.micro_batch(weight=weight) if is_weighted else nullcontext():
                    deliver(params, grads)
                ours.step()
            ours.flush()
            norm = judge.update(means)
            assert ours.grad_norm is not None
            relative = (checks.SUM_ROUNDINGS / 2 + N + 4) * checks.U
            checks.require_number(f"norm {window}", float(ours.grad_norm), norm, relative)
            ours.zero_grad()
        kept = ours.state_dict()["state"]
        values = [kept[i].get("master_param", param) for i, param in enumerate(params)]
        # Both windows' roundings: N + 4 of the mean, which a normalised step doubles at most; those
        # of the norm, in the clip coefficient; 16 in each of two updates.
        of_mean = 2 * (N + 4) + checks.SUM_ROUNDINGS / 2
        allowed = [
            of_mean * moved + 2 * checks.STEP_ROUNDINGS * (right.detach().abs() + moved)
            for right, moved in zip(judge.exact, judge.moved, strict=True)
        ]
        judge.require(params, values, allowed)

    return run


def _nan_window(device: torch.device, backend: str | None) -> None:
    params = _params(device, torch.bfloat16)
    ours = _wrap(params, adamw, backend)

    def window(spoil: bool) -> None:
        for i in range(N):
            grads = _grads(device, torch.bfloat16, 50 + i)
            if spoil and i == 1:
                grads[2][8000] = math.nan
            deliver(params, grads)
            ours.step()
            ours.zero_grad()

    def everything() -> list[Tensor]:
        states = ours.state_dict()["state"]
        tensors = [t for i in range(len(params)) for t in states[i].values()]
        return [t.detach().clone() for t in (*params, *tensors)]

    window(spoil=False)
    before = everything()
    window(spoil=True)
    if int(ours.skipped_steps) != 1:
        raise Wrong(f"skipped_steps is {int(ours.skipped_steps)} after one window with a NaN")
    for got, old in zip(everything(), before, strict=True):
        checks.require_same("tensor of a skipped window", got, old)
    window(spoil=False)
    if all(torch.equal(p, old) for p, old in zip(params, before, strict=False)):
        raise Wrong("the window after a skipped one changed nothing")
