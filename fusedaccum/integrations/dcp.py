"""torch.distributed.checkpoint's way to have states before it loads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..rules import registry
from ..update.updater import Updater
from .entries import OURS
from .frameworks import is_asked_for_keys


def only_initialises(updater: Updater) -> bool:
    """Whether this step() is made for the sake of states alone; then they are there, and no more.

    torch.distributed.checkpoint calls step() of an optimizer without states with lr 0 and zeros
    assigned to every gradient, to have a state dict with all keys. That is no micro-batch, and
    must not count as one. It does so only where no parameter had a gradient: what had arrived in
    the open micro-batch was taken away before. Its zero_grad(), which follows, discards the window.
    """
    optimizer = updater.optimizer
    if optimizer.state or any(group.get("lr", 0.0) != 0.0 for group in optimizer.param_groups):
        return False  # nearly always, and asked at every micro-batch
    return _initialises(updater)


@torch.no_grad()
def _initialises(updater: Updater) -> bool:
    optimizer, collector = updater.optimizer, updater.collector
    slots, groups = collector.slots.values(), optimizer.param_groups
    if not slots:
        return False
    for slot in slots:
        grad = slot.param.grad
        if grad is None or grad is slot.grad or bool(slot.part(grad).any()):
            return False
    if not is_asked_for_keys():  # a warm-up that starts at 0 may look alike
        return False
    if updater.is_fused:
        for group in groups:
            rule = registry.select(optimizer, group)
            for param in group["params"]:
                slot_or_none = collector.slots.get(param)
                if slot_or_none is not None and slot_or_none.is_own and rule is not None:
                    updater.fused.bind(slot_or_none, rule, group)
    elif not collector.window.micro_batches:
        collector.adopt_assigned()
        updater.update_as_is()
        collector.discard()
    updater.states.is_provisional = True
    for slot in slots:
        slot.param.grad = slot.grad if slot.fill else None
    return True


class WithOurNames(Mapping[Tensor, dict[str, Any]]):
    """A view of states by parameter, with the names of what we save beside them.

    Unflattening takes from a flat state dict what the optimizer has names for. It asks for the
    states of one parameter after the other.
    """

    def __init__(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        self._state = state

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        return {**self._state.get(param, {}), **dict.fromkeys(OURS)}

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
