"""Ways to run one accumulation window, beside each other: the native ones of PyTorch, and ours.

A `Form` holds bf16 parameters, accumulators and AdamW's states. `micro_batch(grads, index)` takes
the index-th of N micro-batches, `update()` normalises, clips and steps. They are named after how
they accumulate; the native fp32 ones share one step: clip_grad_norm_, AdamW(fused=True) on fp32
masters, copied to the bf16 parameters with _foreach_copy_.

`moved` is how many bytes per element a form must read and write, if every tensor that one of its
calls names goes through memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from fusedaccum.bench.forms import SCRATCH, blocked_add_
from fusedaccum.doctor.windows import deliver


@dataclass(frozen=True)
class Plan:
    """What all forms share: N micro-batches per window, the optimizer's numbers, clipping."""

    n: int = 8
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float | None = 1.0
    backend: str | None = None  # fusedaccum's

    def adamw(self) -> dict[str, Any]:
        """Arguments of torch.optim.AdamW."""
        names = ("lr", "betas", "eps", "weight_decay")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Moved:
    """Bytes per element: the first micro-batch of a window, a later one, what the norm adds to the
    last one, the step, and what clipping adds to the step."""

    first: int
    later: int
    norm: int
    step: int
    clip: int

    def window(self, n: int) -> int:
        """Of a whole window with clipping."""
        return self.first + (n - 1) * self.later + self.norm + self.clip + self.step


class Form:
    """One way to run a window.

    Attributes:
        loss_is_divided: whether the training loop divides the loss by N, so that gradients arrive
            divided.
        is_exact: whether it sums in fp32; one that does not is timed with its error beside it.
        precision: what it sums in and what it steps, in words.
        moved: see `Moved`; all tensors bf16 but accumulators, masters and states, which are fp32.
        held: bytes per element that it keeps, parameters included.
    """

    loss_is_divided: ClassVar[bool] = False
    is_exact: ClassVar[bool] = True
    precision: ClassVar[str] = "fp32 sum, fp32 states, fp32 masters"
    moved: ClassVar[Moved]
    held: ClassVar[int] = 18
    plan: Plan
    params: list[Tensor]

    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        """Accumulate the gradients of the index-th micro-batch of a window."""
        raise NotImplementedError

    def norm(self) -> Tensor:
        """L2 norm of the mean gradient, after the last micro-batch."""
        return get_total_norm(self.mean_grads())

    def update(self) -> None:
        """Clip and step."""
        raise NotImplementedError

    def mean_grads(self) -> list[Tensor]:
        """What the window accumulated, as it is, after the last micro-batch."""
        raise NotImplementedError

    def values(self) -> list[Tensor]:
        """The parameters as precisely as they are kept."""
        raise NotImplementedError

    def window(self, grads: Sequence[Tensor]) -> None:
        """A whole window with the same gradients N times."""
        for index in range(self.plan.n):
            self.micro_batch(grads, index)
        self.update()


