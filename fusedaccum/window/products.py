"""Gradients of matrices that never exist: a product goes from the GEMM into the accumulator.

The backward of a layer calls `take` where it would return a gradient. What is done for a gradient
that arrives (`Collector.make_ready`) is done there at once, and autograd gets a None.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ..backends import product
from ..backends.private import is_wanted
from .collector import Collector
from .slots import Fill, Slot

HOOK = "a hook on the weight"
LINKED = "a linked GradScaler, whose factor is on the device"


class Products:
    """Takes products for the parameters of one optimizer.

    Args:
        collector: of the same optimizer.

    Attributes:
        ordinary: how many gradients took the ordinary path, by the reason.
    """

    def __init__(self, collector: Collector) -> None:
        self.ordinary: Counter[str] = Counter()
        self.follow(collector)

    def follow(self, collector: Collector) -> None:
        """The parameters moved, and have other accumulators from now on."""
        self._collector = collector
        device = collector.attached.device
        # On which accumulators are ready, and read when a backward is over.
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def slot_of(self, weight: Tensor) -> Slot | None:
        """Where a weight's gradient goes; None for one that is not, or not any more, ours."""
        return self._collector.slots.get(weight)

    def take(self, weight: Tensor, a: Tensor, b: Tensor) -> bool:
        """Add the gradient `a b` of a weight to its accumulator, in a backward.

        Args:
            weight: [m, n], the parameter itself.
            a: [m, k].
            b: [k, n].

        Returns:
            Whether that is done, or nobody asked for this gradient. Else it is to be returned to
            autograd.

        Raises:
            RuntimeError: as a gradient that arrives does.
        """
        slot = self.slot_of(weight)
        if slot is None or slot.node is None or slot.difference() is not None:
            return False
        try:
            if not is_wanted(slot.node):
                return True
        except RuntimeError:
            return False
        reason = self.refuses(slot, a.dtype)
        if reason is not None:
            self.ordinary[reason] += 1
            return False
        self.add(slot, a, b)
        return True

    def refuses(self, slot: Slot, dtype: torch.dtype) -> str | None:
        """Why the gradient of now has to take the ordinary path; None if it need not.

        Args:
            slot: of the weight.
            dtype: of the factors.
        """
        if torch.is_grad_enabled():
            return "create_graph=True"
        param = slot.param
        # Hooks expect a gradient; those of the second kind one in `p.grad`.
        if param._backward_hooks or param._post_accumulate_grad_hooks:
            return HOOK
        if self._collector.scaling.is_linked:
            return LINKED
        return product.why_not(slot.device, dtype)

    def add(self, slot: Slot, a: Tensor, b: Tensor) -> None:
        """Add `a b` to an accumulator, and let `param.grad` show it.

        Args:
            slot: of a parameter of shape [m, n].
            a: [m, k].
            b: [k, n].
        """
        collector = self._collector
        collector.make_ready(slot)
        slot.allocate()
        scale, adds = collector.window.scale(), slot.fill is not Fill.EMPTY
        if self._stream is None:
            product.add_product(slot.acc, a, b, alpha=scale, adds=adds)
        else:
            self._add_on_stream(slot.acc, a, b, scale, adds)
        slot.fill, slot.is_zero, slot.sums_version = Fill.CURRENT, False, None
        slot.param.grad = slot.grad
        collector.reduction.added((slot,))

    def _add_on_stream(self, acc: Tensor, a: Tensor, b: Tensor, scale: float, adds: bool) -> None:
        """The same where the layer ran on a stream of its own, perhaps: autograd, which sees no
        gradient, does not wait for it."""
        home = self._stream
        assert home is not None
        raw = torch._C._cuda_getCurrentRawStream(acc.device.index)
        if raw == home.cuda_stream or torch.cuda.is_current_stream_capturing():
            product.add_product(acc, a, b, alpha=scale, adds=adds)
            return
        current = torch.cuda.current_stream(acc.device)
        current.wait_stream(home)
        product.add_product(acc, a, b, alpha=scale, adds=adds)
        home.wait_stream(current)
