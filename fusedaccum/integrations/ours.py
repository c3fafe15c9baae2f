"""Our optimizers among those that a framework has, and what its log takes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..update.record import Metric
from .face import SharingOptimizer

PREFIX = "fusedaccum/"
MAX_DEPTH = 8  # of optimizers around optimizers


def find(optimizers: Sequence[Any], whose: str, advice: str) -> dict[str, SharingOptimizer]:
    """Ours among `optimizers`, also inside those that Accelerate or an engine puts around them.

    Args:
        optimizers: of a framework.
        whose: "the Trainer", say.
        advice: how to wrap there.

    Returns:
        Each of ours, by what its metrics' names begin with: nothing for a framework's only
        optimizer, else its index, as in "1/".

    Raises:
        ValueError: if there is none, naming what there is and what to do.
    """
    found = {}
    for index, optimizer in enumerate(optimizers):
        ours = _inside(optimizer)
        if ours is not None:
            found["" if len(optimizers) == 1 else f"{index}/"] = ours
    if not found:
        names = ", ".join(_described(optimizer) for optimizer in optimizers) or "none at all"
        raise ValueError(
            f"there is no FusedAccumOptimizer to log the metrics of: {whose} has {names}. "
            f"{advice}, or leave the callback out"
        )
    return found


def check_prefix(prefix: object) -> str:
    """Validate what the names of logged values begin with."""
    if not isinstance(prefix, str):
        raise TypeError(
            f'prefix must be a str, which may be empty ("{PREFIX}", say), got {prefix!r} of type '
            f"{type(prefix).__name__}"
        )
    return prefix


def metrics_of(found: Mapping[str, SharingOptimizer], prefix: str) -> dict[str, Metric]:
    """What `find` has found tells, of those that have updated; nothing waits for the device."""
    return {
        f"{prefix}{which}{name}": value
        for which, optimizer in found.items()
        if (metrics := optimizer.metrics())["updates"]
        for name, value in metrics.items()
    }


def _layers(optimizer: Any) -> list[Any]:
    """An optimizer, the one inside it, and so on."""
    layers = [optimizer]
    while len(layers) < MAX_DEPTH and not isinstance(layers[-1], SharingOptimizer):
        inner = getattr(layers[-1], "optimizer", None)
        if inner is None:
            break
        layers.append(inner)
    return layers


def _inside(optimizer: Any) -> SharingOptimizer | None:
    last = _layers(optimizer)[-1]
    return last if isinstance(last, SharingOptimizer) else None


def _described(optimizer: Any) -> str:
    """`AcceleratedOptimizer(AdamW)`."""
    names = [type(layer).__name__ for layer in _layers(optimizer) if layer is not None]
    return "(".join(names) + ")" * (len(names) - 1) if names else "none at all"
