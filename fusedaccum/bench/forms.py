"""The strongest ways of stock PyTorch to run a window, beside which the wrapper is timed.

Those that sum in fp32 share one step: clip_grad_norm_, the optimizer (fused where torch has that)
on fp32 masters, and a copy to the parameters. The repository's `benchmarks/` has more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ..doctor.forms import Bytes, Form, Stepwise, Wrapper, deliver, leaves
from ..doctor.plan import Plan

# Elements of fp32 scratch that stay in a core's cache with their gradient and accumulator.
SCRATCH = 1 << 18


class Native(Stepwise):
    """An fp32 `.grad` in place and grad_dtype=None: autograd itself adds bf16 into fp32.

    Args:
        twin: another native form, whose parameters, masters, accumulators and states this one
            takes too. They run one after the other.
    """

    name = "native_fp32"
    loss_is_divided = True

    def __init__(self, params: Sequence[Tensor], plan: Plan, twin: Native | None = None) -> None:
        self.plan = plan
        if twin is not None:
            vars(self).update(vars(twin))
            return
        self.params = leaves(params)
        is_fp32 = params[0].dtype == torch.float32
        self.masters = self.params if is_fp32 else leaves(p.float() for p in params)
        self.accs = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        for param, master, acc in zip(self.params, self.masters, self.accs, strict=True):
            param.grad_dtype = None  # a gradient may have another dtype than its parameter
            param.grad = master.grad = acc
        self.optimizer = plan.best(self.masters)

    @classmethod
    def bytes(cls, plan: Plan, like: Tensor) -> Bytes:
        size, states = like.element_size(), 4 * plan.n_states()
        master = 0 if like.dtype == torch.float32 else 4
        step = 12 + 2 * states + (size + master if master else 0)
        return Bytes(size + master + 4 + states, size + 12, size + 8, 4, 8, step)

    def begin(self, index: int) -> None:
        if index == 0:
            torch._foreach_zero_(self.accs)

    @torch.no_grad()
    def add(self, grads: Sequence[Tensor], index: int) -> None:
        self.begin(index)
        self.accumulate(grads)

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        """Add each gradient to its accumulator."""
        with torch.enable_grad():
            deliver(self.params, grads)

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        if self.masters is not self.params:
            torch._foreach_copy_(self.params, self.masters)

    def clip(self, max_norm: float) -> None:
        clip_grad_norm_(self.masters, max_norm)

    def grads(self) -> list[Tensor]:
        return self.accs

    def values(self) -> list[Tensor]:
        return [master.detach() for master in self.masters]


class Foreach(Native):
    """`torch._foreach_add_` of all gradients."""

    name = "foreach_add"
    loss_is_divided = False

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        torch._foreach_add_(self.accs, list(grads), alpha=1 / self.plan.n)


class Blocks(Native):
    """By hand, for CPUs: blocks that stay in the cache, cast into scratch and added from there."""

    name = "blocked_add"
    loss_is_divided = False

    @cached_property
    def scratch(self) -> Tensor:
        """fp32 memory of one block."""
        return self.accs[0].new_empty(SCRATCH)

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        for acc, grad in zip(self.accs, grads, strict=True):
            pairs = zip(acc.view(-1).split(SCRATCH), grad.view(-1).split(SCRATCH), strict=True)
            for a, g in pairs:
                a.add_(self.scratch[: g.numel()].copy_(g), alpha=1 / self.plan.n)


class Plain(Stepwise):
    """Everything in bf16: the cheapest, and wrong by about a percent."""

    name = "plain_bf16"
    loss_is_divided = True
    is_exact = False
    precision = "bf16 sum, bf16 states, bf16 parameters"

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        super().__init__(params, plan)
        self.optimizer = self.make(plan)
        self.accs: list[Tensor] = []  # of given gradients; autograd brings its own

    @classmethod
    def bytes(cls, plan: Plan, like: Tensor) -> Bytes:
        size, n = like.element_size(), plan.n_states()
        return Bytes(size * (2 + n), 2 * size, 3 * size, size, 2 * size, size * (3 + 2 * n))

    def make(self, plan: Plan) -> torch.optim.Optimizer:
        """The optimizer of the parameters."""
        return plan.best(self.params)

    @torch.no_grad()
    def add(self, grads: Sequence[Tensor], index: int) -> None:
        self.accs = self.accs or [torch.zeros_like(param) for param in self.params]
        if index == 0:
            for param, acc in zip(self.params, self.accs, strict=True):
                param.grad = acc
            torch._foreach_copy_(self.accs, list(grads))
        else:
            torch._foreach_add_(self.accs, list(grads))

    def step(self) -> None:
        self.optimizer.step()

    def update(self) -> None:
        super().update()
        self.optimizer.zero_grad()


def kinds(like: Tensor) -> list[type[Form]]:
    """What `bench` measures for such parameters, the inexact one last."""
    found: list[type[Form]] = [Wrapper, Native, Foreach]
    if like.device.type == "cpu":
        found.append(Blocks)
    if like.dtype == torch.bfloat16:  # fp16 loses gradients, and AdamW's eps, without a scaler
        found.append(Plain)
    return found
