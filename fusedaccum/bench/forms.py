"""The ways to run one window that are measured: what a form is, and the strongest of stock PyTorch.

A `Form` holds parameters, accumulators and the optimizer's states. The native ones that sum in
fp32 share those and one step: clip_grad_norm_, the optimizer (fused where torch has that) on fp32
masters, and a copy to the parameters. Our own are in `ours.py`; the repository's `benchmarks/` has
more of them, of the same classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from ..doctor.windows import deliver
from ..rules import registry
from ..rules.rule import Rule

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adamax": (torch.optim.Adamax, {}),
    "asgd": (torch.optim.ASGD, {}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "rprop": (torch.optim.Rprop, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}
# Where torch has one kernel for the whole step.
FUSED = {"cuda": ("adamw", "adam", "sgd"), "cpu": ("adamw", "adam", "sgd", "adagrad")}


@dataclass(frozen=True)
class Plan:
    """What all forms share: the optimizer, N micro-batches per window, clipping, the rate.

    Attributes:
        max_norm: of a whole window; None: it does not clip.
        backend: fusedaccum's.
    """

    optimizer: str = "adamw"
    n: int = 8
    max_norm: float | None = 1.0
    lr: float = 1e-3
    backend: str | None = None

    def plain(self, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimizer with torch's defaults, to be wrapped, or as the float64 reference."""
        kind, options = OPTIMIZERS[self.optimizer]
        return kind(params, lr=self.lr, **options)  # type: ignore[call-arg]

    def best(self, params: list[Tensor]) -> torch.optim.Optimizer:
        """The fastest of torch's implementations of it."""
        kind, options = OPTIMIZERS[self.optimizer]
        how: dict[str, Any] = {"fused" if self.is_fused(params[0].device) else "foreach": True}
        return kind(params, lr=self.lr, **options, **how)  # type: ignore[call-arg]

    def is_fused(self, device: torch.device) -> bool:
        """Whether torch has a fused step, which reads and writes everything once."""
        return self.optimizer in FUSED.get(device.type, ())

    def _of_nothing(self) -> torch.optim.Optimizer:
        return self.plain([torch.zeros(1, dtype=torch.float32, device="cpu", requires_grad=True)])

    def group(self) -> dict[str, Any]:
        """A param group of the optimizer."""
        return self._of_nothing().param_groups[0]

    def rule(self) -> Rule:
        """Our rule for it."""
        optimizer = self._of_nothing()
        rule = registry.select(optimizer, optimizer.param_groups[0])
        assert rule is not None
        return rule

    def n_states(self) -> int:
        """Tensors of state per parameter."""
        return len(self.rule().states)


@dataclass(frozen=True)
class Moved:
    """Bytes that must be read and written per parameter, if every tensor that a call names goes
    through memory once: in the first micro-batch, a later one, the norm, clipping, the step (None
    where torch's step is many passes)."""

    first: int
    later: int
    norm: int
    clip: int
    step: int | None

    def window(self, n: int) -> int | None:
        """Of a whole window."""
        if self.step is None:
            return None
        return self.first + (n - 1) * self.later + self.norm + self.clip + self.step


class Form(ABC):
    """One way to run a window: as a whole, and its single operations.

    A whole window is N times `micro_batch` and then `update`. The single operations are `add`,
    `add_last` and `step`.

    Attributes:
        name: for people.
        loss_is_divided: whether gradients must arrive divided by N.
        is_exact: whether it sums in fp32.
        precision: what it sums in and what it steps, in words.
        has_operations: whether single operations can be run; else only whole windows.
        moved: see `Moved`.
    """

    name: ClassVar[str]
    loss_is_divided: ClassVar[bool] = False
    is_exact: ClassVar[bool] = True
    precision: ClassVar[str] = "fp32 sum, fp32 states, fp32 masters"
    has_operations: ClassVar[bool] = True
    moved: Moved
    plan: Plan
    params: list[Tensor]

    def add(self, grads: Sequence[Tensor], index: int) -> None:
        """Accumulate the index-th micro-batch."""
        raise TypeError(f"{self.name} has no single operations")

    def add_last(self, grads: Sequence[Tensor]) -> None:
        """Accumulate the last micro-batch and have the norm."""
        self.add(grads, 1)
        get_total_norm(self.grads())

    def step(self) -> None:
        """The step alone, on what is accumulated, without clipping."""
        raise TypeError(f"{self.name} has no single operations")

    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        """The index-th micro-batch of a whole window, as its user runs it."""
        self.add(grads, index)

    def update(self) -> None:
        """Clipping and the step, after the last one."""
        if self.plan.max_norm is not None:
            self.clip(self.plan.max_norm)
        self.step()

    def clip(self, max_norm: float) -> None:
        """Clip what is accumulated."""
        clip_grad_norm_(self.params, max_norm)

    def window(self, grads: Sequence[Tensor]) -> None:
        """N micro-batches of the same gradients, clipping and the step."""
        for index in range(self.plan.n):
            self.micro_batch(grads, index)
        self.update()

    @abstractmethod
    def grads(self) -> list[Tensor]:
        """The accumulators."""

    def values(self) -> list[Tensor]:
        """The parameters as precisely as they are kept."""
        return [param.detach() for param in self.params]

    @abstractmethod
    def held(self) -> int:
        """Bytes of parameters, masters, accumulators and states."""


