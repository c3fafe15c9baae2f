"""Engines that have our parameters, seen among Python's objects, or as they write our gradients.

`p.grad` is the accumulator. DistributedDataParallel (DDP) averages each micro-gradient and copies
the average over it; FSDP and DeepSpeed take it away. Where torch.distributed is in use, all objects
are looked through once, in the first backward. An engine that comes later, or that nobody knows, is
seen at the end of each backward, when it has written: that costs a look at one tensor.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from ..backends.tensors import SHARDED, is_dtensor
from .engines import PLAIN, refuse_exchange
from .trouble import Trouble

REDUCE = (
    "Leave the model unwrapped, wrap the optimizer with gradient_accumulation_steps=None, "
    "broadcast the parameters from rank 0 once, and average between the last backward() and "
    "step(): `for p in params: torch.distributed.all_reduce(p.grad); p.grad /= world_size`"
)


class Owned(Protocol):
    """What is asked of a slot."""

    param: Tensor
    grad: Tensor | None
    shape: torch.Size
    is_due: bool


class Owner(Protocol):
    """What is asked of the parameters' hooks."""

    groups: Sequence[dict[str, Any]]

    @property
    def slots(self) -> Mapping[Tensor, Any]:
        """By parameter."""


def is_distributed() -> bool:
    """Whether this process belongs to a group of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def may_reduce() -> bool:
    """Whether somebody may have reduced `p.grad` over processes unseen.

    `torch.distributed.all_reduce` moves no version counter.
    """
    return is_distributed() and torch.distributed.get_world_size() > 1


class Watch:
    """What one collector knows of engines around it.

    Args:
        owner: has the parameters.
        trouble: of the open window.
    """

    def __init__(self, owner: Owner, trouble: Trouble) -> None:
        self._owner, self._trouble = owner, trouble
        self._looked = False
        self._kept: list[tuple[Owned, int]] = []
        self._n_ending = 0  # backwards whose gradients are all here and that have not returned

    def forget(self) -> None:
        """The window is discarded."""
        self._n_ending = 0

    def begin(self) -> None:
        """A backward begins.

        Raises:
            RuntimeError: for an engine that owns a parameter of ours, and for param groups in which
                somebody replaced the parameters. The window is marked.
        """
        refuse_exchange(self._owner.slots, self._owner.groups)
        if not self._looked and is_distributed():
            self._look()

    def at_step(self) -> None:
        """The window is about to be used; an engine that replaced parameters left it empty.

        Raises:
            RuntimeError: as `begin` does.
        """
        if is_distributed() and (not self._looked or self._is_empty()):
            self._look()

    def note_ending(self) -> None:
        """Mark the window after a backward that raised at its end."""
        if self._n_ending:
            self._trouble.note(_RAISED)

    def _is_empty(self) -> bool:
        return all(param.grad is None for param in self._owner.slots)

    def _look(self) -> None:
        found = _engine(self._owner.slots)
        if found is not None:
            gc.collect()  # one that is only garbage has no say, and its hooks go with it
            found = _engine(self._owner.slots)
        self._looked = found is None
        if found is not None:
            self._fail(found)

    def end(self, ended: Callable[[], None]) -> None:
        """Have the end of this backward see whether somebody writes `p.grad` after we did.

        To be called when our own callback is queued. Those of engines are queued later, when the
        last gradient has arrived, and a callback that is queued by a callback runs after all.

        Args:
            ended: called when all of that is over. Before it a backward of another thread, which
                would take `p.grad` away, must not begin.

        Raises:
            RuntimeError: from the backward. The window is marked.
        """
        queue = Variable._execution_engine.queue_callback

        def remember() -> None:
            # Wherever an engine may be, all of them: it may own some parameters only.
            most = None if is_distributed() else 1
            shown = (
                (slot, slot.grad._version)
                for slot in self._owner.slots.values()
                if slot.grad is not None and slot.param.grad is slot.grad
            )
            self._kept = list(islice(shown, most))
            self._n_ending += 1
            queue(compare)

        def compare() -> None:
            self._n_ending -= 1
            kept, self._kept = self._kept, []
            try:
                for slot, version in kept:
                    grad = slot.param.grad
                    if grad is None or grad is not slot.grad or grad._version != version:
                        self._fail(_WRITTEN.format(tuple(slot.shape)))
            finally:
                ended()

        queue(remember)

    def refuse_taken(self, slot: Owned) -> None:
        """A gradient that arrived is not there when it is to be added.

        Raises:
            RuntimeError: if there was one. The window is marked.
        """
        if slot.is_due:
            self._fail(_TAKEN.format(tuple(slot.shape)))

    def _fail(self, reason: str) -> NoReturn:
        self._trouble.note(reason)
        raise RuntimeError(f"{reason}. Nothing was updated; zero_grad() discards the window")


def _modules() -> list[Module]:
    """Every module that Python's collector knows. `type`, for proxies that answer to any class."""
    return [o for o in gc.get_objects() if issubclass(type(o), Module)]


