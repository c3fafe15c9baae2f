"""The ways to run one window that `bench` measures: ours, and the strongest of stock PyTorch.

A `Form` holds parameters, accumulators and the optimizer's states. The native ones that sum in
fp32 share those and one step: clip_grad_norm_, the optimizer (fused where torch has that) on fp32
masters, and a copy to the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from .. import FusedAccumOptimizer
from ..doctor.windows import deliver
from ..rules import builtin as rules

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
    """What all forms share."""

    optimizer: str = "adamw"
    n: int = 8
    max_norm: float = 1.0
    lr: float = 1e-3

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

    def n_states(self) -> int:
        """Tensors of state per parameter."""
        optimizer = self.plain(
            [torch.zeros(1, dtype=torch.float32, device="cpu", requires_grad=True)]
        )
        rule = rules.select(optimizer, optimizer.param_groups[0])
        assert rule is not None
        return len(rule.states)


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


class Form:
    """One way to run a window.

    Attributes:
        name: for people.
        loss_is_divided: whether gradients must arrive divided by N.
        is_exact: whether it sums in fp32.
        moved: see `Moved`.
    """

    name: str
    loss_is_divided = False
    is_exact = True
    moved: Moved
    plan: Plan
    params: list[Tensor]

    def add(self, grads: Sequence[Tensor], index: int) -> None:
        """Accumulate the index-th micro-batch."""
        raise NotImplementedError

    def add_last(self, grads: Sequence[Tensor]) -> None:
        """Accumulate the last micro-batch and have the norm."""
        self.add(grads, 1)
        get_total_norm(self.grads())

    def step(self) -> None:
        """The step alone, on what is accumulated, without clipping."""
        raise NotImplementedError

    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        """The index-th micro-batch of a whole window, as its user runs it."""
        self.add(grads, index)

    def update(self) -> None:
        """Clipping and the step, after the last one."""
        raise NotImplementedError

    def window(self, grads: Sequence[Tensor]) -> None:
        """N micro-batches of the same gradients, clipping and the step."""
        for index in range(self.plan.n):
            self.micro_batch(grads, index)
        self.update()

    def grads(self) -> list[Tensor]:
        """The accumulators."""
        raise NotImplementedError

    def values(self) -> list[Tensor]:
        """The parameters as precisely as they are kept."""
        raise NotImplementedError

    def held(self) -> int:
        """Bytes of parameters, masters, accumulators and states."""
        raise NotImplementedError


def leaves(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies that can be trained."""
    return [p.detach().clone().requires_grad_() for p in params]


# Elements of fp32 scratch that stay in a core's cache with their gradient and accumulator.
SCRATCH = 1 << 18


def blocked_add_(
    accs: Sequence[Tensor], grads: Sequence[Tensor], alpha: float, scratch: Tensor
) -> None:
    """`acc += alpha * grad` in blocks that are cast into `scratch` and added from there."""
    block = scratch.numel()
    for acc, grad in zip(accs, grads, strict=True):
        pairs = zip(acc.view(-1).split(block), grad.view(-1).split(block), strict=True)
        for a, g in pairs:
            a.add_(scratch[: g.numel()].copy_(g), alpha=alpha)


def _nbytes(tensors: Iterable[Any]) -> int:
    """Bytes of tensors, each memory once; step counts are left out."""
    found = {t.data_ptr(): t.nbytes for t in tensors if isinstance(t, Tensor) and t.dim()}
    return sum(found.values())


