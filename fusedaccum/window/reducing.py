"""What other processes have to do with one optimizer's window: nothing, where it is alone.

`distributed.Reduction` is what takes the place of `Alone` where gradients are averaged over the
processes of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from .grad_scaler import Scaling
from .slots import Slot
from .trouble import Trouble
from .weights import Window


class Parts(NamedTuple):
    """What of a collector is averaged, and what that has to know."""

    slots: Mapping[Tensor, Slot]
    window: Window
    scaling: Scaling
    trouble: Trouble
    device: torch.device
    arrive: Callable[[], Callable[[Sequence[Slot]], None] | None]  # see `arrive_together`


class Reducing(Protocol):
    """Averages accumulators over processes, as the last backward of a window fills them.

    Attributes:
        queue_bytes: how many bytes of fresh gradients may wait to be added, in this backward.
        is_running: whether this backward averages what it fills.
        is_average: whether the accumulators hold an average of all processes.
        comes_averaged: whether gradients arrive as averages, so that `complete` may be called at
            any time.
        shares: whether `share` gives others what this process has updated.
        world: how many processes there are.
    """

    queue_bytes: float
    is_running: bool
    is_average: bool
    comes_averaged: bool
    shares: bool
    world: int

    def is_instead_of(self, modules: Sequence[Module]) -> bool:
        """Whether these DDP modules rest because of this."""

    def begin(self) -> None:
        """A backward begins, and it is inside no other."""

    def added(self, slots: Iterable[Slot]) -> None:
        """Gradients were added in a backward, all or in part."""

    def precise(self, slot: Slot, grad: Tensor) -> Tensor:
        """What this process holds of a shard's gradient, as precisely as it is known.

        Args:
            slot: of the parameter.
            grad: as an engine has rounded it.
        """

    def weighed(
        self, fresh: Sequence[tuple[Slot, Tensor]], scale: float
    ) -> Iterable[tuple[Sequence[tuple[Slot, Tensor]], float]]:
        """Gradients that are to be added, with the factor on them: `scale`, or 1 where an engine
        had to weigh them before."""

    def end(self) -> None:
        """The backward that `begin` was told of has brought everything."""

    def changed(self) -> None:
        """The accumulators were changed between backwards, in this process alone."""

    def expect_anew(self) -> None:
        """A parameter may get another number of gradients in each backward from now on."""

    def watch_hooks(self) -> None:
        """Mark the window if somebody has changed the hooks of an engine since gradients of it may
        have arrived."""

    def keeps_back(self) -> bool:
        """Whether an engine keeps gradients back, to bring them with later ones."""

    def refuse_kept(self, is_over: bool) -> None:
        """The open micro-batch is about to be closed.

        Args:
            is_over: whether the window is too.

        Raises:
            RuntimeError: for gradients that an engine keeps back and that would be lost, or come
                with another weight. The window is marked.
        """

    def complete(self, closes: bool) -> None:
        """The window is about to be used: average what is not averaged yet.

        Args:
            closes: whether the open micro-batch counts.
        """

    def correction(self, window: Window) -> float | Tensor:
        """What makes the accumulated sum the mean; a 0-d tensor if it is of many processes."""

    def total(self, window: Window) -> float | Tensor:
        """The sum of the weights; of all processes, as a 0-d tensor, where they average."""

    def whole(self, sums: Tensor) -> Tensor:
        """Partial sums of squares of the whole gradient, from those of what this process holds."""

    def share(self, slots: Sequence[Slot]) -> None:
        """Parameters were updated, each by one process: give all of them to all."""

    def reset(self) -> None:
        """The window is over, or was discarded."""

    def detach(self) -> None:
        """Gradients will not be averaged here any more."""


class Alone:
    """One process; also what others do not do in another way."""

    queue_bytes: float = math.inf
    is_running = is_average = comes_averaged = shares = False
    world = 1

    def is_instead_of(self, modules: Sequence[Module]) -> bool:
        return False

    def begin(self) -> None:
        pass

    def added(self, slots: Iterable[Slot]) -> None:
        pass

    def precise(self, slot: Slot, grad: Tensor) -> Tensor:
        return grad

    def weighed(
        self, fresh: Sequence[tuple[Slot, Tensor]], scale: float
    ) -> Iterable[tuple[Sequence[tuple[Slot, Tensor]], float]]:
        return [(fresh, scale)]

    def end(self) -> None:
        pass

    def changed(self) -> None:
        pass

    def expect_anew(self) -> None:
        pass

    def watch_hooks(self) -> None:
        pass

    def keeps_back(self) -> bool:
        return False

    def refuse_kept(self, is_over: bool) -> None:
        pass

    def complete(self, closes: bool) -> None:
        pass

    def correction(self, window: Window) -> float | Tensor:
        return window.correction()

    def total(self, window: Window) -> float | Tensor:
        return window.total

    def whole(self, sums: Tensor) -> Tensor:
        return sums

    def share(self, slots: Sequence[Slot]) -> None:
        pass

    def reset(self) -> None:
        pass

    def detach(self) -> None:
        pass
