"""Notices a training in which no window is finite any more, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..window.warn import warn

# Updates between two looks; a warning comes when all of them were skipped.
PERIOD = 16


class SkipWatch:
    """Warns, once, when every update of a period was skipped because of NaN or Inf.

    On a GPU a look starts a copy of the count to the host, and the next look reads it.
    """

    def __init__(self) -> None:
        self._updates = 0
        self._before: int | None = None  # the count that was read last
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None
        self._has_warned = False

    def updated(self, skipped: Tensor) -> None:
        """An update has been made, or skipped.

        Args:
            skipped: how many were, 0-d int64 on the device.
        """
        self._updates += 1
        if self._has_warned or self._updates % PERIOD != 1:
            return
        if skipped.device.type != "cuda":
            self._look(int(skipped))
        elif not torch.cuda.is_current_stream_capturing():
            self._look_later(skipped)

    def _look_later(self, skipped: Tensor) -> None:
        if self._copy is not None:
            count, arrived = self._copy
            if not arrived.query():
                return
            self._look(int(count))
        count = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=True)
        count.copy_(skipped, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._copy = count, arrived

    def _look(self, count: int) -> None:
        before, self._before = self._before, count
        if before is not None and count - before >= PERIOD:
            self._has_warned = True
            warn(
                f"the last {count - before} updates were all skipped, because the gradient of each "
                "window held NaN or Inf: the model does not train any more (opt.skipped_steps is "
                f"{count}). Lower the learning rate, or find the operation that overflows with "
                "torch.autograd.set_detect_anomaly(True); skip_nonfinite=False lets the NaN "
                "through"
            )
