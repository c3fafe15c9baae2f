"""From full accumulators to new weights: the fused step, or the wrapped optimizer's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import Correction
from ..rules import registry
from ..window.collector import Collector
from .fused import Apply, FusedStep
from .masters import Masters
from .record import Record
from .skips import SkipWatch
from .states import States
from .wrapped import WrappedStep


class Updater:
    """Applies updates of one optimizer.

    Args:
        optimizer: the wrapped one; its `state` and `param_groups` are read and written.
        collector: where the accumulators are.
        masters: of its parameters.
        record: what the host remembers of the updates.
        is_stochastic: whether bf16 parameters are rounded stochastically.
        seed: of that.

    Attributes:
        masters, states: of the parameters.
        fused, wrapped: the two kinds of step.
        grad_norm: of the last update, 0-d on the device, or None.
        record: as given.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        collector: Collector,
        masters: Masters,
        record: Record,
        *,
        is_stochastic: bool = False,
        seed: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.collector = collector
        self.masters = masters
        self.states = States(optimizer, collector)
        self.fused = FusedStep(optimizer, collector, masters, self.states, seed)
        self.wrapped = WrappedStep(optimizer, collector, masters, self.states)
        self.grad_norm: Tensor | None = None
        self.record = record
        self._is_stochastic = is_stochastic
        self._watch = SkipWatch()
        self.refuse_stochastic()

    @property
    def is_fused(self) -> bool:
        """Whether every param group has a fused rule; one without takes all to the wrapped step."""
        return registry.serve(self.optimizer)

    def refuse_stochastic(self) -> None:
        """Raise if parameters are to be rounded stochastically by a step that cannot.

        Raises:
            ValueError: saying that a fused rule is needed, and why there is none.
        """
        if self._is_stochastic and not self.is_fused:
            reason = registry.reason(self.optimizer)
            raise ValueError(f"stochastic_rounding=True needs a fused rule: {reason}")

    @torch.no_grad()
    def prepare(self, max_norm: float | None, skip_nonfinite: bool, is_scaled: bool) -> Apply:
        """Make one update with what the window holds ready. Weights and states do not change.

        Args:
            max_norm: clip to it, or None.
            skip_nonfinite: leave everything as it was where the norm is not finite.
            is_scaled: whether a GradScaler takes part, so that the factor is a tensor.

        Returns:
            What applies it. Until that is called, all of this may be given up and done again.
        """
        if not self.collector.slots.is_any_filled:
            return lambda correction: None  # torch's step() without a gradient does nothing either
        self.states.forget_provisional()
        self.refuse_stochastic()
        skip = skip_nonfinite or is_scaled
        partials = self.collector.sums_of_squares() if max_norm is not None or skip else None
        step = self.fused if self.is_fused else self.wrapped
        update = step.prepare(max_norm, partials, skip)
        if update is None:
            return lambda correction: None
        scalars = self.states.scalars

        @torch.no_grad()
        def apply(correction: Correction) -> None:
            self.grad_norm = None if partials is None else scalars.norm
            update(correction)
            if skip:
                self._watch.updated(scalars.skipped)

        return apply

    def update_as_is(self) -> None:
        """Update with the sum that the window holds: no norm, no clipping, no skip."""
        self.prepare(None, False, False)(Correction())

    def on_masters(self, method: Callable[[], Any]) -> Any:
        """Call a method that rewrites parameters (schedule-free optimizers' train() and eval())."""
        return method() if self.is_fused else self.wrapped.on_masters(method)