def _parameters(module: Module) -> Iterator[Tensor]:
    """A module's own parameters, also if it is being made just now."""
    return (p for p in vars(module).get("_parameters", {}).values() if p is not None)


def _reason(module: Module) -> str | None:
    """Why the parameters of `module` cannot be ours, if it is an engine."""
    kind = type(module)
    if issubclass(kind, DistributedDataParallel) and "reducer" in vars(module):
        return _DDP
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if fsdp is not None and issubclass(kind, fsdp):
        return _FSDP1
    deepspeed = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
    if deepspeed is not None and issubclass(kind, deepspeed):
        optimizer = type(vars(module).get("optimizer"))
        if not any(base.__module__.split(".")[0] == "fusedaccum" for base in optimizer.__mro__):
            return _DEEPSPEED.format(optimizer.__name__)
    return None


def _engine(slots: Mapping[Tensor, Owned]) -> str | None:
    """Which engine has a parameter of `slots`, and what to do; None if there is none."""
    held: set[Tensor] = set()
    sharded: set[torch.Size] = set()
    for module in _modules():
        reason = _reason(module)
        if reason is not None and any(param in slots for param in Module.parameters(module)):
            return reason
        for param in _parameters(module):
            held.add(param)
            if is_dtensor(type(param)):
                sharded.add(param.shape)
            else:
                sharded.update(getattr(param, "_shapes", ()))  # FlatParameter
    if not sharded:
        return None
    for param, slot in slots.items():
        if param not in held and param.grad is None and slot.param.shape in sharded:
            return _REPLACED.format(tuple(param.shape))
    return None


_DDP = (
    "DistributedDataParallel (DDP) wraps parameters of this optimizer: it averages each "
    "micro-gradient itself and would write that over p.grad, which is the accumulator. DDP is not "
    f"supported yet. {REDUCE}"
)
_FSDP1 = (
    "FullyShardedDataParallel (FSDP1) wraps parameters of this optimizer: it moves their memory "
    f"and writes p.grad, which is the accumulator, itself. It is not supported. {SHARDED}"
)
_REPLACED = (
    "no gradient can arrive any more: an engine (fully_shard, which is FSDP2, tensor parallelism "
    "or FullyShardedDataParallel) replaced the model's parameters after the optimizer was made; "
    f"one of shape {{}} is in no module now. Sharded parameters are not supported yet. {SHARDED}"
)
_WRITTEN = (
    "something else wrote p.grad, which is this optimizer's accumulator, at the end of a "
    "backward() (a parameter of shape {}). DistributedDataParallel and engines like it do "
    f"that: the average of one micro-gradient takes the place of the sum. {REDUCE}"
)
_RAISED = (
    "a backward() raised at its end, where engines reduce what has arrived, so that the window may "
    "hold part of a micro-batch"
)
_TAKEN = (
    "a gradient (of a parameter of shape {}) was taken away during the backward(), before it was "
    "accumulated. Gradient release does that (an optimizer step in a hook), and DeepSpeed, also "
    "where the Trainer or Accelerate use it beside this optimizer. Call detach() on this optimizer "
    "to train that way. " + PLAIN.replace("{", "{{").replace("}", "}}")
)
_DEEPSPEED = (
    "DeepSpeed's engine has parameters of this optimizer and another optimizer for them ({}), as "
    "it has where the Trainer gets both `optimizers` and a DeepSpeed config: its hooks would read "
    "single micro-gradients where they expect a sum. " + PLAIN.replace("{", "{{").replace("}", "}}")
)
