"""Checks of the numbers that the operations are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..rules.number import number

_FROM_ZERO = "from 0", lambda value: value >= 0.0
# What torch's classes allow, by the names of the keywords.
_ALLOWED: dict[str, tuple[str, Callable[..., bool]]] = {
    "lr": _FROM_ZERO,
    "eps": _FROM_ZERO,
    "weight_decay": _FROM_ZERO,
    "momentum": _FROM_ZERO,
    "momentum_decay": _FROM_ZERO,
    "lr_decay": _FROM_ZERO,
    "alpha": _FROM_ZERO,
    "rho": ("from 0 to 1", lambda rho: 0.0 <= rho <= 1.0),
    "betas": ("from 0 to below 1", lambda *betas: all(0.0 <= beta < 1.0 for beta in betas)),
    "etas": (
        "one below 1, one above",
        lambda low, high: 0.0 < low < 1.0 < high,
    ),
}
_PAIRS = ("betas", "etas", "step_size_limits")


def check_ranges(function: str, given: Mapping[str, Any]) -> None:
    """Keywords have values that torch's class takes, too. Tensors on a device are not read.

    Raises:
        ValueError: naming the keyword and what is allowed.
    """
    for name, value in given.items():
        members = [value]
        if name in _PAIRS:
            members = list(value) if hasattr(value, "__iter__") else []
            if len(members) != 2:
                raise ValueError(f"{function}: {name} must be a pair of numbers, got {value!r:.60}")
        words, allows = _ALLOWED.get(name, ("", None))
        numbers = [None if _is_elsewhere(member) else number(member) for member in members]
        if allows is None or None in numbers or allows(*numbers):
            continue
        raise ValueError(
            f"{function}: {name} must be {words}, as torch's class has it; got {value!r:.60}"
        )
    if given.get("nesterov") and (not given.get("momentum") or given.get("dampening")):
        raise ValueError(f"{function}: nesterov=True needs a momentum and no dampening")


def check_number(name: str, value: Any) -> None:
    """A number, or a tensor of one element, which is not read.

    Raises:
        TypeError: for anything else.
    """
    is_number = value.numel() == 1 if isinstance(value, Tensor) else number(value) is not None
    if not is_number:
        raise TypeError(f"{name} must be a number, or a tensor of one element; got {value!r:.60}")


def _is_elsewhere(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"
