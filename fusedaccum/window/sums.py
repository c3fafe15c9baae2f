"""Sums of squares of the accumulators, from which the norm and the finite check come."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Backend, SumOfSquares
from .hooks import Attached


class Sums:
    """fp32 partial sums of squares, a range of cells per parameter.

    The last accumulation of a window leaves them; whatever was written since is read once more.

    Args:
        backend: computes those that are not there.
        attached: has the parameters.
    """

    def __init__(self, backend: Backend, attached: Attached) -> None:
        self._backend, self._attached = backend, attached
        self._cells: Tensor | None = None

    def forget(self) -> None:
        """Parameters were added: all are computed anew, in a larger tensor."""
        self._cells = None

    def cells(self) -> Tensor:
        """The tensor, made where it is not there."""
        if self._cells is None:
            attached = self._attached
            self._cells = torch.zeros(attached.n_cells, dtype=torch.float32, device=attached.device)
            for slot in attached.slots.values():
                slot.sums_version, slot.has_sums = None, False
        return self._cells

    @torch.no_grad()
    def of_filled(self, unsure: bool) -> Tensor:
        """Sums of all filled accumulators, zero elsewhere; reads only what changed.

        Args:
            unsure: whether accumulators may have changed unseen.
        """
        attached, cells = self._attached.slots, self.cells()
        slots, stale = attached.values(), []
        if unsure or not attached.have_sums:
            stale = [
                s
                for s in slots
                if s.fill and (unsure or s.grad is None or s.sums_version != s.grad._version)
            ]
        if stale:
            accs, own_cells = [s.acc for s in stale], [s.cell for s in stale]
            self._backend.sum_of_squares(SumOfSquares(accs, cells, own_cells))
            for slot in stale:
                assert slot.grad is not None
                slot.sums_version, slot.has_sums = slot.grad._version, True
        if attached.are_all_filled:
            return cells
        for slot in slots:
            if slot.has_sums and not slot.fill:
                cells[slot.cell : slot.cell + slot.n_cells].zero_()
                slot.sums_version, slot.has_sums = None, False
        return cells
