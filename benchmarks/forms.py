"""More ways to run a window, beside those of `fusedaccum.bench`, and the names of all in rows.

The native ones are named after how they accumulate. Other packages' optimizers sum micro-gradients
as autograd leaves them, in bf16, so none is exact; their rows carry their error and say in words
what they keep.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from fusedaccum.bench.forms import Blocks, Foreach, Native, Plain
from fusedaccum.doctor.forms import Bytes, Form, Stepwise, Wrapper
from fusedaccum.doctor.plan import Plan

from .ours import Assigned, Operations

Tensors = list[Tensor]


def adamw(plan: Plan) -> dict[str, Any]:
    """Arguments of any package's AdamW."""
    group = plan.group()
    return {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}


class PerTensorAdd(Foreach):
    """One `add_(grad, alpha=1/N)` per tensor."""

    name = "per_tensor_add"

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        for acc, grad in zip(self.accs, grads, strict=True):
            acc.add_(grad, alpha=1 / self.plan.n)


class CastAdd(Foreach):
    """`add_(grad.float())`: what most training scripts do. The copy is written and read again."""

    name = "cast_add"

    @classmethod
    def bytes(cls, plan: Plan, like: Tensor) -> Bytes:
        moved = super().bytes(plan, like)
        return replace(moved, first=moved.first + 8, later=moved.later + 8)

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        for acc, grad in zip(self.accs, grads, strict=True):
            acc.add_(grad.float(), alpha=1 / self.plan.n)


# --- torch.compile ---


def _first(accs: Tensors, grads: Tensors, scale: float) -> None:
    torch._foreach_copy_(accs, grads)
    torch._foreach_mul_(accs, scale)


def _later(accs: Tensors, grads: Tensors, scale: float) -> None:
    torch._foreach_add_(accs, grads, alpha=scale)


