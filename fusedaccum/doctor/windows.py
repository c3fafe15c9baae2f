"""Checks of whole windows through `FusedAccumOptimizer`, against torch.optim in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import FusedAccumOptimizer
from . import checks
from .checks import Check, Wrong, short
from .forms import Wrapper
from .judge import SHAPES, judge, random
from .plan import OPTIMIZERS, Plan

BF16 = torch.bfloat16
N = 4
WEIGHTS = (3.0, 5.0, 2.0)  # of a window that flush() closes: one fewer than N


class Partial(Wrapper):
    """Windows of weighted micro-batches, one fewer than announced, that flush() closes."""

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        super().__init__(params, replace(plan, n=plan.n + 1))

    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        self.begin(index)
        with self.optimizer.micro_batch(weight=WEIGHTS[index]):
            self.deliver(grads)
        self.end()

    def update(self) -> None:
        self.optimizer.flush()

    def grads(self) -> list[Tensor]:
        # Announced was the first weight, N times; the step corrects that.
        factor = N * WEIGHTS[0] / sum(WEIGHTS)
        return [grad.cpu().double() * factor for grad in super().grads()]


def all_checks(device: torch.device, backend: str | None, full: bool) -> Iterator[Check]:
    """Every optimizer in bf16, AdamW and with `full` all in every dtype; a partial window; a NaN
    window."""

    def check(optimizer: str, dtype: torch.dtype, is_partial: bool = False) -> Check:
        kind, weights = (Partial, WEIGHTS) if is_partial else (Wrapper, None)
        plan = Plan(optimizer, len(weights) if weights else N, backend=backend)
        like = torch.empty(0, dtype=dtype, device=device)
        name = "partial window with token weights" if is_partial else f"window of {N}"
        return Check(
            f"{name}, {optimizer}, {short(dtype)}, clipped",
            lambda: judge(kind, plan, like, is_ours=True, weights=weights),
        )

    for dtype in (torch.float32, BF16, torch.float16):
        for optimizer in OPTIMIZERS:
            if full or dtype == BF16 or optimizer == "adamw":
                yield check(optimizer, dtype)
    yield check("adamw", BF16, is_partial=True)
    yield Check("window with a NaN is skipped", lambda: _nan_window(device, backend))


def _nan_window(device: torch.device, backend: str | None) -> None:
    ours = Wrapper(random(SHAPES, BF16, device, seed=30), Plan(n=N, backend=backend))

    def window(spoil: bool) -> list[Tensor]:
        for index in range(ours.plan.n):
            grads = random(SHAPES, BF16, device, seed=50 + index)
            if spoil and index == 1:
                grads[-1][8000] = math.nan
            ours.micro_batch(grads, index)
        return _everything(ours.optimizer)

    before = window(spoil=False)
    for got, old in zip(window(spoil=True), before, strict=True):
        checks.require_same("tensor of a skipped window", got, old)
    if int(ours.optimizer.skipped_steps) != 1:
        raise Wrong(f"skipped_steps is {int(ours.optimizer.skipped_steps)} after one NaN window")
    if all(torch.equal(got, old) for got, old in zip(window(spoil=False), before, strict=True)):
        raise Wrong("the window after a skipped one changed nothing")


def _everything(optimizer: FusedAccumOptimizer) -> list[Tensor]:
    """Copies of parameters, masters and states."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    entries = optimizer.state_dict()["state"].values()
    states = [t for entry in entries for t in entry.values() if isinstance(t, Tensor)]
    return [t.detach().clone() for t in (*params, *states)]
