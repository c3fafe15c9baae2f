"""What there is to tell of an optimizer's updates, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.layout import CLIP_EPS
from ..window.reducing import Reducing
from ..window.weights import Window

Metric = Tensor | float


class Record:
    """What the host remembers of the updates.

    Attributes:
        updates: how many there were, with those that were skipped on the device.
        max_norm: what the last one clipped to, or None.
        micro_batches: how many the last window had in this process; None where the loop counts
            them and gives no weights.
        weight_sum: of the last window, over all processes; None where `micro_batches` is.
    """

    def __init__(self) -> None:
        self.updates = 0
        self.max_norm: float | None = None
        self.micro_batches: int | None = None
        self.weight_sum: Metric | None = None

    def note(self, window: Window, reduction: Reducing, max_norm: float | None) -> None:
        """An update has been made with this window, or skipped."""
        self.updates += 1
        self.max_norm = max_norm
        is_counted = window.is_weighted
        self.micro_batches = window.micro_batches if is_counted else None
        self.weight_sum = reduction.total(window) if is_counted else None

    @torch.no_grad()
    def metrics(
        self, norm: Tensor | None, skipped: Tensor, scale: Tensor | None
    ) -> dict[str, Metric]:
        """See `integrations.measured.Measured.metrics`.

        Args:
            norm: of the last update, 0-d on the device.
            skipped: how many updates were, 0-d on the device.
            scale: of a linked GradScaler.
        """
        found: dict[str, Metric] = {"updates": self.updates, "skipped_steps": skipped.clone()}
        if norm is not None:
            found["grad_norm"] = norm.clone()
            if self.max_norm is not None:
                found["clip_coefficient"] = (self.max_norm / (norm + CLIP_EPS)).clamp(max=1.0)
        for name, value in (
            ("micro_batches", self.micro_batches),
            ("weight_sum", self.weight_sum),
            ("loss_scale", scale),
        ):
            if value is not None:
                found[name] = value.clone() if isinstance(value, Tensor) else value
        return found
