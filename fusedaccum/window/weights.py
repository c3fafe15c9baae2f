"""One window's arithmetic: weights in, scale and correction out.

    acc    += (w_i / W_ref) * g_i                         for every micro-batch i, as it arrives
    update  = acc * (W_ref / sum w_i) = sum w_i g_i / sum w_i

W_ref is known before the window ends: N times the first weight where the wrapper counts to N, so
that the correction of a full, evenly weighted window is exactly 1; the first weight where the loop
owns a weighted window. A loop that divides its own loss gets scale 1 and correction 1: the sum.
Processes that average their sums need the same W_ref: that of weights of 1.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .warn import warn


@dataclass
class Window:
    """The open window.

    Args:
        steps: micro-batches per window, or None where the loop owns it.
    """

    steps: int | None
    micro_batches: int = 0  # closed so far
    total: float = 0.0  # sum of the closed micro-batches' weights
    reference: float | None = None  # W_ref, fixed by the first micro-batch
    weight: float | None = None  # of the open micro-batch, where micro_batch() gave one
    block: weakref.ref[Any] | None = None  # the generator of the last micro_batch() block
    max_norm: float | None = None  # what clip_grad_norm_() asked for, instead of the setting
    is_explicit: bool | None = None  # whether this window's micro-batches come with weights
    is_shared: bool = False  # whether the sums are averaged over processes

    @property
    def is_inside(self) -> bool:
        """Whether a micro_batch() block is being run."""
        generator = None if self.block is None else self.block()
        if generator is None:
            return False
        state = inspect.getgeneratorstate(generator)
        return state in (inspect.GEN_RUNNING, inspect.GEN_SUSPENDED)

    @property
    def is_weighted(self) -> bool:
        """Whether the update is a weighted mean (rather than the loop's plain sum)."""
        return self.steps is not None or self.reference is not None or self.weight is not None

    @property
    def is_last(self) -> bool:
        """Whether the open micro-batch is the one that fills the window."""
        return self.steps is not None and self.micro_batches == self.steps - 1

    def check_arrival(self) -> None:
        """Gradients come: all micro-batches of a window have a weight, or none has.

        Raises:
            RuntimeError: for a mixture.
        """
        explicit = self.weight is not None
        if self.is_explicit is None:
            self.is_explicit = explicit
        elif self.is_explicit is not explicit:
            here = "inside" if explicit else "outside"
            raise RuntimeError(
                f"backward() {here} micro_batch(weight=...) in a window whose other micro-batches "
                f"ran {'outside' if explicit else 'inside'} it: their gradients cannot be weighed "
                "against each other. Use micro_batch() for every micro-batch of a window, or none"
            )

    def scale(self) -> float:
        """What the open micro-batch's gradients are multiplied with as they are added."""
        if not self.is_weighted:
            return 1.0
        weight = 1.0 if self.weight is None else self.weight
        if self.reference is None:
            self.reference = (1.0 if self.is_shared else weight) * (self.steps or 1)
        return weight / self.reference

    def close_micro_batch(self) -> None:
        """Count the open micro-batch."""
        self.scale()  # fixes W_ref even if no gradient arrived
        self.total += 1.0 if self.weight is None else self.weight
        self.micro_batches += 1
        self.weight = None

    def pass_micro_batch(self) -> None:
        """Other processes close one, and this one has no data: it counts, without a weight."""
        self.micro_batches += 1

    def correction(self) -> float:
        """What the accumulated sum is multiplied with to make it the mean."""
        if self.reference is None or self.total == 0.0:
            return 1.0
        return self.reference / self.total

    def correction_so_far(self, is_open: bool) -> float:
        """`correction` of what has been added so far.

        Args:
            is_open: whether the open micro-batch has contributed and counts too.
        """
        if not self.is_weighted or self.reference is None:
            return 1.0
        total = self.total_so_far(is_open)
        return self.reference / total if total else 1.0

    def total_so_far(self, is_open: bool) -> float:
        """The sum of weights, with that of the open micro-batch where it counts."""
        # A loop's own micro-batch is open inside its micro_batch() block alone, with a weight.
        weight = (0.0 if self.steps is None else 1.0) if self.weight is None else self.weight
        return self.total + (weight if is_open else 0.0)

    def saved(self) -> dict[str, Any]:
        """What a checkpoint has to tell of the window, beside its accumulators."""
        names = ("micro_batches", "total", "reference", "is_explicit", "weight", "max_norm")
        return {name: getattr(self, name) for name in names}

    def go_on(self, saved: Mapping[str, Any]) -> None:
        """Go on with the window of a checkpoint; older ones lack the last two entries."""
        for name in self.saved():
            setattr(self, name, saved.get(name))

    def warn_discarded(self, cause: str) -> None:
        """Say that the closed micro-batches of a window are given up, if there are any."""
        if not self.micro_batches:
            return
        warn(
            f"{cause} discards the whole window: {self.micro_batches} closed micro-batches. Call "
            "step() after every backward(). If the backward() belonged to another optimizer and "
            "only passed through these parameters (the generator's step of a GAN), call "
            "requires_grad_(False) on them around it"
        )

    def reset(self) -> None:
        """Start the next window. A micro_batch() block that is being run becomes its first."""
        self.micro_batches, self.total = 0, 0.0
        self.reference = self.is_explicit = self.max_norm = None
        if not self.is_inside:
            self.weight = None
