"""What a state dict's "state" holds of ours, beside a parameter's own states.

torch.distributed.checkpoint takes "state" and "param_groups" alone, so an open window is there too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..window.slots import Fill, Slot

VERSION = 1
KEY = "fusedaccum"
MASTER = "master_param"
GRAD = "window_grad"
MICRO_BATCHES = "window_micro_batches"
# Whether a window is open, with or without a closed micro-batch.
IS_OPEN = "window_is_open"
# Numbers of an open window, 0-d. "window_step" is the parameter's step count when it was saved,
# "window_fill" its `Fill`, "window_weight" that of the open micro-batch; "window_rank" and
# "window_world" say which of how many processes it is of.
NUMBERS = (
    "window_total", "window_reference", "window_is_explicit", "window_overflow", "window_steps",
    "window_step", "window_fill", "window_weight", "window_rank", "window_world",
)  # fmt: skip
OURS = frozenset((MASTER, GRAD, MICRO_BATCHES, IS_OPEN, *NUMBERS))

StateDict = dict[str, Any]


def without_ours(state_dict: StateDict) -> dict[Any, Any]:
    """A state dict's states without what this module added, also to one that torch loaded."""
    params = {index for group in state_dict["param_groups"] for index in group["params"]}
    state: dict[Any, Any] = {}
    for key, entry in state_dict["state"].items():
        own = entry
        # Some optimizers keep what belongs to no parameter under names of their own.
        if key in params:
            own = {k: v for k, v in entry.items() if k not in OURS}
        if own or not entry:  # many an optimizer takes an entry for a complete one
            state[key] = own
    return state


def without_gaps(state_dict: StateDict) -> StateDict:
    """Without the empty dicts that DCP's unflattening has for states which are not in the file."""
    if KEY in state_dict:
        return state_dict
    state = {
        key: {k: v for k, v in entry.items() if not (isinstance(v, dict) and not v)}
        for key, entry in state_dict["state"].items()
        if isinstance(entry, dict)
    }
    return {**state_dict, "state": {**state_dict["state"], **state}}


def number(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


def open_window(
    slot: Slot, window: StateDict, steps: int | None, step: float | None, place: tuple[int, int]
) -> StateDict:
    """What a parameter's states tell of the open window.

    Args:
        slot: of the parameter.
        window: its numbers, see `window.saved`.
        steps: micro-batches per window, or None.
        step: the parameter's step count, if it is known.
        place: (rank, number of processes) that the window is of.
    """
    reference, weight = window["reference"], window["weight"]
    values = (
        window["total"],
        -1.0 if reference is None else reference,
        bool(window["is_explicit"]),
        window["overflow"],
        steps or 0,
        -1.0 if step is None else step,
        slot.fill,
        -1.0 if weight is None else weight,
        *place,
    )
    return {GRAD: slot.grad, **dict(zip(NUMBERS, map(number, values), strict=True))}


def read_extra(state_dict: StateDict) -> StateDict:
    """What the key "fusedaccum" holds; where it is gone, what the states tell of it.

    A window whose parameter has been updated since is not open any more: plain torch loaded it,
    trained on, and saved it along.
    """
    if KEY in state_dict:
        if not isinstance(state_dict[KEY], Mapping):
            raise ValueError(
                f"the checkpoint's {KEY!r} must be a dict, got {state_dict[KEY]!r}; nothing was "
                "loaded"
            )
        return dict(state_dict[KEY])
    extra: StateDict = {}
    for index, entry in entries_of(state_dict):
        try:
            _add_window(extra, index, entry)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"the numbers of the open window beside the states of parameter {index} are "
                f"malformed ({type(error).__name__}: {error}); nothing was loaded"
            ) from error
    return extra


def entries_of(state_dict: StateDict) -> Iterator[tuple[Any, StateDict]]:
    """The states of each parameter."""
    for group in state_dict["param_groups"]:
        for index in group["params"]:
            yield index, state_dict["state"].get(index, {})


def _add_window(extra: StateDict, index: Any, entry: StateDict) -> None:
    """Take what a parameter's states tell of an open window over into `extra`."""
    micro_batches = int(entry.get(MICRO_BATCHES, 0))
    if not (micro_batches or float(entry.get(IS_OPEN, 0))):
        return
    if GRAD not in entry:
        if micro_batches:  # else this parameter had none
            extra.setdefault("lost", micro_batches)
        return
    values = {name: float(entry[name]) for name in NUMBERS if name in entry}
    step = values["window_step"]
    if step >= 0 and float(entry.get("step", step)) != step:
        return
    reference, weight = values["window_reference"], values.get("window_weight", -1.0)
    extra |= {
        "version": VERSION,
        "gradient_accumulation_steps": int(values["window_steps"]) or None,
        "window": {
            "micro_batches": micro_batches,
            "total": values["window_total"],
            "reference": None if reference < 0 else reference,
            "is_explicit": bool(values["window_is_explicit"]),
            "overflow": values["window_overflow"],
            "weight": None if weight < 0 else weight,
        },
    }
    extra["rank"] = int(values.get("window_rank", 0))
    extra["world"] = int(values.get("window_world", 1))
    extra.setdefault("accumulators", {})[index] = entry[GRAD]
    if "window_fill" in values:
        arrived = extra.setdefault("arrived", [])
        arrived += [index] if values["window_fill"] == Fill.CURRENT else []
