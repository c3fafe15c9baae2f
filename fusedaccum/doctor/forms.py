"""What a form of training is, and the first of them: the optimizer wrapper.

`doctor` runs windows of the wrapper; `bench` and the repository's benchmarks run other forms beside
it. Each is judged by `judge.py` before anybody times it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from .. import FusedAccumOptimizer
from .plan import Plan


@dataclass(frozen=True)
class Bytes:
    """Bytes per parameter.

    Attributes:
        kept: of parameters, masters, accumulators and states.
        first, later, norm, clip, step: what must be read and written, if every tensor that a call
            names goes through memory once, in the first micro-batch, a later one, the norm,
            clipping and the step.
    """

    kept: int
    first: int
    later: int
    norm: int
    clip: int
    step: int

    def window(self, n: int) -> int:
        """Moved in a whole window."""
        return self.first + (n - 1) * self.later + self.norm + self.clip + self.step


class Form(ABC):
    """One way to run a window: N times `micro_batch`, and then `update`.

    In a training loop `begin` and `end` stand around each backward instead.

    Attributes:
        name: in tables and rows.
        loss_is_divided: whether gradients must arrive divided by N.
        is_exact: whether it sums in fp32.
        precision: what it sums in and what it steps, in words.
        params: the parameters, copies of those that were given.
    """

    name: ClassVar[str]
    loss_is_divided: ClassVar[bool] = False
    is_exact: ClassVar[bool] = True
    precision: ClassVar[str] = "fp32 sum, fp32 states, fp32 masters"

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        self.plan, self.params = plan, leaves(params)

    @classmethod
    @abstractmethod
    def bytes(cls, plan: Plan, like: Tensor) -> Bytes:
        """What it keeps and moves, for parameters of the dtype and on the device of `like`."""

    def begin(self, index: int) -> object:
        """What comes before the forward of the index-th micro-batch."""
        return None

    def end(self) -> object:
        """What comes after a backward."""
        return None

    @abstractmethod
    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        """Accumulate the index-th micro-batch of a window."""

    @abstractmethod
    def update(self) -> None:
        """Clipping and the step, after the last one."""

    def window(self, grads: Sequence[Tensor]) -> None:
        """N micro-batches of the same gradients, clipping and the step."""
        for index in range(self.plan.n):
            self.micro_batch(grads, index)
        self.update()

    def grads(self) -> list[Tensor]:
        """The accumulators."""
        return [p.grad for p in self.params if p.grad is not None]

    def norm(self) -> float | None:
        """The norm of the last window, where the form says it."""
        return None

    def values(self) -> list[Tensor]:
        """The parameters as precisely as they are kept."""
        return [param.detach() for param in self.params]


class Stepwise(Form):
    """A form whose single operations can be run: `add`, `add_last` and `step`."""

    @abstractmethod
    def add(self, grads: Sequence[Tensor], index: int) -> None:
        """Accumulate the index-th micro-batch."""

    def add_last(self, grads: Sequence[Tensor]) -> None:
        """Accumulate the last micro-batch and have the norm."""
        self.add(grads, 1)
        get_total_norm(self.grads())

    @abstractmethod
    def step(self) -> None:
        """The step alone, on what is accumulated, without clipping."""

    def clip(self, max_norm: float) -> None:
        """Clip what is accumulated."""
        clip_grad_norm_(self.params, max_norm)

    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        self.add(grads, index)

    def update(self) -> None:
        if self.plan.max_norm is not None:
            self.clip(self.plan.max_norm)
        self.step()


def leaves(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies that can be trained."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


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


class Wrapper(Form):
    """FusedAccumOptimizer in the training loop of its README, gradients through its hooks."""

    name = "fused_hooks"
    precision = "fp32 sum, fp32 states, fp32-precise split masters"

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        super().__init__(params, plan)
        self.optimizer = FusedAccumOptimizer(
            plan.plain(self.params), plan.n, max_grad_norm=plan.max_norm, backend=plan.backend
        )

    @classmethod
    def bytes(cls, plan: Plan, like: Tensor) -> Bytes:
        """The last micro-batch leaves the norm, and the step clips in registers."""
        size, states = like.element_size(), 4 * plan.n_states()
        precise = 6 if like.dtype == torch.float16 else 4  # a split master shares its bytes
        return Bytes(precise + 4 + states, size + 4, size + 8, 0, 0, 2 * (precise + states) + 4)

    def begin(self, index: int) -> None:
        # Before, and not after, so that `p.grad` shows the mean when the window is over.
        self.optimizer.zero_grad()

    def end(self) -> None:
        self.optimizer.step()

    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        self.begin(index)
        self.deliver(grads)
        self.end()

    def deliver(self, grads: Sequence[Tensor]) -> None:
        """Bring the gradients of a micro-batch to the parameters."""
        deliver(self.params, grads)

    def update(self) -> None:
        """The last micro-batch has done it."""

    def norm(self) -> float | None:
        norm = self.optimizer.grad_norm
        return None if norm is None else float(norm)

    def values(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        return [state[i].get("master_param", p.detach()) for i, p in enumerate(self.params)]
