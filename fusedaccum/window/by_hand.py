"""What people do to `p.grad` between backwards: they take it away, zero it or assign another."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import compiling
from .backwards import Backwards
from .slots import Fill, Slot, Slots
from .weights import Window


@dataclass
class Seen:
    """What a look at every parameter's `grad` found.

    Attributes:
        earlier: parameters with a sum of closed micro-batches, which they show, or None instead.
        assigned: parameters with a gradient that somebody assigned.
        is_emptied: whether all that counts as the window was taken away.
    """

    earlier: list[Slot] = field(default_factory=list)
    assigned: list[tuple[Slot, Tensor]] = field(default_factory=list)
    is_emptied: bool = False


class ByHand:
    """Sees the changes that came through no hook.

    Args:
        slots: by parameter; others may join.
        window, backwards: of the same optimizer.
    """

    def __init__(self, slots: Slots, window: Window, backwards: Backwards) -> None:
        self._slots, self._window, self._backwards = slots, window, backwards
        self._clipped: dict[Slot, int] = {}

    def look(self) -> Seen:
        """Look at every parameter's `grad`; what was taken away is not part of the window now."""
        compiling.show()
        seen = Seen(is_emptied=self.is_emptied())
        loop_owned, float32 = self._window.steps is None, torch.float32
        earlier, current = Fill.EARLIER, Fill.CURRENT
        if self._slots.are_shown and self._slots.are_fp32:
            return seen
        for slot in self._slots.values():
            grad, own = slot.param.grad, slot.grad
            if grad is own:
                if grad is not None and grad.dtype is not float32:
                    slot.show_again()
                    slot.param.grad = slot.grad
            elif grad is not None:
                seen.assigned.append((slot, grad))
                continue
            elif loop_owned or slot.fill is current:
                slot.fill = Fill.EMPTY
            if slot.fill is earlier:
                seen.earlier.append(slot)
        return seen

    def is_emptied(self) -> bool:
        """Whether somebody took away all that the window holds; where the wrapper counts, all that
        the open micro-batch has brought (p.grad = None after its step() keeps the window)."""
        window = self._window
        if window.steps is not None:
            may_be, least = self._backwards.count > 0, Fill.CURRENT
        else:
            may_be = window.is_explicit is not None or window.max_norm is not None
            least = Fill.EARLIER
        if not may_be:
            return False  # nearly always at the beginning of a backward
        grads = (s.param.grad for s in self._slots.values() if s.fill >= least)
        return next(grads, self) is None and all(grad is None for grad in grads)

    def is_zeroed(self) -> bool:
        """Whether somebody wrote all sums of closed micro-batches that are shown, and they are
        zeros now. Waits for them where they were written, and nowhere else.

        Where a loop has asked to clip what the last window left, that counts as a window too.
        """
        if not self._window.micro_batches:
            return self._window.max_norm is not None and self._is_zeroed_since_clip()
        may_be = (s for s in self._slots.values() if s.fill and s.numel and not s.is_zero)
        first = next(may_be, None)
        if first is None or (first.param.grad is not None and not first.is_written):
            return False  # nearly always
        filled = [first, *may_be]
        shown = [s for s in filled if s.param.grad is not None] or filled
        if not all(s.is_written for s in shown):
            return False
        if not any(bool(s.acc.any()) for s in shown):
            return True
        for slot in shown:  # scaled, say: not asked again
            slot.note_version()
        return False

    def fault(self) -> str | None:
        """What to say where somebody assigned `p.grad.data`, which accumulators cannot follow."""
        slot = next(iter(self._slots.showing_others()), None)
        if slot is None:
            return None
        return (
            f"p.grad.data of a parameter of shape {tuple(slot.shape)} was assigned, so that p.grad "
            "is not the accumulator any more, which the update uses; nothing was updated. Assign "
            "p.grad itself (p.grad = ...), or write into it in place (p.grad.copy_(...))"
        )

    def note_clip(self) -> None:
        """A loop asks to clip. Before its first backward, that is of what the last window left."""
        is_left = self._window.steps is None and not self._backwards.count
        self._clipped = {
            slot: slot.grad._version
            for slot in (self._slots.values() if is_left else ())
            if slot.fill and slot.grad is not None
        }

    def _is_zeroed_since_clip(self) -> bool:
        shown = [s for s in self._clipped if s.param.grad is not None and s.param.grad is s.grad]
        return bool(shown) and all(
            s.param.grad._version != self._clipped[s] and not s.acc.any()  # type: ignore[union-attr]
            for s in shown
        )

    def drop_assigned(self) -> None:
        """Forget gradients that somebody assigned and that no micro-batch has taken over."""
        if self._slots.are_shown:
            return
        for slot in self._slots.values():
            if slot.param.grad is not slot.grad and slot.param.grad is not None:
                slot.param.grad = slot.grad if slot.fill else None
