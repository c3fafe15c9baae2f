"""Flat buffers: accumulators, states and masters of many parameters in a few allocations.

A `Block` lays its parameters out one after the other, each at a multiple of `ALIGNMENT` elements,
and allocates one flat tensor per name and dtype with that layout. What people see (`p.grad`,
`state[p]["exp_avg"]`) are views with the parameter's own shape and strides. Parameters themselves
stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.tensors import ALIGNMENT


class Block:
    """One layout and the flat tensors that follow it."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.device = params[0].device
        self._sizes = [(p.shape, p.stride()) for p in params]
        self._offsets: list[int] = []
        end = 0
        for param in params:
            self._offsets.append(end)
            end += -(-param.numel() // ALIGNMENT) * ALIGNMENT
        self._numel = end
        self._flats: dict[tuple[str, torch.dtype], Tensor] = {}

    def view(self, name: str, index: int, dtype: torch.dtype, *, zeroed: bool) -> Tensor:
        """Parameter `index`'s part of the flat tensor `name`, which is made on first use.

        With `zeroed` the flat tensor starts as zeros, else as whatever the memory held.
        """
        shape, stride = self._sizes[index]
        return self._flat(name, dtype, zeroed).as_strided(shape, stride, self._offsets[index])

    def span(self, name: str, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """The part of the flat tensor `name` from one parameter to another, padding included."""
        flat = self._flat(name, dtype, zeroed=False)
        return flat[self._offsets[first] : [*self._offsets, self._numel][last + 1]]

    def _flat(self, name: str, dtype: torch.dtype, zeroed: bool) -> Tensor:
        flat = self._flats.get((name, dtype))
        if flat is None:
            flat = torch.empty(self._numel, dtype=dtype, device=self.device)
            self._flats[name, dtype] = flat.zero_() if zeroed else flat
        return flat
