"""Which layers of a model are fused for one optimizer, and why others are not."""

from __future__ import annotations

import operator
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakMethod

from torch import Tensor, nn

from ..backends import product
from ..backends.private import why_no_products
from ..backends.tensors import is_dtensor
from . import linear_traced
from .collector import Collector
from .linear import is_linear, is_swapped_for, refusal, swap, swap_back
from .products import HOOK, LINKED, Products

Refs = list["weakref.ref[nn.Module]"]


class FusedLinears(NamedTuple):
    """What `fuse_linear_wgrad` did.

    Attributes:
        fused: names of the modules whose weight gradient goes from the GEMM into the accumulator.
        skipped: the other Linear modules by name, each with the reason.
    """

    fused: tuple[str, ...]
    skipped: dict[str, str]


class Linears:
    """The fused layers of one optimizer.

    Args:
        collector: has its accumulators.
    """

    def __init__(self, collector: Collector) -> None:
        self._modules: Refs = []
        self._skipped: dict[str, str] = {}
        self._at_end: weakref.finalize[..., Products] | None = None
        self._products = Products(collector)
        self.follow(collector)

    def follow(self, collector: Collector) -> None:
        """The parameters moved, and have other accumulators from now on."""
        self._collector = collector
        self._products.follow(collector)
        for module in self._alive():
            self._mark(module)
        collector.attached.when_taken_over = WeakMethod(self.unfuse)

    def fuse(self, model: nn.Module, min_numel: int) -> FusedLinears:
        """See `FusesLinear.fuse_linear_wgrad`."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        least = _check_numel(min_numel)
        fused: list[str] = []
        self._skipped = {}
        if self._at_end is None:  # a module may live longer than the optimizer
            self._at_end = weakref.finalize(self._products, _swap_back, self._modules)
            self._at_end.atexit = False
        for name, module in model.named_modules():
            if not is_linear(module):
                continue
            if not is_swapped_for(module, self._products):
                reason = why_no_products() or refusal(module)
                reason = reason or self._refusal(module._parameters["weight"], least)
                if reason is not None:
                    self._skipped[name] = reason
                    continue
                self._modules.append(weakref.ref(module))
                swap(module, self._products)
            self._mark(module)
            fused.append(name)
        # Products for one weight arrive each by itself, gradients as their sum.
        self._collector.reduction.expect_anew()
        return FusedLinears(tuple(fused), dict(self._skipped))

    def unfuse(self) -> None:
        """Make every module what it was; accumulators stay as they are."""
        _swap_back(self._modules)
        self._skipped = {}
        self._products.ordinary.clear()
        self._collector.reduction.expect_anew()

    def describe(self) -> Sequence[str]:
        """A line for `repr`, or none."""
        modules = self._alive()
        if not modules and not self._skipped:
            return []
        weights = {module._parameters.get("weight") for module in modules} - {None}
        numel = sum(weight.numel() for weight in weights if weight is not None)
        line = f"  linear: {len(modules)} fused, {numel:,} parameters"
        for what, reasons in (
            ("skipped", Counter(reason.split(":")[0] for reason in self._skipped.values())),
            ("gradients on the ordinary path", self._products.ordinary),
        ):
            if reasons:
                listing = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
                line += f"; {what}: {listing}"
        if linear_traced.WHY_NOT is not None:
            line += f"; not under torch.compile: {linear_traced.WHY_NOT}"
        return [line]

    def _alive(self) -> list[nn.Module]:
        found = (ref() for ref in self._modules)
        return [m for m in found if m is not None and is_swapped_for(m, self._products)]

    def _mark(self, module: nn.Module) -> None:
        weight = module._parameters.get("weight")
        slot = None if weight is None else self._products.slot_of(weight)
        if slot is not None:
            slot.takes_products = True

    def _refusal(self, weight: Tensor | None, min_numel: int) -> str | None:
        """Why the gradient of a weight cannot be taken; None if it can."""
        assert weight is not None
        if is_dtensor(type(weight)):
            return "a DTensor: FSDP2 and tensor parallelism bring its gradient reduced"
        if type(weight) is not nn.Parameter:
            return f"a weight of another class: {type(weight).__name__}"
        if not weight.requires_grad:
            return "frozen"
        slot = self._products.slot_of(weight)
        if slot is None:
            return "another optimizer's: its weight is in no param group of this one"
        if weight.numel() < min_numel:
            return f"small: {weight.numel():,} elements, fewer than min_numel={min_numel:,}"
        if 1 in weight.shape or not weight.numel():
            return f"small: a weight of shape {tuple(weight.shape)}"
        if not slot.is_contiguous or slot.difference() is not None:
            return "a weight that is not contiguous, or not what it was when it was wrapped"
        if self._collector.scaling.is_linked:
            return LINKED
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            return HOOK
        return product.why_not(slot.device, slot.dtype)


def _swap_back(modules: Refs) -> None:
    for ref in modules:
        module = ref()
        if module is not None:
            swap_back(module)
    modules.clear()


def _check_numel(value: object) -> int:
    advice = "min_numel must be an int >= 0, the smallest weight that is fused, in elements"
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{advice}; got {value!r} of type {type(value).__name__}") from None
    if number < 0:
        raise ValueError(f"{advice}; got {number}")
    return number
