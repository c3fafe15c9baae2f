"""The wrapped optimizer's own step(), on fp32 gradients and fp32 masters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import Correction, norm_of
from ..backends.devices import same_place
from ..kernels.layout import CLIP_EPS
from ..rules import packages
from ..window.collector import Collector
from ..window.slots import Slot
from .fused import Apply
from .masters import Masters
from .states import States
from .swap import Swap


class WrappedStep:
    """Updates by an optimizer that has no fused rule.

    Args:
        optimizer: the wrapped one; its `state` and `param_groups` are read and written.
        collector: has the accumulators.
        masters, states: of its parameters.

    Attributes:
        swap: puts the masters in the place of the parameters.
        has_own_states: the parameters whose states were made for fp32.
        is_stepping: whether the step() that the wrapped optimizer is in is of our making.
        keeps_none: those for which the optimizer's last step() of them left no states.
    """

    def __init__(
        self, optimizer: Optimizer, collector: Collector, masters: Masters, states: States
    ) -> None:
        self._optimizer, self._collector = optimizer, collector
        self._slots = collector.slots
        self._masters, self._states = masters, states
        self._parameters: dict[Slot, torch.nn.Parameter] = {}
        self.swap, self.is_stepping = Swap(optimizer), False
        self.has_own_states: set[Slot] = set()
        self.keeps_none: set[Slot] = set()

    def prepare(self, max_norm: float | None, partials: Tensor | None, skip: bool) -> Apply:
        """See `Updater.prepare`."""
        filled = [slot for slot in self._collector.slots.filled() if slot.is_own]
        scalars = self._states.scalars
        masters = {s: self._parameter(s) for s in filled if self._masters[s].is_kept}

        @torch.no_grad()
        def apply(correction: Correction) -> None:
            factor = float(correction.product())
            coef: Tensor | float = factor
            if partials is not None:
                norm = norm_of(partials) * factor
                scalars.norm.copy_(norm)
                # The one wait of this library, and only here: a foreign step() cannot be skipped
                # on the device.
                if skip and not bool(norm.isfinite()):
                    scalars.skipped += 1
                    return
                if max_norm is not None:
                    coef = (factor * (max_norm / (norm + CLIP_EPS)).clamp(max=1.0)).float()
                    coef = coef.to(partials.device)
            grads = [slot.acc for slot in filled]
            if max_norm is not None or factor != 1.0:
                if self._collector.window.steps is None:
                    grads = list(torch._foreach_mul(grads, coef))  # the loop may go on adding
                else:
                    torch._foreach_mul_(grads, coef)
                    for slot in filled:
                        slot.sums_version = None  # the sums are of the gradient before this
            with self._substituted(dict(zip(filled, grads, strict=True)), masters):
                self.step()
            state = self._optimizer.state
            self.keeps_none.difference_update(filled)
            self.keeps_none.update(slot for slot in filled if not state.get(slot.param))
            for slot, master in masters.items():
                slot.param.copy_(master)

        return apply

    def step(self, *closure: Callable[[], Any]) -> Any:
        """Let the wrapped optimizer step, which it refuses to everybody else."""
        self.is_stepping = True
        try:
            return self._optimizer.step(*closure)
        finally:
            self.is_stepping = False

    @torch.no_grad()
    def on_masters(self, method: Callable[[], Any]) -> Any:
        """Call a method that rewrites parameters (schedule-free optimizers' train() and eval())."""
        kept = [s for s in self._slots.values() if self._masters[s].is_kept]
        masters = {s: self._parameter(s) for s in kept}
        with self._substituted({s: s.acc for s in masters if s.fill}, masters):
            result = method()
        for slot, master in masters.items():
            slot.param.copy_(master)
        return result

    @contextmanager
    def _substituted(
        self, grads: dict[Slot, Tensor], masters: dict[Slot, torch.nn.Parameter]
    ) -> Iterator[None]:
        """Let the wrapped optimizer see fp32 masters instead of bf16 and fp16 parameters.

        Its states are then fp32 too. For the time of the step the masters stand in `param_groups`
        and `state`; afterwards the parameters do again. Parameters without a gradient in this
        window show none.
        """
        state = self._optimizer.state
        slots = self._slots.values()
        shown = [(s.param, s.param.grad) for s in slots if s not in masters]
        try:
            for slot in slots:
                if slot not in masters:
                    grad = grads.get(slot)
                    slot.param.grad = None if grad is None else self._grad(slot, grad)
            with self.swap.of({s.param: master for s, master in masters.items()}, True):
                for slot, master in masters.items():
                    grad = grads.get(slot)
                    master.grad = None if grad is None else self._grad(slot, grad)
                    # Made in the parameter's dtype, by a constructor (Adagrad) or by a plain run.
                    # What it made, or loaded, for fp32 parameters is in the dtype that it wants.
                    entry = {} if slot in self.has_own_states else state.get(master, {})
                    for name, value in entry.items():
                        is_tensor = isinstance(value, Tensor) and value.dim() > 0
                        if is_tensor and value.dtype == slot.dtype:
                            entry[name] = value.float()
                self.has_own_states.update(grads)
                yield
        finally:
            for param, grad in shown:
                param.grad = grad
            for master in masters.values():
                master.grad = None

    def _grad(self, slot: Slot, grad: Tensor) -> Tensor:
        """A gradient in the form that the wrapped optimizer takes."""
        if isinstance(self._optimizer, torch.optim.SparseAdam):
            # It takes nothing else, and touches only these rows: those with a gradient.
            return grad.to_sparse(1)
        grad = slot.shown(grad)
        converts = not packages.reads_fp32_gradients(self._optimizer)
        if not self._masters[slot].is_kept and slot.dtype != torch.float32 and converts:
            return grad.to(slot.dtype)
        return grad

    def _parameter(self, slot: Slot) -> torch.nn.Parameter:
        """A parameter's fp32 master, as a parameter."""
        kept = self._masters[slot].use_fp32()
        parameter = self._parameters.get(slot)
        if parameter is None or not same_place(slot.part(parameter), kept):
            parameter = self._parameters[slot] = torch.nn.Parameter(slot.shown(kept))
        return parameter