def _adamw(
    params: Tensors,
    masters: Tensors,
    accs: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    scalars: Tensor,  # clip coefficient, step size, 1 / sqrt(bias correction 2), decay
    weight1: float,
    beta2: float,
    eps: float,
) -> None:
    coef, step_size, inv_sqrt_correction2, decay = scalars.unbind()
    grads = torch._foreach_mul(accs, coef)
    torch._foreach_lerp_(exp_avgs, grads, weight1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denoms = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_mul_(denoms, inv_sqrt_correction2)
    torch._foreach_add_(denoms, eps)
    updates = torch._foreach_div(exp_avgs, denoms)
    torch._foreach_mul_(updates, step_size)
    torch._foreach_mul_(masters, decay)
    torch._foreach_sub_(masters, updates)
    torch._foreach_copy_(params, masters)


class Compiled(Stepwise):
    """Loops by torch.compile: an accumulation, and a step that clips, updates and casts in one.

    On CUDA all tensors in one call, which Inductor joins into few kernels. On a CPU tensor by
    tensor, compiled once for any size: one call over GPT-2's 148 tensors took 32 s to compile (the
    step 48 s; Xeon, 2 cores, 2026-11-22).
    """

    name = "compiled"

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        super().__init__(params, plan)
        self.masters = [p.detach().float() for p in params]
        self.accs, self.exp_avgs, self.exp_avg_sqs = (
            [torch.zeros_like(m) for m in self.masters] for _ in range(3)
        )
        self.steps = torch.zeros((), dtype=torch.float64, device=params[0].device)
        self.together = params[0].is_cuda
        # An error, and no silent return to eager, where too many sizes would be compiled. Imported
        # here because it takes a second.
        from torch import _dynamo

        _dynamo.config.fail_on_recompile_limit_hit = True
        compiled: list[Callable[..., None]] = [
            torch.compile(function, dynamic=not self.together)
            for function in (_first, _later, _adamw)
        ]
        self.first, self.later, self.adamw = compiled

    @classmethod
    def bytes(cls, plan: Plan, like: Tensor) -> Bytes:
        return Bytes(kept=18, first=6, later=10, norm=4, clip=0, step=30)

    def call(self, function: Callable[..., None], *lists: Sequence[Tensor], rest: Any) -> None:
        """`function` on whole lists, or on each tensor, flat."""
        flat = [[t.detach().view(-1) for t in tensors] for tensors in lists]
        if self.together:
            function(*flat, *rest)
            return
        for tensors in zip(*flat, strict=True):
            function(*([t] for t in tensors), *rest)

    @torch.no_grad()
    def add(self, grads: Sequence[Tensor], index: int) -> None:
        function = self.first if index == 0 else self.later
        self.call(function, self.accs, grads, rest=(1 / self.plan.n,))

    def step(self) -> None:
        self.step_by(torch.ones_like(self.steps))

    @torch.no_grad()
    def update(self) -> None:
        coef = torch.ones_like(self.steps)
        if self.plan.max_norm is not None:
            norm = get_total_norm(self.accs)
            coef = (self.plan.max_norm / (norm + 1e-6)).clamp(max=1.0).double()
        self.step_by(coef)

    @torch.no_grad()
    def step_by(self, coef: Tensor) -> None:
        """The step on gradients times `coef`."""
        options = adamw(self.plan)
        lr, (beta1, beta2) = options["lr"], options["betas"]
        # On the device, so that nothing waits and a new number compiles nothing.
        self.steps += 1
        numbers = (
            coef,
            lr / (1 - beta1**self.steps),
            (1 - beta2**self.steps).rsqrt(),
            torch.full_like(self.steps, 1 - lr * options["weight_decay"]),
        )
        lists = (self.params, self.masters, self.accs, self.exp_avgs, self.exp_avg_sqs)
        rest = (torch.stack(numbers).float(), 1 - beta1, beta2, options["eps"])
        self.call(self.adamw, *lists, rest=rest)

    def grads(self) -> list[Tensor]:
        return self.accs

    def values(self) -> list[Tensor]:
        return self.masters


# --- other packages ---


class Missing(RuntimeError):
    """A rival that this machine cannot run: not installed, or for another device."""


def imported(package: str) -> Any:
    """The package.

    Raises:
        Missing: where it is not installed, or does not import.
    """
    try:
        with warnings.catch_warnings():  # deprecations of theirs
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except Exception as error:
        raise Missing(f"{package} cannot be imported ({error})") from error


class Rival(Plain):
    """Another package's AdamW.

    Attributes:
        kept, moved: bytes per element that it keeps, and that its step moves.
    """

    kept: ClassVar[int]
    moved: ClassVar[int]

    @classmethod
    def bytes(cls, plan: Plan, like: Tensor) -> Bytes:
        return replace(super().bytes(plan, like), kept=cls.kept, step=cls.moved)


class OptimiKahan(Rival):
    """torch-optimi's AdamW: bf16 states, and what rounding lost in a third (Kahan summation)."""

    name = "optimi_kahan"
    precision = "bf16 sum, bf16 states, bf16 parameters with Kahan compensation"
    kept, moved = 12, 18

    def make(self, plan: Plan) -> torch.optim.Optimizer:
        kind: type[torch.optim.Optimizer] = imported("optimi").AdamW
        return kind(self.params, kahan_sum=True, **adamw(plan))  # type: ignore[call-arg]

    def values(self) -> list[Tensor]:
        lost = (self.optimizer.state[p]["kahan_comp"] for p in self.params)
        return [p.detach().float() + c.float() for p, c in zip(self.params, lost, strict=True)]


class FlashOptim24(Rival):
    """flashoptim's FlashAdamW as it comes: 24-bit masters, 8-bit states."""

    name = "flashoptim_24"
    precision = "bf16 sum, 8-bit states, 24-bit masters"
    kept, moved = 8, 12

    def make(self, plan: Plan) -> torch.optim.Optimizer:
        if not self.params[0].is_cuda:
            raise Missing("flashoptim's 24-bit masters and 8-bit states need a CUDA GPU")
        kind: type[torch.optim.Optimizer] = imported("flashoptim").FlashAdamW
        return kind(self.params, **adamw(plan))

    def values(self) -> list[Tensor]:
        join = imported("flashoptim").reconstruct_fp32_param
        state = self.optimizer.state
        return [join(p.detach(), state[p]["error_bits"]) for p in self.params]


# Ours, then the best known native form first, those that are inexact last.
FORMS: dict[str, type[Form]] = {
    kind.name: kind
    for kind in (
        *(Operations, Wrapper, Assigned, Native, PerTensorAdd, Foreach, CastAdd, Blocks, Compiled),
        *(Plain, OptimiKahan, FlashOptim24),
    )
}


def is_exact(variant: str) -> bool:
    """Whether a variant of that name sums in fp32; one that is no form does."""
    form = FORMS.get(variant)
    return form is None or form.is_exact
