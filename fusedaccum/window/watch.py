"""Engines that have our parameters, seen among Python's objects, or as they write our gradients.

`p.grad` is the accumulator. DistributedDataParallel (DDP) averages each micro-gradient and copies
the average over it; fully_shard (FSDP2) adds to it; FSDP1 and DeepSpeed take it away. Where
torch.distributed is in use, all objects are looked through as the optimizer is made and in the
first backward: DDP and FSDP2 are served, the others are refused. An engine
that comes later, or that nobody knows, is seen at the end of each backward, when it has written:
that costs a look at one tensor.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from ..backends.private import queue_callback
from ..backends.tensors import FSDP2, is_dtensor
from .engines import PLAIN, refuse_exchange
from .fsdp2 import fsdp2_groups, fsdp2_params
from .reducing import Alone, Parts, Reducing

Serve = Callable[[Parts, Sequence[Module]], Reducing]


class Owned(Protocol):
    """What is asked of a slot."""

    param: Tensor
    grad: Tensor | None
    shape: torch.Size
    is_due: bool
    shard: Any


class Owner(Protocol):
    """What is asked of the parameters' hooks."""

    groups: Sequence[dict[str, Any]]

    @property
    def slots(self) -> Mapping[Tensor, Any]:
        """By parameter."""


def is_distributed() -> bool:
    """Whether this process belongs to a group of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def place() -> tuple[int, int]:
    """This process's rank, and how many processes there are."""
    if not is_distributed():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def may_reduce() -> bool:
    """Whether somebody may have reduced `p.grad` over processes unseen.

    `torch.distributed.all_reduce` moves no version counter.
    """
    return place()[1] > 1


class Watch:
    """What one collector knows of engines around it.

    Args:
        owner: has the parameters.
        parts: what DDP and FSDP2 modules that are found have to do with.
        serve: makes what goes with them, and with shards, or raises ValueError with the reason.

    Attributes:
        parts: as given.
        reduction: what averages over processes.
    """

    def __init__(self, owner: Owner, parts: Parts, serve: Serve) -> None:
        self._owner, self.parts, self._serve = owner, parts, serve
        self._trouble = parts.trouble
        self.reduction: Reducing = Alone()
        self._looked = False
        self._kept: list[tuple[Owned, int]] = []
        self._n_ending = 0  # backwards whose gradients are all here and that have not returned

    def forget(self, is_sure: bool) -> None:
        """The window is discarded.

        Args:
            is_sure: whether no backward raised in it: an engine that nobody has seen may have.
        """
        self._n_ending = 0
        self._looked = self._looked and is_sure

    def meet(self) -> None:
        """Go with what is there as the optimizer is made, or a parameter joins.

        With a static graph, DDP queues its reduction before a gradient arrives. A DDP that cannot
        be served is refused by the first backward, until which much may change.

        Raises:
            ValueError: for shards that cannot be served.
        """
        if not is_distributed():
            return
        found = [e for e in _engines(self._owner.slots) if not isinstance(e, str)]
        if self._has_shards:
            self.reduction.detach()
            self.reduction = self._serve(self.parts, found)
        elif found:
            with suppress(ValueError):
                self.reduction = self._serve(self.parts, found)

    @property
    def _has_shards(self) -> bool:
        return any(slot.shard is not None for slot in self.parts.slots.values())

    def begin(self) -> None:
        """A backward begins.

        Raises:
            RuntimeError: for an engine that owns a parameter of ours and cannot be served, and for
                param groups in which somebody replaced the parameters. The window is marked.
        """
        refuse_exchange(self._owner.slots, self._owner.groups)
        if not self._looked and is_distributed():
            self._look()

    def at_step(self) -> None:
        """The window is about to be used; an engine that replaced parameters left it empty.

        Raises:
            RuntimeError: as `begin` does.
        """
        if is_distributed() and (not self._looked or (self._is_empty() and not self._has_shards)):
            self._look()

    @property
    def is_ending(self) -> bool:
        """Whether the callbacks at the end of a backward are running."""
        return self._n_ending > 0

    def let_come(self, slots: Sequence[Owned]) -> None:
        """Gradients of these come that late, and not from somebody who writes over ours."""
        self._kept = [(slot, version) for slot, version in self._kept if slot not in slots]

    def note_ending(self) -> None:
        """Mark the window after a backward that raised at its end."""
        if self._n_ending:
            self._looked = False
            self._trouble.note(_RAISED)

    def _is_empty(self) -> bool:
        return all(param.grad is None for param in self._owner.slots)

    def _look(self) -> None:
        try:
            found = _engines(self._owner.slots)
            if found:
                gc.collect()  # one that is only garbage has no say, and its hooks go with it
                found = _engines(self._owner.slots)
            for engine in found:
                if isinstance(engine, str):
                    self.fail(engine)
            modules = [engine for engine in found if not isinstance(engine, str)]
            if modules and not self.reduction.is_instead_of(modules):
                self.reduction = self._serve(self.parts, modules)
        except ValueError as error:
            self.fail(str(error))
        self._looked = True

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
            queue_callback(compare)

        def compare() -> None:
            self._n_ending -= 1
            kept, self._kept = self._kept, []
            try:
                for slot, version in kept:
                    grad = slot.param.grad
                    if grad is None or grad is not slot.grad or grad._version != version:
                        self.fail(_WRITTEN.format(tuple(slot.shape)))
            finally:
                ended()

        queue_callback(remember)

    def refuse_taken(self, slot: Owned) -> None:
        """A gradient that arrived is not there when it is to be added.

        Raises:
            RuntimeError: if there was one. The window is marked.
        """
        if slot.is_due:
            self.fail(_TAKEN.format(tuple(slot.shape)))

    def fail(self, reason: str) -> NoReturn:
        """Mark the window, and look for engines once more in the next one.

        Raises:
            RuntimeError: with the reason.
        """
        self._looked = False
        self._trouble.note(reason)
        raise RuntimeError(f"{reason}. Nothing was updated; zero_grad() discards the window")


