"""What other processes have to do with one optimizer's window: nothing, where it is alone.

`distributed.Reduction` is what takes the place of `Alone` where gradients are averaged over the
processes of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from .slots import Slot
from .weights import Window


class Reducing(Protocol):
    """Averages accumulators over processes, as the last backward of a window fills them.

    Attributes:
        queue_bytes: how many bytes of fresh gradients may wait to be added, in this backward.
        is_running: whether this backward averages what it fills.
        is_average: whether the accumulators hold an average of all processes.
        rank, world: which of how many processes this is.
    """

    rank: int
    world: int
    queue_bytes: float
    is_running: bool
    is_average: bool

    def begin(self) -> None:
        """A backward begins, and it is inside no other."""

    def added(self, slots: Iterable[Slot]) -> None:
        """Gradients were added in a backward, all or in part."""

    def end(self) -> None:
        """The backward that `begin` was told of has brought everything."""

    def changed(self) -> None:
        """The accumulators were changed between backwards, in this process alone."""

    def complete(self, closes: bool) -> None:
        """The window is about to be used: average what is not averaged yet.

        Args:
            closes: whether the open micro-batch counts.
        """

    def correction(self, window: Window) -> float | Tensor:
        """What makes the accumulated sum the mean; a 0-d tensor if it is of many processes."""

    def reset(self) -> None:
        """The window is over, or was discarded."""

    def detach(self) -> None:
        """Gradients will not be averaged here any more."""


class Alone:
    """One process."""

    rank, world = 0, 1
    queue_bytes, is_running, is_average = math.inf, False, False

    def begin(self) -> None:
        pass

    def added(self, slots: Iterable[Slot]) -> None:
        pass

    def end(self) -> None:
        pass

    def changed(self) -> None:
        pass

    def complete(self, closes: bool) -> None:
        pass

    def correction(self, window: Window) -> float | Tensor:
        return window.correction()

    def reset(self) -> None:
        pass

    def detach(self) -> None:
        pass
