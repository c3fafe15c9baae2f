"""The other half of the specification: parameters, masters and the plain optimizer, in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.walk.numbers import NORM_RTOL, OPTIMIZERS, ROUNDINGS, TINY, U, half_step, unsure

Pair = tuple[Tensor, Tensor]  # a gradient and its largest error


@dataclass
class Param:
    """One parameter.

    Attributes:
        exact: its precise value, in float64 (in its own dtype where the wrapped optimizer steps
            the bf16 or fp16 parameter itself).
        kind: "split", "fp32", "none" or "stochastic": how the precise value is kept.
        error: largest difference of the precise value.
        drift: largest difference that the optimizer's states still bring in, per update.
        moved: whether the last call may have changed it.
        blur: largest error that it has had: what decay has put into states.
        hides_remainder: whether a zero or a number that is not finite was written over a split
            master, whose remainder counts again when another value is written.
        momentum_error: largest difference of Lion's momentum.
        origin: of an fp32 master, what showed before anybody wrote the parameter, with the precise
            value and its error then: where that shows again, the master is still there.
    """

    exact: torch.nn.Parameter
    dtype: torch.dtype
    kind: str
    needs_grad: bool
    error: Tensor
    drift: Tensor
    moved: bool = False
    blur: float = 0.0
    hides_remainder: bool = False
    momentum_error: Tensor | None = None
    origin: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def value(self) -> Tensor:
        return self.exact.detach().double()

    @property
    def has_master(self) -> bool:
        return self.kind in ("split", "fp32")

    def rounding(self) -> Tensor:
        """How far what shows may be from the precise value."""
        if self.dtype == torch.float32:
            return torch.zeros_like(self.value)
        once = half_step(self.value, self.dtype)
        # The native step of a bf16 parameter without a master rounds its states too.
        return once * {"stochastic": 2.01, "native": 12}.get(self.kind, 1.0)


def _finite(error: Tensor) -> Tensor:
    return error.nan_to_num(0.0, 0.0, 0.0)


def master_kind(mode: str | None, dtype: torch.dtype, stochastic: bool, is_fused: bool) -> str:
    """How README and docstring say that a parameter's precise value is kept."""
    if dtype == torch.float32:
        return "none"
    if mode == "none":
        if not is_fused:
            return "native"
        return "stochastic" if stochastic and dtype == torch.bfloat16 else "none"
    if dtype == torch.float16 or mode == "fp32" or not is_fused:
        return "fp32"
    return "split"


