"""Gradients into accumulators: one launch for those that start something, one for the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Add, Backend
from ..backends.tensors import laid_out_like
from .grad_scaler import Scaling
from .slots import Fill, Slot
from .sums import Sums
from .weights import Window


class Adder:
    """Adds to the accumulators of one optimizer.

    Args:
        backend: runs the launches.
        window: which micro-batch is open.
        scaling: what a GradScaler does to the gradients.
        sums: their sums of squares.
        wants_norm: whether updates need the norm, so that the last accumulation leaves its sums.
    """

    def __init__(
        self, backend: Backend, window: Window, scaling: Scaling, sums: Sums, wants_norm: bool
    ) -> None:
        self._backend, self._window, self._scaling, self._sums = backend, window, scaling, sums
        self.wants_norm = wants_norm

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
        window, scaling = self._window, self._scaling
        is_last = window.steps is None or window.is_last or scaling.is_linked
        with_sums = is_last and (self.wants_norm or scaling.needs_norm) and not is_averaged
        cells = self._sums.cells() if with_sums else None
        # One for each Fill: what starts the window, what starts the micro-batch, what goes on.
        parts: tuple[list[tuple[Slot, Tensor]], ...] = ([], [], [])
        for slot, grad in fresh:
            if slot.grad is None or slot.grad.dtype is not torch.float32:
                slot.allocate()
            if not (slot.is_contiguous and grad.is_contiguous()):
                grad = laid_out_like(grad, slot.acc)
            if grad.dtype is not slot.dtype and grad.dtype is not torch.float32:
                grad = grad.float()
            parts[slot.fill].append((slot, grad))
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