class Ours(Form):
    """FusedAccumOptimizer; windows go through its hooks, single operations are the launches.

    Args:
        counts: whether it counts to N, for windows; else every `step()` is an update.
    """

    name = "fusedaccum"

    def __init__(
        self, params: Sequence[Tensor], plan: Plan, counts: bool, backend: str | None = None
    ) -> None:
        self.plan, self.params = plan, leaves(params)
        self.optimizer = FusedAccumOptimizer(
            plan.plain(self.params),
            plan.n if counts else None,
            max_grad_norm=plan.max_norm if counts else None,
            backend=backend,
        )
        self.collector = self.optimizer._core.collector
        size = params[0].element_size()
        master = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 4}[params[0].dtype]
        step = 2 * (size + master) + 4 + 8 * plan.n_states()
        self.moved = Moved(size + 4, size + 8, 0, 0, step)

    @torch.no_grad()
    def _accumulate(self, grads: Sequence[Tensor], first: bool, with_norm: bool) -> None:
        slots = list(self.collector.slots.values())
        if slots[0].grad is None:
            with torch.enable_grad():
                deliver(self.params, grads)  # makes the accumulators
        self.collector.backend.accumulate(
            [s.acc for s in slots],
            grads,
            1 / self.plan.n,
            first,
            self.collector.sums.cells() if with_norm else None,
            [s.cell for s in slots],
        )

    def add(self, grads: Sequence[Tensor], index: int) -> None:
        self._accumulate(grads, index == 0, False)

    def add_last(self, grads: Sequence[Tensor]) -> None:
        self._accumulate(grads, False, True)

    def step(self) -> None:
        self.optimizer.step()

    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        self.optimizer.zero_grad()
        deliver(self.params, grads)
        self.optimizer.step()

    def update(self) -> None:
        """The last micro-batch has done it."""

    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    def values(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        return [state[i].get("master_param", p.detach()) for i, p in enumerate(self.params)]

    def held(self) -> int:
        updater = self.optimizer._core.updater
        own = [
            t
            for s in self.collector.slots.values()
            for t in (s.acc, updater.masters[s].tensor, *updater.states[s].tensors)
        ]
        return _nbytes([*self.params, *own])


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

    def __init__(self, params: Sequence[Tensor], plan: Plan, shared: Masters) -> None:
        self.plan, self.shared = plan, shared
        self.params, self.accs = shared.params, shared.accs
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

    def update(self) -> None:
        clip_grad_norm_(self.shared.masters, self.plan.max_norm)
        self.step()

    def grads(self) -> list[Tensor]:
        return self.accs

    def values(self) -> list[Tensor]:
        return [master.detach() for master in self.shared.masters]

    def held(self) -> int:
        states = [t for state in self.shared.optimizer.state.values() for t in state.values()]
        return _nbytes([*self.params, *self.shared.masters, *self.accs, *states])


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

    def __init__(self, params: Sequence[Tensor], plan: Plan, shared: Masters) -> None:
        super().__init__(params, plan, shared)
        self.scratch = self.accs[0].new_empty(SCRATCH)

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        blocked_add_(self.accs, grads, 1 / self.plan.n, self.scratch)


class Plain(Form):
    """Everything in bf16: the cheapest, and wrong by about a percent."""

    name = "plain bf16 (inexact)"
    loss_is_divided = True
    is_exact = False

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        self.plan, self.params = plan, leaves(params)
        self.accs = [torch.zeros_like(p) for p in params]
        for param, acc in zip(self.params, self.accs, strict=True):
            param.grad = acc
        self.optimizer = plan.best(self.params)
        size = params[0].element_size()
        step = size * (3 + 2 * plan.n_states())
        is_fused = plan.is_fused(params[0].device)
        self.moved = Moved(2 * size, 3 * size, size, 2 * size, step if is_fused else None)

    @torch.no_grad()
    def add(self, grads: Sequence[Tensor], index: int) -> None:
        if index == 0:
            torch._foreach_copy_(self.accs, list(grads))
        else:
            torch._foreach_add_(self.accs, list(grads))

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()

    def update(self) -> None:
        clip_grad_norm_(self.params, self.plan.max_norm)
        self.step()

    def grads(self) -> list[Tensor]:
        return self.accs

    def values(self) -> list[Tensor]:
        return [p.detach() for p in self.params]

    def held(self) -> int:
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        return _nbytes([*self.params, *self.accs, *states])


def kinds(device: torch.device, dtype: torch.dtype) -> list[type[Form]]:
    """The forms to measure: ours first, the inexact one last."""
    found: list[type[Form]] = [Ours, Native, Foreach]
    if device.type == "cpu":
        found.append(Blocks)
    if dtype == torch.bfloat16:  # fp16 loses gradients, and AdamW's eps, without a scaler
        found.append(Plain)
    return found


def build(
    wanted: Sequence[type[Form]],
    params: Sequence[Tensor],
    plan: Plan,
    counts: bool,
    backend: str | None = None,
) -> list[Form]:
    """Forms of these parameters. The native fp32 ones share masters, accumulators and states."""
    found: list[Form] = []
    shared: Masters | None = None
    for kind in wanted:
        if issubclass(kind, Native):
            shared = shared or Masters(params, plan)
            found.append(kind(params, plan, shared))
        elif issubclass(kind, Ours):
            found.append(kind(params, plan, counts, backend))
        else:
            found.append(kind(params, plan))  # type: ignore[call-arg]
    return found
