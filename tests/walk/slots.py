"""What the specification is made of: expectations, gradients with their error, parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tests.walk.numbers import gamma

# Warnings. The last two are about loops that are probably wrong; nobody promises when they come.
DISCARDED, EMPTY = "the window is discarded", "an empty micro-batch"
MANY, RATE = "several backwards", "the rate changed inside a window"


class Unspecified(Exception):
    """Nothing is promised for this call here."""


@dataclass
class Expected:
    """What a call must give: an error, and warnings."""

    error: type[Exception] | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass
class Grad:
    """A gradient in float64, and how far fp32 may be from it."""

    value: Tensor
    error: Tensor

    def plus(self, more: Tensor, scale: float) -> Grad:
        added = more * scale
        value = self.value + added
        return Grad(value, self.error + gamma(8) * (self.value.abs() + added.abs()))


@dataclass
class Slot:
    """One parameter.

    Attributes:
        acc: what the open window holds of it; None: nothing, so that it is not updated.
        grad: what p.grad shows; the same object as `acc` where it is the accumulator.
        is_known: whether `grad` is promised to show just that.
        arrived: whether the open micro-batch has brought a gradient.
        needs_grad: requires_grad.
        is_attached: whether the wrapper has seen it need a gradient.
        by_save: whether a save may have been what saw that.
        is_pending: whether `grad` has not been taken up.
    """

    needs_grad: bool
    acc: Grad | None = None
    grad: Grad | None = None
    is_known: bool = True
    arrived: bool = False
    is_attached: bool = True
    by_save: bool = False
    is_pending: bool = False

    def show(self, grad: Grad | None) -> None:
        self.grad, self.is_known = grad, True

    def hide(self) -> None:
        """p.grad is None; what the window holds comes back with some later call."""
        self.grad, self.is_known, self.is_pending = None, self.acc is None, False

    @property
    def is_assigned(self) -> bool:
        """Whether p.grad was set by somebody and has not been taken up."""
        return self.grad is not None and self.grad is not self.acc and self.is_pending
