"""Refuses window numbers and states of a checkpoint that nobody has written."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from .entries import MASTER

# What a float32 and an int64 hold: the device's tables are of those.
LARGEST = {float: torch.finfo(torch.float32).max, int: torch.iinfo(torch.int64).max}


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST[int]


def _is_number(value: object, *, positive: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return (value > 0 if positive else value >= 0) and value <= LARGEST[float]


def _is_readable(value: object) -> bool:
    """Whether a value is a floating-point tensor whose numbers are there."""
    is_right = isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta
    return is_right and value.layout is torch.strided  # type: ignore[attr-defined]


def refuse_malformed_states(
    index: Any, entry: Any, names: Set[str], step_key: str | None, knows_step: bool
) -> None:
    """Raise for states of a parameter that an update could not go on from.

    torch itself fails at some of them, after it has replaced the states of before.

    Args:
        index: torch's, of the parameter.
        entry: its states, with a master maybe.
        names: of the states that are tensors of its shape.
        step_key: name of its step count, if its rule has one.
        knows_step: whether the key "fusedaccum" has that count.

    Raises:
        ValueError: naming the entry, what was found and what is allowed.
    """

    def refuse(name: str, found: object, allowed: str) -> None:
        raise ValueError(
            f"the checkpoint's state {name!r} of parameter {index} must be {allowed}, got "
            f"{found!r:.60}; nothing was loaded"
        )

    if not isinstance(entry, Mapping):
        raise ValueError(
            f"the checkpoint's states of parameter {index} must be a dict, got {entry!r:.60}; "
            "nothing was loaded"
        )
    for name in names:
        value = entry.get(name)
        if value is not None and not _is_readable(value):
            refuse(name, value, "a dense floating-point tensor with data")
    if step_key is None:
        return
    step = entry.get(step_key)
    if step is None and step_key not in entry:
        if not knows_step and any(isinstance(entry.get(name), Tensor) for name in names - {MASTER}):
            refuse(step_key, None, "there beside the others")
        return
    if isinstance(step, Tensor) and step.dim() == 0 and not (step.is_meta or step.is_complex()):
        step = step.item()
    if not _is_number(step):
        refuse(step_key, step, "a finite number >= 0, or a 0-d tensor of one")


def _is_subset(value: object, known: Collection[Any]) -> bool:
    """Whether `value` is a list of some of `known`."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(index, Hashable) and index in known for index in value
    )


def refuse_malformed(extra: Mapping[str, Any], ids: Set[Any]) -> None:
    """Raise for what a checkpoint's key "fusedaccum" cannot hold.

    Args:
        extra: what it holds.
        ids: torch's indices of the checkpoint's parameters.

    Raises:
        ValueError: naming the entry, what was found and what is allowed.
    """

    def check(name: str, value: object, is_right: bool, allowed: str) -> None:
        if not is_right:
            raise ValueError(
                f'the checkpoint\'s "fusedaccum" entry {name} must be {allowed}, got {value!r}; '
                "nothing was loaded"
            )

    def check_mapping(name: str) -> Mapping[Any, Any]:
        value = extra.get(name, {})
        is_right = isinstance(value, Mapping) and set(value) <= ids
        check(name, value, is_right, "a dict with indices of its parameters as keys")
        return value if isinstance(value, Mapping) else {}

    steps = extra.get("gradient_accumulation_steps")
    allowed = "an int >= 1 or None"
    check("gradient_accumulation_steps", steps, steps is None or _is_int(steps, 1), allowed)
    window = extra.get("window")
    names = ("micro_batches", "total", "reference", "is_explicit")
    is_right = isinstance(window, Mapping) and all(name in window for name in names)
    check("window", window, is_right, f"a dict with {', '.join(names)}")
    assert isinstance(window, Mapping)

    closed, total = window["micro_batches"], window["total"]
    last = math.inf if steps is None else steps - 1
    right_count = _is_int(closed, 0) and closed <= last
    allowed = "an int >= 0, and below gradient_accumulation_steps where that is a number"
    check("window['micro_batches']", closed, right_count, allowed)
    right_total = _is_number(total, positive=bool(closed))
    check("window['total']", total, right_total, "a finite number, above 0 in an open window")
    for name in ("reference", "weight", "max_norm"):
        value = window.get(name)
        is_right = value is None or _is_number(value, positive=True)
        check(f"window['{name}']", value, is_right, "a positive finite number or None")
    is_right = window["reference"] is not None or not closed
    check("window['reference']", None, is_right, "a number in an open window")
    explicit = window["is_explicit"]
    check(
        "window['is_explicit']",
        explicit,
        explicit is None or type(explicit) is bool,
        "a bool or None",
    )
    overflow = window.get("overflow", 0.0)
    check("window['overflow']", overflow, _is_number(overflow), "a finite number >= 0")

    accumulators = check_mapping("accumulators")
    for name, tensors in (("accumulators", accumulators), ("masters", check_mapping("masters"))):
        for index, value in tensors.items():
            found = value.dtype if isinstance(value, Tensor) else value
            allowed = "a dense floating-point tensor with data"
            check(f"{name}[{index!r}]", found, _is_readable(value), allowed)
    for index, value in check_mapping("steps").items():
        check(f"steps[{index!r}]", value, _is_number(value), "a finite number >= 0")
    arrived = extra.get("arrived", [])
    is_right = _is_subset(arrived, accumulators)
    check("arrived", arrived, is_right, "a list of indices that have an accumulator")
    zeros = extra.get("zeros", [])
    check("zeros", zeros, _is_subset(zeros, ids), "a list of indices of its parameters")
    skipped = extra.get("skipped_steps", 0)
    check("skipped_steps", skipped, _is_int(skipped, 0), "an int >= 0")
    updates = extra.get("updates", 0)
    check("updates", updates, _is_int(updates, 0), "an int >= 0")
    rank, world = extra.get("rank", 0), extra.get("world", 1)
    check("world", world, _is_int(world, 1), "an int >= 1")
    check("rank", rank, _is_int(rank, 0) and rank < world, "an int from 0 to world - 1")
