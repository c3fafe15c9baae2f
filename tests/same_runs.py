"""What it means that two training runs are the same.

Two fp32 runs of some dozen updates. Forward and backward are the same code, and fp32 accumulation
adds the same numbers in the same order, so the runs differ by the roundings of the update alone:
at most STEP_ROUNDINGS u (|param| + |step|) per update and element (see tolerances.py). How far
training carries such differences no formula says, so it is measured: the *nudged* run is the same
loop with the plain optimizer, each parameter moved at random by up to that bound after each update.
A run is the same as the plain one if it ends no farther from it than the nudged one does.

A logged loss or norm has roundings of its own beside those of the parameters: the last few sums of
the forward, the sum over N micro-batches, the division. CURVE_ROUNDINGS u of its value are granted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.tolerances import STEP_ROUNDINGS, U, equal_bits

CURVE_ROUNDINGS = 16


class Nudged(torch.optim.AdamW):
    """AdamW whose every update is off by a random part of what rounding may do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        all_params = [p for group in self.param_groups for p in group["params"]]
        params = [p.to_local() if isinstance(p, DTensor) else p for p in all_params]
        before = [p.clone() for p in params]
        super().step(closure)
        n_steps = sum(int(self.state[p]["step"]) for p in all_params)
        generator = torch.Generator().manual_seed(n_steps)
        for p, old in zip(params, before, strict=True):
            direction = 2 * torch.rand(p.shape, generator=generator) - 1
            p += direction * STEP_ROUNDINGS * U * (p.abs() + (p - old).abs())


@dataclass
class Run:
    """What a run leaves: the model, and per update the loss, gradient norm and learning rate."""

    model: Any
    optimizer: Any
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, of which this process has a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(a: Any, b: Any) -> float:
    """L2 distance of two models' parameters."""
    params = ([whole(p).detach().double() for p in model.parameters()] for model in (a, b))
    pairs = zip(*params, strict=True)
    return math.sqrt(sum(float((p - q).square().sum()) for p, q in pairs))


def are_equal(a: Any, b: Any) -> bool:
    """Whether two models' parameters are the same to the bit."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(equal_bits(p.detach(), q.detach()) for p, q in pairs)


def farthest(a: list[float], b: list[float]) -> float:
    """Largest difference of two curves."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def differences(run: Run, plain: Run, nudged: Run) -> list[str]:
    """In what `run` is not the same as `plain`; empty if it is. See the top of this file."""
    found = []
    allowed, is_off = distance(nudged.model, plain.model), distance(run.model, plain.model)
    if not is_off <= allowed:
        found.append(f"parameters are {is_off:.1e} apart, allowed {allowed:.1e}")
    for name in ("losses", "norms"):
        curve, curve_plain, curve_nudged = (getattr(r, name) for r in (run, plain, nudged))
        allowed = farthest(curve_nudged, curve_plain) + CURVE_ROUNDINGS * U * max(curve_plain)
        is_off = farthest(curve, curve_plain)
        if not is_off <= allowed:
            found.append(f"{name} are {is_off:.1e} apart, allowed {allowed:.1e}")
    if run.rates != plain.rates:
        found.append(f"learning rates {run.rates[:3]}... and {plain.rates[:3]}...")
    return found
