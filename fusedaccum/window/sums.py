"""Sums of squares of the accumulators, from which the norm and the finite check come."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..backends import Backend, SumOfSquares
from .slots import Slot


class Sums:
    """fp32 partial sums of squares, a range of cells per parameter.

    The last accumulation of a window leaves them; whatever was written since is read once more.

    Args:
        backend: computes those that are not there.
        device: where they are.
    """

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self._backend, self._device = backend, device
        self._cells: Tensor | None = None

    def forget(self) -> None:
        """Parameters were added: all are computed anew, in a larger tensor."""
        self._cells = None

    def cells(self, slots: Iterable[Slot], n_cells: int) -> Tensor:
        """The tensor, made where it is not there."""
        if self._cells is None:
            self._cells = torch.zeros(n_cells, dtype=torch.float32, device=self._device)
            for slot in slots:
                slot.sums_version, slot.has_sums = None, False
        return self._cells

    @torch.no_grad()
    def of_filled(self, slots: Iterable[Slot], n_cells: int, unsure: bool) -> Tensor:
        """Sums of all filled accumulators, zero elsewhere; reads only what changed.

        Args:
            slots: of all parameters.
            n_cells: how many cells those have.
            unsure: whether accumulators may have changed unseen.
        """
        cells = self.cells(slots, n_cells)
        stale = [s for s in slots if s.fill and (unsure or not s.sums_are_current)]
        if stale:
            accs, own_cells = [s.acc for s in stale], [s.cell for s in stale]
            self._backend.sum_of_squares(SumOfSquares(accs, cells, own_cells))
            for slot in stale:
                assert slot.grad is not None
                slot.sums_version, slot.has_sums = slot.grad._version, True
        for slot in slots:
            if slot.has_sums and not slot.fill:
                cells[slot.cell : slot.cell + slot.n_cells].zero_()
                slot.sums_version, slot.has_sums = None, False
        return cells
