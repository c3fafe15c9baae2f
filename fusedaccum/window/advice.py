"""Warnings, each once, about a loop that does not do what its author means."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .collector import Collector
from .warn import warn

_OLD_LOOP = (
    "Call step() and zero_grad() after every backward(): the wrapper counts to "
    "gradient_accumulation_steps={steps} itself, so a loop must not call them in every "
    "{steps}-th iteration only. A loop that counts for itself wraps with "
    "gradient_accumulation_steps=None"
)


class Advice:
    """What one wrapper has warned of, and what it needs to know for that."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._rates: list[Any] = []

    def before_step(self, collector: Collector, groups: list[dict[str, Any]]) -> None:
        """`step()` is about to close a micro-batch, with all that arrived in its accumulators."""
        window, steps = collector.window, collector.window.steps
        count = collector.backwards.count
        has_any = count or collector.slots.has_arrivals or collector.reduction.keeps_back()
        if not has_any and not self._uses_old(collector):
            self._warn(
                "nothing",
                "step() was called, but no gradient arrived since the last one: the backward() "
                "raised, reached none of the optimizer's parameters, or step() was called twice. "
                + (
                    "No parameter has a gradient, so nothing is updated."
                    if steps is None
                    else "The empty micro-batch counts, with a gradient of zero."
                ),
            )
        stray = collector.attached.stray
        if stray is not None:
            self._warn(
                "stray",
                f"a parameter of shape {tuple(stray.shape)} got a gradient, and was taken out of "
                "the param groups before. Its hook is still there, so that p.grad holds one "
                "micro-batch, with the factor of this window, and no update uses it. Freeze it "
                "(requires_grad_(False)). For another optimizer, or to free its memory, take its "
                "states out too (opt.state.pop(p, None)), and then call zero_grad()",
            )
        if steps is None:
            return
        if steps > 1 and count >= steps:
            self._warn(
                "old loop",
                f"{count} backward() calls ran before one step(), so all of them count as one "
                f"micro-batch. {_OLD_LOOP.format(steps=steps)}",
            )
        rates = [None if isinstance(g.get("lr"), Tensor) else g.get("lr") for g in groups]
        # A group that was added or taken away changes no rate.
        is_changed = any(old != new for old, new in zip(self._rates, rates, strict=False))
        if window.micro_batches and is_changed:
            self._warn(
                "scheduler",
                f"the learning rate changed inside a window, from {self._rates} to {rates}: is a "
                "scheduler stepped at every micro-batch? Step it once a window, where "
                "opt.window_closed is True",
            )
        self._rates = rates

    def _uses_old(self, collector: Collector) -> bool:
        """Whether a loop that owns its window updates once more with the gradients of before."""
        return collector.window.steps is None and collector.slots.is_any_filled

    def _warn(self, key: str, text: str) -> None:
        if key not in self._given:
            self._given.add(key)
            warn(text)