class Update:
    """Args:
    kind: the name of the optimizer.
    params: the parameters.
    layout: their indices, for each param group.
    options: of the optimizer.
    """

    def __init__(
        self, kind: str, params: list[Param], layout: list[list[int]], options: dict[str, Any]
    ) -> None:
        self.kind, self.params, self.layout = kind, params, layout
        groups = [{"params": [params[i].exact for i in indices]} for indices in layout]
        self.plain = OPTIMIZERS[kind].cls(groups, **options)
        self.skipped = 0
        self.norm: Pair | None = None  # grad_norm and its error
        self.norm_is_known = True
        self.returned: Pair | None = None  # of clip_grad_norm_
        self.n_updates = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Update:
        """torch's own copy of an optimizer loses what a subclass keeps (Lion's options)."""
        new = copy.copy(self)
        memo[id(self)] = new
        new.params = copy.deepcopy(self.params, memo)
        new.layout = copy.deepcopy(self.layout)
        exact = {a.exact: b.exact for a, b in zip(self.params, new.params, strict=True)}
        groups = [
            {**group, "params": [exact[p] for p in group["params"]]}
            for group in self.plain.param_groups
        ]
        new.plain = OPTIMIZERS[self.kind].cls([{"params": g["params"]} for g in groups], lr=1.0)
        new.plain.param_groups, new.plain.defaults = groups, self.plain.defaults
        new.plain.state.clear()  # Adagrad's constructor makes states
        new.plain.state.update({exact[p]: copy.deepcopy(s) for p, s in self.plain.state.items()})
        return new

    @property
    def is_fused(self) -> bool:
        return OPTIMIZERS[self.kind].is_fused

    @staticmethod
    def norm_of(grads: list[Pair]) -> Pair:
        zero = torch.zeros((), dtype=torch.float64)
        norm = sum((g.square().sum() for g, _ in grads), zero).sqrt()
        error = sum((e.square().sum() for _, e in grads), zero).sqrt()
        return norm, error + NORM_RTOL * norm + TINY

    def set_returned(self, grads: list[Pair]) -> None:
        self.returned = self.norm_of(grads)

    def torch_clip(self, grads: list[Pair], max_norm: float) -> tuple[Tensor, float]:
        """The factor, and its relative error."""
        norm, _ = self.returned = self.norm_of(grads)
        return (max_norm / (norm + 1e-6)).clamp(max=1.0), 2 * NORM_RTOL

    def run(
        self, grads: list[Pair | None], max_norm: float | None, skip: bool, overflow: bool
    ) -> None:
        """One update with the mean gradients; None: the parameter is not touched.

        `overflow`: whether a scaled micro-batch was not finite, which skips it.
        """
        there = [pair for pair in grads if pair is not None]
        if not there:
            return
        coef, relative = torch.ones((), dtype=torch.float64), 0.0
        self.norm_is_known = True
        norm, error = self.norm_of(there)
        norm = norm * torch.nan if overflow else norm
        if not self.is_fused:  # a step of another package reads the masters before the skip
            self.forget_origins(grads)
        self.norm = (norm, error) if skip or max_norm is not None else None
        if skip and not bool(norm.isfinite()):
            self.skipped += 1
            return
        if max_norm is not None:
            coef, relative = (max_norm / (norm + 1e-6)).clamp(max=1.0), 2 * NORM_RTOL
        self.n_updates += 1
        before = [param.value.clone() for param in self.params]
        jumps: dict[int, Tensor] = {}
        errors: dict[int, Tensor] = {}
        for indices, group in zip(self.layout, self.plain.param_groups, strict=True):
            for i in indices:
                param, pair = self.params[i], grads[i]
                if pair is None:
                    param.exact.grad = None
                    continue
                grad = pair[0] * coef
                errors[i] = pair[1] * coef + grad.abs() * relative
                state = self.plain.state.get(param.exact, {})
                if param.momentum_error is None:
                    param.momentum_error = torch.zeros_like(errors[i])
                inexact = errors[i], param.momentum_error
                jumps[i], param.momentum_error = unsure(self.kind, group, state, grad, inexact)
                errors[i] = errors[i] * OPTIMIZERS[self.kind].sensitivity(group)
                param.exact.grad = grad.to(param.exact.dtype)
        _start(self.plain)
        self.plain.step()
        self.forget_origins(grads)
        for i, error in errors.items():
            param = self.params[i]
            if self.kind in ("adafactor", "muon") and error.numel():
                error = error.max().expand_as(error)  # what each element does moves all of them
            moved = (param.value - before[i]).abs()
            param.drift = _finite(param.drift + error + ROUNDINGS * U * moved)
            rounded = ROUNDINGS * U * (before[i].abs() + 2 * moved) + TINY
            param.error = _finite(param.error + rounded + param.drift + jumps[i])
            param.moved, param.hides_remainder = True, False

    # --- somebody writes ---

    def write(self, index: int, written: Tensor, shown: Tensor) -> None:
        """`written` (in the parameter's dtype) takes the place of `shown`."""
        param = self.params[index]
        if param.kind == "fp32":
            param.origin = param.origin or (shown.clone(), param.value.clone(), param.error)
            differs = written != param.origin[0]
            param.exact.data.copy_(param.origin[1])
            param.error = param.origin[2]
        else:
            differs = written != shown
        new = torch.where(differs, written.double(), param.value)
        error = torch.where(differs, torch.zeros_like(param.error), param.error)
        if param.kind == "split":
            param.hides_remainder |= bool(((written == 0) | ~written.isfinite()).any())
            # It keeps its remainder.
            error = torch.where(differs, half_step(new, param.dtype), error)
            self.stand_off(index, error)
        param.exact.data.copy_(new)
        param.error, param.moved = error, True

    def stand_off(self, index: int, error: Tensor) -> None:
        """A master may differ by so much from now on, which decay, or a copy, puts into states."""
        param = self.params[index]
        group = next(
            g for part, g in zip(self.layout, self.plain.param_groups, strict=True) if index in part
        )
        share = group.get("weight_decay", 0.0) * OPTIMIZERS[self.kind].sensitivity(group)
        param.error, param.drift = error, param.drift + share * error
        param.blur = max(param.blur, float(error.max()) if error.numel() else 0.0)

    def forget_origins(self, grads: list[Pair | None] | None = None) -> None:
        """What shows now is what the masters are of: of all, or of those with a gradient."""
        for param, pair in zip(self.params, grads or self.params, strict=True):
            if pair is not None:
                param.origin = None

    def believe(self, index: int, value: Tensor) -> None:
        """Take a value that has been compared as the exact one, so that errors do not add up."""
        param = self.params[index]
        param.exact.data.copy_(value)
        param.error = torch.zeros_like(param.error)


def _start(plain: torch.optim.Optimizer) -> None:
    """Make states where they were cleared: Adagrad of torch < 2.13 does so in its constructor."""
    if isinstance(plain, torch.optim.Adagrad):
        for group in plain.param_groups:
            for param in group["params"]:
                if param.grad is not None and "sum" not in plain.state[param]:
                    start = group["initial_accumulator_value"]
                    sums = torch.full_like(param, start, requires_grad=False)
                    plain.state[param] = {"step": torch.tensor(0.0), "sum": sums}
