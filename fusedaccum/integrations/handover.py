"""All of an optimizer for another process, which goes on from there."""

from __future__ import annotations

from typing import Any, Protocol

from torch.optim import Optimizer

from ..update.updater import Updater
from . import checkpoint


class Owner(Protocol):
    """What is asked of the wrapper's core."""

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped one."""

    @property
    def updater(self) -> Updater:
        """Of its parameters."""

    def prepare_save(self) -> None:
        """Have everything in its place that a checkpoint reads."""


def whole_state(owner: Owner) -> Any:
    """What a checkpoint holds, the norm of the last update, and a GradScaler's state."""
    owner.prepare_save()
    updater = owner.updater
    state = checkpoint.save(owner.optimizer.state_dict(), updater)
    return state, updater.grad_norm, updater.collector.scaling.state()


def take_over(owner: Owner, whole: Any) -> None:
    """Go on from another process's `whole_state`, with the open window of this one."""
    theirs, norm, scale = whole
    own, _, _ = whole_state(owner)
    updater = owner.updater
    checkpoint.load(checkpoint.with_window_of(theirs, own), updater)
    if norm is not None:
        updater.grad_norm = updater.states.scalars.norm.copy_(norm)
    if scale is not None:
        updater.collector.scaling.agree(scale[None])
