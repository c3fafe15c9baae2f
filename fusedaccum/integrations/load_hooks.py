"""Hooks that people register for before a load (`register_load_state_dict_pre_hook`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from .entries import KEY, StateDict


def adapted(state_dict: StateDict, optimizer: Optimizer) -> StateDict:
    """What the hooks make of a state dict, as torch lets them before it looks at it.

    They are shown what plain torch has. Where they move states to other parameters, what is under
    "fusedaccum" is of the old places: it is left out, and what stands beside the states counts.

    Args:
        state_dict: to be loaded; as with torch, a hook may write into its parts.
        optimizer: the wrapped one.
    """
    hooks = _hooks(optimizer)
    if not hooks:
        return state_dict
    made = {key: value for key, value in state_dict.items() if key != KEY}
    before = _places(made)
    for hook in hooks.values():
        given = hook(optimizer, made)
        made = made if given is None else given
    made = {key: value for key, value in made.items() if key != KEY}
    if KEY in state_dict and _are_same(_places(made), before):
        made[KEY] = state_dict[KEY]
    return made


@contextmanager
def without(optimizer: Optimizer) -> Iterator[None]:
    """Load without the hooks, which have seen the state dict."""
    hooks = _hooks(optimizer)
    optimizer._optimizer_load_state_dict_pre_hooks = OrderedDict()
    try:
        yield
    finally:
        optimizer._optimizer_load_state_dict_pre_hooks = hooks


def _hooks(optimizer: Optimizer) -> OrderedDict[int, Any]:
    hooks: OrderedDict[int, Any] = optimizer._optimizer_load_state_dict_pre_hooks
    return hooks


def _places(state_dict: StateDict) -> Any:
    """Whose states are where: each group's parameters, and what each parameter has."""
    groups = [list(group["params"]) for group in state_dict["param_groups"]]
    return groups, dict(state_dict["state"])


def _are_same(places: Any, others: Any) -> bool:
    (groups, states), (other_groups, other_states) = places, others
    return (
        groups == other_groups
        and states.keys() == other_states.keys()
        and all(entry is other_states[index] for index, entry in states.items())
    )