def leaves(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies that can be trained."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


# Elements of fp32 scratch that stay in a core's cache with their gradient and accumulator.
SCRATCH = 1 << 18


def nbytes(tensors: Iterable[Any]) -> int:
    """Bytes of tensors, each memory once; step counts are left out."""
    found = {t.data_ptr(): t.nbytes for t in tensors if isinstance(t, Tensor) and t.dim()}
    return sum(found.values())


class Masters:
    """What the native fp32 forms share; they run one after the other."""

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        self.params = leaves(params)
        is_fp32 = params[0].dtype == torch.float32
        self.masters = self.params if is_fp32 else leaves(p.float() for p in params)
        self.accs = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        for param, master, acc in zip(self.params, self.masters, self.accs, strict=True):
            param.grad_dtype = None  # a gradient may have another dtype than its parameter
            param.grad = master.grad = acc
        self.optimizer = plan.best(self.masters)


class Native(Form):
    """An fp32 `.grad` in place and grad_dtype=None: autograd itself adds bf16 into fp32."""

    name = "native: fp32 .grad"
    loss_is_divided = True

    def __init__(self, params: Sequence[Tensor], plan: Plan, shared: Masters | None = None) -> None:
        self.plan, self.shared = plan, shared or Masters(params, plan)
        self.params, self.accs = self.shared.params, self.shared.accs
        size = params[0].element_size()
        step = 12 + 8 * plan.n_states() + (4 + size if size < 4 else 0)
        is_fused = plan.is_fused(params[0].device)
        self.moved = Moved(size + 12, size + 8, 4, 8, step if is_fused else None)

    @torch.no_grad()
    def add(self, grads: Sequence[Tensor], index: int) -> None:
        if index == 0:
            torch._foreach_zero_(self.accs)
        self.accumulate(grads)

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        """Add each gradient to its accumulator."""
        with torch.enable_grad():
            deliver(self.params, grads)

    @torch.no_grad()
    def step(self) -> None:
        self.shared.optimizer.step()
        if self.params[0].dtype != torch.float32:
            torch._foreach_copy_(self.params, self.shared.masters)

    def clip(self, max_norm: float) -> None:
        clip_grad_norm_(self.shared.masters, max_norm)

    def grads(self) -> list[Tensor]:
        return self.accs

    def values(self) -> list[Tensor]:
        return [master.detach() for master in self.shared.masters]

    def held(self) -> int:
        states = [t for state in self.shared.optimizer.state.values() for t in state.values()]
        return nbytes([*self.params, *self.shared.masters, *self.accs, *states])


class Foreach(Native):
    """`torch._foreach_add_` of all gradients."""

    name = "native: foreach add"
    loss_is_divided = False

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        torch._foreach_add_(self.accs, list(grads), alpha=1 / self.plan.n)


class Blocks(Native):
    """By hand, for CPUs: blocks that stay in the cache, cast into scratch and added from there."""

    name = "native: blocks by hand"
    loss_is_divided = False

    def __init__(self, params: Sequence[Tensor], plan: Plan, shared: Masters | None = None) -> None:
        super().__init__(params, plan, shared)
        self.scratch = self.accs[0].new_empty(SCRATCH)

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        for acc, grad in zip(self.accs, grads, strict=True):
            pairs = zip(acc.view(-1).split(SCRATCH), grad.view(-1).split(SCRATCH), strict=True)
            for a, g in pairs:
                a.add_(self.scratch[: g.numel()].copy_(g), alpha=1 / self.plan.n)


class Plain(Form):
    """Everything in bf16: the cheapest, and wrong by about a percent."""

    name = "plain bf16 (inexact)"
    loss_is_divided = True
    is_exact = False
    precision = "bf16 sum, bf16 states, bf16 parameters"

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        self.plan, self.params = plan, leaves(params)
        self.accs = [torch.zeros_like(p) for p in params]
        for param, acc in zip(self.params, self.accs, strict=True):
            param.grad = acc
        self.optimizer = self.make(plan)
        size = params[0].element_size()
        step = size * (3 + 2 * plan.n_states())
        is_fused = plan.is_fused(params[0].device)
        self.moved = Moved(2 * size, 3 * size, size, 2 * size, step if is_fused else None)

    def make(self, plan: Plan) -> torch.optim.Optimizer:
        """The optimizer of the parameters."""
        return plan.best(self.params)

    @torch.no_grad()
    def add(self, grads: Sequence[Tensor], index: int) -> None:
        if index == 0:
            torch._foreach_copy_(self.accs, list(grads))
        else:
            torch._foreach_add_(self.accs, list(grads))

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()

    def grads(self) -> list[Tensor]:
        return self.accs

    def held(self) -> int:
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        return nbytes([*self.params, *self.accs, *states])


def build(wanted: Iterable[type[Form]], params: Sequence[Tensor], plan: Plan) -> list[Form]:
    """Forms of these parameters. The native fp32 ones share masters, accumulators and states."""
    found: list[Form] = []
    shared: Masters | None = None
    for kind in wanted:
        if issubclass(kind, Native):
            shared = shared or Masters(params, plan)
            found.append(kind(params, plan, shared))
        else:
            found.append(kind(params, plan))  # type: ignore[call-arg]
    return found
