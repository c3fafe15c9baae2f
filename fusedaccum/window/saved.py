"""The open window as a checkpoint keeps it: its numbers, its accumulators, and what has arrived."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor

from .collector import Collector
from .slots import Fill
from .watch import place


def window_numbers(collector: Collector) -> dict[str, Any]:
    """What is kept beside the accumulators. Waits for the device where a GradScaler is linked."""
    overflow = collector.scaling.overflow
    return {**collector.window.saved(), "overflow": 0.0 if overflow is None else float(overflow)}


def places(collector: Collector, has_weights: bool) -> list[tuple[int, int]]:
    """The (rank, number of processes) whose open windows this process can go on with, its own
    first. (0, 1) is that of one process, or of a window that is the same in all.

    Args:
        collector: of the parameters.
        has_weights: whether the window's micro-batches have some: each process knows its own.
    """
    if collector.reduction.comes_averaged and not has_weights:
        return [(0, 1), place()]
    return [place()]


def open_accumulators(collector: Collector) -> dict[Tensor, Tensor]:
    """The accumulators of a window that is still to be updated, by parameter.

    Where the loop owns the window, `param.grad` may still show the last one, which it need not.
    """
    window = collector.window
    if not window.micro_batches and not collector.slots.has_arrivals:
        return {}
    return {
        param: slot.grad
        for param, slot in collector.slots.items()
        if slot.fill and slot.grad is not None and (window.steps or param.grad is not None)
    }


def zeros(collector: Collector) -> set[Tensor]:
    """Parameters that show zeros of zero_grad(set_to_none=False) and nothing since: an update uses
    them, though no gradient arrives. Waits for those that somebody wrote."""
    return {
        param
        for param, slot in collector.slots.items()
        if slot.fill and param.grad is slot.grad and (slot.is_zero or slot.is_written)
        if not slot.acc.any()
    }


def go_on(
    collector: Collector,
    accumulators: Mapping[Tensor, tuple[Tensor, bool]],
    zeros: Set[Tensor],
    numbers: Mapping[str, Any] | None,
) -> None:
    """Go on with the window of a checkpoint, after the one that was open was discarded and no
    parameter shows a gradient.

    Args:
        collector: of the same parameters.
        accumulators: by parameter, with whether its open micro-batch has contributed.
        zeros: the parameters that show zeros.
        numbers: what `window_numbers` gave; None for a checkpoint without a window.
    """
    for param, slot in collector.slots.items():
        slot.is_zero = False
        if param in accumulators:
            accumulated, has_arrived = accumulators[param]
            slot.restore(accumulated, Fill.CURRENT if has_arrived else Fill.EARLIER)
        elif param in zeros:
            slot.show_zeros()
    if numbers is not None:
        collector.window.go_on(numbers)
        collector.backwards.count = int(collector.slots.has_arrivals)
        collector.scaling.restore(numbers.get("overflow", 0.0))