def leaves(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies that can be trained."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


# --- native forms that sum in fp32 ---


class Masters:
    """What those forms share; one may serve several of them, run one after the other."""

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        self.params = leaves(params)
        # fp32 parameters are their own masters.
        is_fp32 = params[0].dtype == torch.float32
        self.masters = self.params if is_fp32 else leaves(p.float() for p in params)
        self.accs = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        for param, master, acc in zip(self.params, self.masters, self.accs, strict=True):
            param.grad_dtype = None  # since torch 2.10: a gradient may have another dtype
            param.grad = master.grad = acc
        self.optimizer = torch.optim.AdamW(self.masters, fused=True, **plan.adamw())


class NativeForm(Form):
    """Clip, fused AdamW on the masters, copy to the parameters; the first micro-batch zeroes."""

    moved = Moved(first=14, later=10, norm=4, step=34, clip=8)

    def __init__(self, params: Sequence[Tensor], plan: Plan, shared: Masters | None = None) -> None:
        self.plan, self.shared = plan, shared or Masters(params, plan)
        self.params, self.accs = self.shared.params, self.shared.accs

    @torch.no_grad()
    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        if index == 0:
            torch._foreach_zero_(self.accs)
        self.add(grads)

    def add(self, grads: Sequence[Tensor]) -> None:
        """Add 1/N of each gradient to its accumulator."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self) -> None:
        if self.plan.max_norm is not None:
            clip_grad_norm_(self.shared.masters, self.plan.max_norm)
        self.shared.optimizer.step()
        if self.params[0].dtype != torch.float32:
            torch._foreach_copy_(self.params, self.shared.masters)

    def mean_grads(self) -> list[Tensor]:
        return self.accs

    def values(self) -> list[Tensor]:
        return [master.detach() for master in self.shared.masters]


class NativeFP32(NativeForm):
    """grad_dtype=None and an fp32 `.grad` in place: autograd itself adds bf16 into fp32."""

    loss_is_divided = True

    def add(self, grads: Sequence[Tensor]) -> None:
        with torch.enable_grad():
            deliver(self.params, grads)


class PerTensorAdd(NativeForm):
    """One `add_(grad, alpha=1/N)` per tensor."""

    def add(self, grads: Sequence[Tensor]) -> None:
        for acc, grad in zip(self.accs, grads, strict=True):
            acc.add_(grad, alpha=1 / self.plan.n)


class ForeachAdd(NativeForm):
    """`torch._foreach_add_`: one call; with mixed dtypes it goes tensor by tensor inside."""

    def add(self, grads: Sequence[Tensor]) -> None:
        torch._foreach_add_(self.accs, list(grads), alpha=1 / self.plan.n)


class CastAdd(NativeForm):
    """`add_(grad.float())`: what most training scripts do."""

    moved = Moved(first=22, later=18, norm=4, step=34, clip=8)

    def add(self, grads: Sequence[Tensor]) -> None:
        for acc, grad in zip(self.accs, grads, strict=True):
            acc.add_(grad.float(), alpha=1 / self.plan.n)


class BlockedAdd(NativeForm):
    """By hand, for CPUs: blocks that stay in the cache, cast into scratch and added from there."""

    def __init__(self, params: Sequence[Tensor], plan: Plan, shared: Masters | None = None) -> None:
        super().__init__(params, plan, shared)
        self.scratch = self.accs[0].new_empty(SCRATCH)

    def add(self, grads: Sequence[Tensor]) -> None:
        blocked_add_(self.accs, grads, 1 / self.plan.n, self.scratch)


# --- torch.compile ---

Tensors = list[Tensor]


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


class Compiled(Form):
    """Loops by torch.compile: an accumulation, and a step that clips, updates and casts in one.

    On CUDA all tensors in one call, which Inductor joins into few kernels. On a CPU tensor by
    tensor, compiled once for any size: one call over GPT-2's 148 tensors took 32 s to compile (the
    step 48 s; Xeon, 2 cores, 2026-11-22).
    """

    moved = Moved(first=6, later=10, norm=4, step=30, clip=0)

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        self.plan, self.params = plan, leaves(params)
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

    def call(self, function: Callable[..., None], *lists: Sequence[Tensor], rest: Any) -> None:
        """`function` on whole lists, or on each tensor, flat."""
        flat = [[t.detach().view(-1) for t in tensors] for tensors in lists]
        if self.together:
            function(*flat, *rest)
            return
        for tensors in zip(*flat, strict=True):
            function(*([t] for t in tensors), *rest)

    @torch.no_grad()
    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        function = self.first if index == 0 else self.later
        self.call(function, self.accs, grads, rest=(1 / self.plan.n,))

    @torch.no_grad()
    def update(self) -> None:
        plan, (beta1, beta2) = self.plan, self.plan.betas
        coef = torch.ones_like(self.steps)
        if plan.max_norm is not None:
            coef = (plan.max_norm / (self.norm() + 1e-6)).clamp(max=1.0).double()
        # On the device, so that nothing waits and a new number compiles nothing.
        self.steps += 1
        numbers = (
            coef,
            plan.lr / (1 - beta1**self.steps),
            (1 - beta2**self.steps).rsqrt(),
            torch.full_like(self.steps, 1 - plan.lr * plan.weight_decay),
        )
        lists = (self.params, self.masters, self.accs, self.exp_avgs, self.exp_avg_sqs)
        rest = (torch.stack(numbers).float(), 1 - beta1, beta2, plan.eps)
        self.call(self.adamw, *lists, rest=rest)

    def mean_grads(self) -> list[Tensor]:
        return self.accs

    def values(self) -> list[Tensor]:
        return self.masters


class PlainBF16(Form):
    """Everything in bf16: the cheapest, and wrong by about a percent.

    Autograd would keep the first micro-gradient where it is; here it is copied, 4 bytes.
    """

    loss_is_divided = True
    is_exact = False
    precision = "bf16 sum, bf16 states, bf16 parameters"
    moved = Moved(first=4, later=6, norm=2, step=14, clip=4)
    held = 8

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        self.plan, self.params = plan, leaves(params)
        self.accs = [torch.zeros_like(p) for p in params]
        for param, acc in zip(self.params, self.accs, strict=True):
            param.grad = acc
        self.optimizer = self.make(plan)

    def make(self, plan: Plan) -> torch.optim.Optimizer:
        """The optimizer of the parameters."""
        return torch.optim.AdamW(self.params, fused=True, **plan.adamw())

    @torch.no_grad()
    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        if index == 0:
            torch._foreach_copy_(self.accs, list(grads))
        else:
            torch._foreach_add_(self.accs, list(grads))

    @torch.no_grad()
    def update(self) -> None:
        if self.plan.max_norm is not None:
            clip_grad_norm_(self.params, self.plan.max_norm)
        self.optimizer.step()

    def mean_grads(self) -> list[Tensor]:
        return self.accs

    def values(self) -> list[Tensor]:
        return [p.detach() for p in self.params]


# The best known native form first, plain bf16 last.
NATIVE: dict[str, type[Form]] = {
    "native_fp32": NativeFP32,
    "per_tensor_add": PerTensorAdd,
    "foreach_add": ForeachAdd,
    "cast_add": CastAdd,
    "blocked_add": BlockedAdd,
    "compiled": Compiled,
    "plain_bf16": PlainBF16,
}
