"""What people do to `p.grad` between backwards: they take it away, zero it or assign another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .backwards import Backwards
from .segments import Fill, Segment
from .window import Window


@dataclass
class Seen:
    """What a look at every parameter's `grad` found.

    Attributes:
        shown: parameters that show a sum of closed micro-batches.
        hidden: parameters that have one and show None.
        assigned: parameters with a gradient that somebody assigned.
        is_emptied: whether all that counts as the window was taken away.
    """

    shown: list[Segment] = field(default_factory=list)
    hidden: list[Segment] = field(default_factory=list)
    assigned: list[tuple[Segment, Tensor]] = field(default_factory=list)
    is_emptied: bool = False


class ByHand:
    """Sees the changes that came through no hook.

    Args:
        segments: by parameter; others may join.
        window, backwards: of the same optimizer.
    """

    def __init__(
        self, segments: Mapping[Tensor, Segment], window: Window, backwards: Backwards
    ) -> None:
        self._segments, self._window, self._backwards = segments, window, backwards

    def look(self) -> Seen:
        """Look at every parameter's `grad`; what was taken away is not part of the window now."""
        seen = Seen(is_emptied=self.is_emptied())
        loop_owned = self._window.steps is None
        for segment in self._segments.values():
            grad = segment.param.grad
            if grad is segment.grad:
                if segment.fill is Fill.EARLIER:
                    seen.shown.append(segment)
            elif grad is not None:
                seen.assigned.append((segment, grad))
            elif loop_owned or segment.fill is Fill.CURRENT:
                segment.fill = Fill.EMPTY
            elif segment.fill is Fill.EARLIER:
                seen.hidden.append(segment)
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
        grads = (s.param.grad for s in self._segments.values() if s.fill >= least)
        return next(grads, self) is None and all(grad is None for grad in grads)

    def is_written(self, segment: Segment) -> bool:
        """Whether somebody wrote a sum of closed micro-batches in place."""
        return (
            segment.fill is Fill.EARLIER
            and segment.grad is not None
            and segment.grad._version != segment.closed_version
        )

    def is_zeroed(self) -> bool:
        """Whether whoever wrote sums of closed micro-batches left zeros alone. Waits for them."""
        if not self._window.micro_batches:
            return False
        written = [
            s for s in self._segments.values() if self.is_written(s) and s.numel and not s.is_zero
        ]
        if not written or not any(bool(s.acc.any()) for s in written):
            return bool(written)
        for segment in written:  # scaled, say: not asked again
            assert segment.grad is not None
            segment.closed_version = segment.grad._version
        return False

    def drop_assigned(self) -> None:
        """Forget gradients that somebody assigned and that no micro-batch has taken over."""
        for segment in self._segments.values():
            if segment.param.grad is not segment.grad and segment.param.grad is not None:
                segment.param.grad = segment.grad if segment.fill else None
