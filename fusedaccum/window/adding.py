"""Gradients into accumulators: one launch for those that start something, one for the others.

In the middle of training the same parameters arrive in the same order as in the micro-batch before.
Then nothing is done for each of them but what has to be (`Adder.add_again`).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ..backends import Add, Backend, Launch
from ..backends.tensors import holds_values, laid_out_like
from .grad_scaler import Scaling
from .slots import Fill, Slot
from .sums import Sums
from .weights import Window

# Queues that are remembered. A model has one for each bucket of its gradients.
MAX_QUEUES = 4096

_dtype, _grad, _fill = attrgetter("dtype"), attrgetter("grad"), attrgetter("fill")
_FP32 = {torch.float32}


class _Queue:
    """Parameters whose gradients arrived together, in this order."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)
        self.params = [slot.param for slot in slots]
        self.accs = [slot.acc for slot in slots]
        self.shown = [slot.grad for slot in slots]
        self.numels = [slot.numel for slot in slots]
        self.cells = [slot.cell for slot in slots]
        self.dtypes = {slot.dtype for slot in slots}
        self.launch = Launch()
        # One accumulator of each flat buffer: what moves a buffer moves all of it.
        self.heads = list({slot.block: slot.acc for slot in slots}.values())
        self.places = list(map(Tensor.data_ptr, self.heads))

    @classmethod
    def of(cls, slots: Sequence[Slot]) -> _Queue | None:
        """None where something is special about one of them."""
        one, is_plain = slots[0].dtype, all(s.is_contiguous and s.shard is None for s in slots)
        if is_plain and all(s.grad is not None and s.dtype is one for s in slots):
            return cls(slots)
        return None

    def grads(self) -> list[Tensor] | None:
        """The gradients that the parameters show; None where something is special about one of
        them, or about an accumulator. All of it is compared without Python code for each."""
        grads: list[Tensor] = list(map(_grad, self.params))
        try:
            is_usual = (
                list(map(Tensor.numel, grads)) == self.numels
                and all(map(Tensor.is_contiguous, grads))
                and set(map(_dtype, grads)) == self.dtypes
                and not any(map(Tensor.is_neg, grads))
                and not any(map(Tensor._is_zerotensor, grads))
                and all(map(is_, map(_grad, self.slots), self.shown))
                and set(map(_dtype, self.shown)) == _FP32
                and list(map(Tensor.data_ptr, self.heads)) == self.places
            )
        except (TypeError, RuntimeError):  # a None among them; a sparse one
            return None
        return grads if is_usual else None


class Adder:
    """Adds to the accumulators of one optimizer.

    Args:
        backend: runs the launches.
        window: which micro-batch is open.
        scaling: what a GradScaler does to the gradients.
        sums: their sums of squares.
        wants_norm: whether updates need the norm, so that the last accumulation leaves its sums.
        queues: where to remember parameters that arrive together.
    """

    def __init__(
        self,
        backend: Backend,
        window: Window,
        scaling: Scaling,
        sums: Sums,
        wants_norm: bool,
        queues: dict[tuple[Slot, ...], Any],
    ) -> None:
        self._backend, self._window, self._scaling, self._sums = backend, window, scaling, sums
        self.wants_norm = wants_norm
        self._queues = queues  # a _Queue, or None where it was seen once

    def _leaves_sums(self, is_averaged: bool) -> bool:
        """Whether the sums of squares of accumulators will be of use after this launch."""
        window, scaling = self._window, self._scaling
        is_last = window.steps is None or window.is_last or scaling.is_linked
        return is_last and (self.wants_norm or scaling.needs_norm) and not is_averaged

    def add_again(self, slots: Sequence[Slot], scale: float, is_averaged: bool) -> bool:
        """`add` the gradients that these parameters show, if they came together before and nothing
        is special about them. To be called in a backward.

        Returns:
            Whether that is done. Else nothing is.
        """
        key = tuple(slots)
        queue = self._queues.get(key)
        if queue is None:
            self._remember(key)
            return False
        fills = set(map(_fill, slots))
        stores = Fill.EMPTY in fills
        if self._scaling.is_linked or (stores and len(fills) > 1):
            return False
        grads = queue.grads()
        if grads is None:
            del self._queues[key]
            return False
        with_sums = self._leaves_sums(is_averaged)
        cells = self._sums.cells() if with_sums else None
        pairs = list(zip(queue.accs, grads, strict=True))
        self._backend.accumulate(Add(pairs, scale, stores, cells, queue.cells, launch=queue.launch))
        current = Fill.CURRENT
        for slot, param, shown in zip(slots, queue.params, queue.shown, strict=True):
            slot.fill, slot.is_zero, slot.pending = current, False, False
            param.grad, slot.sums_version = shown, None
        if with_sums:
            for slot, shown in zip(slots, queue.shown, strict=True):
                slot.has_sums, slot.sums_version = True, shown._version
        return True

    def _remember(self, key: tuple[Slot, ...]) -> None:
        """A queue that comes a second time may come always."""
        if key in self._queues:
            self._queues[key] = _Queue.of(key)
            return
        if len(self._queues) >= MAX_QUEUES:
            del self._queues[next(iter(self._queues))]
        self._queues[key] = None

    @torch.no_grad()
    def add(
        self,
        fresh: Sequence[tuple[Slot, Tensor]],
        scale: float,
        *,
        is_scaled: bool = True,
        is_averaged: bool = False,
    ) -> None:
        """Accumulate gradients, and let `param.grad` show the accumulators.

        Args:
            fresh: the gradients, each with its slot.
            scale: a factor on them.
            is_scaled: whether they hold the scale of a GradScaler, if there is one.
            is_averaged: whether accumulators will be averaged over processes, after which sums of
                squares of now would be of no use.
        """
        scaling, with_sums = self._scaling, self._leaves_sums(is_averaged)
        cells = self._sums.cells() if with_sums else None
        # One for each Fill: what starts the window, what starts the micro-batch, what goes on.
        parts: tuple[list[tuple[Slot, Tensor]], ...] = ([], [], [])
        for pair in fresh:
            slot, grad = pair
            if slot.grad is None or slot.grad.dtype is not torch.float32:
                slot.allocate()
            is_plain = slot.is_contiguous and grad.is_contiguous() and holds_values(grad)
            if not is_plain:
                pair = slot, grad = slot, laid_out_like(grad, slot.acc)
            if grad.dtype is not slot.dtype and grad.dtype is not torch.float32:
                pair = slot, grad.float()
            parts[slot.fill].append(pair)
        if not scaling.is_linked:  # the last two differ in what a GradScaler has to say
            parts = (parts[0], parts[1] + parts[2], [])
        for i, members in enumerate(parts):
            if members:
                pairs = [(s.acc, g) for s, g in members]
                own_cells = [s.cell for s, _ in members]
                control = scaling.control(i < 2) if is_scaled else None
                self._backend.accumulate(Add(pairs, scale, i == 0, cells, own_cells, control))
        for slot, _ in fresh:
            slot.fill, slot.is_zero = Fill.CURRENT, False
            slot.param.grad = shown = slot.grad
            slot.has_sums |= with_sums
            slot.sums_version = shown._version if with_sums and shown is not None else None