def _modules() -> list[Module]:
    """Every module that Python's collector knows. `type`, for proxies that answer to any class.

    What `gc.freeze()` took from it is given back, or an engine among that would never be found.
    """
    if gc.get_freeze_count():
        gc.unfreeze()
    return [o for o in gc.get_objects() if issubclass(type(o), Module)]


def _parameters(module: Module) -> Iterator[Tensor]:
    """A module's own parameters, also if it is being made just now."""
    return (p for p in vars(module).get("_parameters", {}).values() if p is not None)


def _served(engine: Module) -> Iterator[Tensor]:
    """The parameters whose gradients an engine reduces."""
    if _is_fsdp2(type(engine)):
        return chain.from_iterable(map(fsdp2_params, fsdp2_groups(engine)))
    return Module.parameters(engine)


def _is_fsdp2(kind: type[Module]) -> bool:
    fsdp2 = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return fsdp2 is not None and issubclass(kind, fsdp2)


def _engine(module: Module) -> Module | str | None:
    """DDP or FSDP2 itself; of another engine why its parameters cannot be ours; None for other
    modules."""
    kind = type(module)
    if issubclass(kind, DistributedDataParallel) and "reducer" in vars(module):
        return module
    if _is_fsdp2(kind):
        return module
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if fsdp is not None and issubclass(kind, fsdp):
        return _FSDP1
    deepspeed = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
    if deepspeed is not None and issubclass(kind, deepspeed):
        optimizer = type(vars(module).get("optimizer"))
        if not any(base.__module__.split(".")[0] == "fusedaccum" for base in optimizer.__mro__):
            return _DEEPSPEED.format(optimizer.__name__)
    return None


def _engines(slots: Mapping[Tensor, Owned]) -> list[Module | str]:
    """The DDP and FSDP2 modules with a parameter of `slots`; of another engine why it cannot be,
    and what to do."""
    held: set[Tensor] = set()
    sharded: set[torch.Size] = set()
    found: list[Module | str] = []
    for module in _modules():
        engine = _engine(module)
        if engine is not None and any(param in slots for param in _served(module)):
            found.append(engine)
        for param in _parameters(module):
            held.add(param)
            if is_dtensor(type(param)):
                sharded.add(param.shape)
            else:
                sharded.update(getattr(param, "_shapes", ()))  # FlatParameter
    if sharded and not any(isinstance(engine, str) for engine in found):
        for param, slot in slots.items():
            is_lost = param not in held and param.grad is None and slot.shard is None
            if is_lost and param.shape in sharded:
                return [_REPLACED.format(tuple(param.shape))]
    return found


_FSDP1 = (
    "FullyShardedDataParallel (FSDP1) wraps parameters of this optimizer: it moves their memory "
    f"and writes p.grad, which is the accumulator, itself. It is not supported. {FSDP2}"
)
_REPLACED = (
    "no gradient can arrive any more: an engine (fully_shard, which is FSDP2, tensor parallelism "
    "or FullyShardedDataParallel) replaced the model's parameters after the optimizer was made; "
    f"one of shape {{}} is in no module now. Shard first, make the optimizer after that. {FSDP2}"
)
_WRITTEN = (
    "something else wrote p.grad, which is this optimizer's accumulator, at the end of a "
    "backward() (a parameter of shape {}). DistributedDataParallel (DDP) does that where it was "
    "made after the first backward(): the average of one micro-gradient takes the place of the sum."
    " After zero_grad() the next backward() finds DDP and averages instead of it. Another engine "
    "cannot be served: leave the model without it, and give process_group=torch.distributed.group"
    ".WORLD to FusedAccumOptimizer, which then averages over processes itself"
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
