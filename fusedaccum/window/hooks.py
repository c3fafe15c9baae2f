"""The parameters of one optimizer: their slots, and the hook on each.

The hook is on the AccumulateGrad node and not on the tensor: a tensor's hook also fires in
`autograd.grad`. Autograd holds that node weakly, so the slot holds it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..backends.private import current_task
from . import compiling
from .buffers import Block
from .deal import Deal
from .engines import refuse_exchange
from .groups import Known, params_of
from .shards import local_of
from .slots import Fill, Slot, Slots, check_apart, check_once, check_param, node_of

# Whose live hooks are on a parameter: two owners would take each other's accumulators for
# gradients.
# By id, since torch.utils.swap_tensors() refuses tensors with a weak reference.
_owners: WeakValueDictionary[int, Attached] = WeakValueDictionary()


# Why a wrapper serves no parameters any more, and what to do instead.
TAKEN_OVER = (
    "another FusedAccumOptimizer was made for the parameters of this one and has taken them over; "
    "nothing was done. Use that one, in the scheduler too"
)
DETACHED = (
    "detach() was called on this FusedAccumOptimizer, so it serves no parameters any more; nothing "
    "was done. Use the optimizer that detach() returned, or wrap that in a new FusedAccumOptimizer"
)


def is_owned(param: Tensor) -> bool:
    """Whether some FusedAccumOptimizer has a hook on it."""
    return _owner_of(param) is not None


def _owner_of(param: Tensor) -> Attached | None:
    owner = _owners.get(id(param))
    return owner if owner is not None and param in owner.slots else None


class Waiting:
    """Parameters whose gradients autograd has brought, or is about to, and nobody has added yet.

    Attributes:
        slots: in the order of their arrival.
        nbytes: of their gradients.
        limit: the bytes that may wait, in the backward that is running.
        tasks: the graph tasks of backwards whose beginning was seen.
    """

    __slots__ = ("limit", "nbytes", "slots", "tasks")

    def __init__(self, tasks: Mapping[int, object], limit: float) -> None:
        self.slots: list[Slot] = []
        self.nbytes = 0
        self.limit, self.tasks = limit, tasks

    def put(self, slot: Slot, is_due: bool) -> None:
        """A gradient of `slot` is about to be accumulated by autograd.

        Args:
            is_due: whether there is one, and not the None of a function that has none.
        """
        slot.param.grad = None
        slot.pending, slot.is_due = True, is_due
        self.slots.append(slot)
        self.nbytes += slot.nbytes

    def take(self) -> list[Slot]:
        """All of them; none is waiting then."""
        taken, self.slots, self.nbytes = self.slots, [], 0
        return taken


class Owner(Protocol):
    """Who adds what waits; held weakly."""

    @property
    def is_open(self) -> bool:
        """Whether something was accumulated that no update has used."""

    def make_room(self, slot: Slot) -> None:
        """A gradient of `slot` arrives, and something about that is not as usual: have the
        accumulator hold what counts of before, and no more wait than may."""


class Attached:
    """Parameters with slots and hooks.

    Args:
        owner: adds what waits.
        waiting: where the hooks put what arrives.
        device: where all of them are.
        check: raises for a parameter of a dtype that cannot be served.
        deal: says which process updates a parameter.

    Attributes:
        device: as given.
        slots: by parameter.
        groups: the optimizer's param groups, as they were last seen.
        queues: what `Adder` remembers of parameters that arrive together.
        n_cells: partial sums of squares of all of them.
        gone: why no parameters are served any more, for good, or an empty text.
        stray: a parameter that was taken out of the groups, and has got a gradient since.
        when_taken_over: gives what is called then, or None.
    """

    def __init__(
        self,
        owner: Owner,
        waiting: Waiting,
        device: torch.device,
        check: Callable[[torch.dtype], None],
        deal: Deal,
    ) -> None:
        self._owner_ref = weakref.ref(owner)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._waiting, self.device = waiting, device
        self.slots = Slots()
        self.queues: dict[tuple[Slot, ...], Any] = {}
        self._known: Known | None = None
        # Of parameters that somebody took out of the groups: no update and no norm has them.
        self._left: list[Slot] = []
        self.stray: Slot | None = None
        self._unchanged: tuple[Any, Any] | None = None  # where all were, and how they lay
        self.groups: Sequence[dict[str, Any]] = ()
        self.n_cells = 0
        self.gone = ""
        self.when_taken_over: Callable[[], Callable[[], None] | None] = lambda: None
        self._check, self._deal = check, deal
        compiling.watch(self)

    @property
    def updates_all(self) -> bool:
        """Whether this process updates all parameters, and keeps states of all."""
        return all(slot.is_own for slot in self.slots.values())

    def attach(self, named_params: Iterable[tuple[str, Tensor]]) -> None:
        """Give each named parameter a slot and a hook. All of them, or none if one is wrong."""
        named = list(named_params)
        if not named:
            return
        owners: dict[int, Attached] = {}
        for name, param in named:
            check_param(name, param)
            self._check(param.dtype)
            owner = _owner_of(param)
            if owner is not None and owner is not self:
                owner.refuse_take_over(name, param, named)
                owners[id(owner)] = owner
            if param.device != self.device:
                raise ValueError(
                    f"{name} is on {param.device} but others are on {self.device}; one wrapper "
                    "serves one device: make an optimizer, and wrap it, for each device"
                )
        check_apart([*self._named(), *named])
        for owner in owners.values():
            owner.detach(TAKEN_OVER)
            if (taken_over := owner.when_taken_over()) is not None:
                taken_over()
        owners_of = self._deal.owners([param for _, param in named])
        kinds = [(p.dtype, rank) for (_, p), rank in zip(named, owners_of, strict=True)]
        blocks = {
            kind: Block([local_of(p) for (_, p), k in zip(named, kinds, strict=True) if k == kind])
            for kind in dict.fromkeys(kinds)
        }
        positions: Counter[tuple[torch.dtype, int]] = Counter()
        for (_, param), kind in zip(named, kinds, strict=True):
            dtype, rank = kind
            is_own = rank == self._deal.rank
            place = blocks[kind], positions[kind], len(self.slots), self.n_cells
            slot = Slot(param, *place, updater=rank, is_own=is_own)
            positions[kind] += 1
            self.n_cells += slot.n_cells
            # Since torch 2.10 None lets `grad` have another dtype than the parameter.
            param.grad_dtype = None if dtype != torch.float32 else dtype
            self.slots[param] = slot
            self._hook(slot)

    def attach_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Attach parameters of param groups that need a gradient and have no slot yet.

        Raises:
            RuntimeError: see `refuse_gone`.
        """
        self.refuse_gone()
        self.groups = groups
        compiling.show()
        self.stray = next((slot for slot in self._left if slot.fill), self.stray)
        if self._known is None or not self._known.holds(groups):
            self._attach_new(groups)
        for slot in self._left:
            slot.fill = Fill.EMPTY

    def _attach_new(self, groups: Sequence[dict[str, Any]]) -> None:
        refuse_exchange(self.slots, groups)
        self._known = None
        params = list(chain.from_iterable(params_of(groups)))
        check_once(params)
        new: list[tuple[str, Tensor]] = []
        for i, group in enumerate(groups):
            for j, param in enumerate(group["params"]):
                if not param.requires_grad and param.grad is None:
                    continue  # frozen; one with a gradient was not, when it came
                slot = self.slots.get(param)
                if slot is None:
                    new.append((f"param_groups[{i}]['params'][{j}]", param))
                elif slot.hook is None:  # somebody interrupted us before
                    self._hook(slot)
        self.attach(new)
        kept = set(params)
        self._left = [slot for param, slot in self.slots.items() if param not in kept]
        self._known = Known(groups, self.slots)

    def _named(self) -> list[tuple[str, Tensor]]:
        """The parameters that are served and still in the groups."""
        return [
            (f"param_groups[{i}]['params'][{j}]", param)
            for i, group in enumerate(self.groups)
            for j, param in enumerate(group["params"])
            if param in self.slots
        ]

    def refuse_take_over(self, name: str, param: Tensor, named: list[tuple[str, Tensor]]) -> None:
        """Raise unless another wrapper may have the parameters from now on.

        It may where it serves all of them and no window is open here: a notebook's cell was run
        once more, and something (a scheduler) still holds the wrapper of the first time.

        Raises:
            ValueError: naming a parameter, and the way out.
        """
        new = {id(other) for _, other in named}
        owner = self._owner_ref()
        is_open = owner is not None and owner.is_open
        if is_open or not all(id(own) in new for own in self.slots):
            why, first = "serves other parameters too", ""
            if is_open:
                why, first = "has an open window", "its zero_grad(), which discards that, and "
            raise ValueError(
                f"{name} of shape {tuple(param.shape)} already belongs to another "
                f"FusedAccumOptimizer, which {why}; call {first}its detach(), or delete it, first"
            )

    def refuse_gone(self) -> None:
        """Raise if no parameters are served any more.

        Raises:
            RuntimeError: saying why, and the way out.
        """
        if self.gone:
            raise RuntimeError(self.gone)

    def is_outdated(self, state: Mapping[Tensor, Any]) -> bool:
        """Whether a parameter moved, or those that were taken out of the groups may be let go.

        Args:
            state: the optimizer's. One that is still there may come back, with its master.
        """
        may_return = not self.updates_all or any(slot.param in state for slot in self._left)
        is_freed = bool(self._left) and not may_return
        return is_freed or self.changed(layout=False) is not None

    def changed(self, *, memory: bool = True, layout: bool = True) -> Slot | None:
        """A parameter that is not what it was when it was attached, if there is one.

        Args:
            memory: whether to look where they are, and at their dtypes.
            layout: whether to look at the sizes and strides of those that are where they were.
        """
        slots, known = self.slots, self._unchanged
        suspects = slots.suspects() if memory else ()
        for slot in suspects:
            slot.seen_at = None  # as if it had moved: it may have moved, and back
        if (
            known is not None
            and not suspects
            and (not memory or slots.memory() == known[0])
            and (not layout or slots.layout() == known[1])
        ):
            return None
        found = next((s for s in slots.values() if s.change()), None)
        self._unchanged = (slots.memory(), slots.layout()) if found is None else None
        return found

    def refuse_changed(self, *, memory: bool = True) -> None:
        """Raise if a parameter changed; for `memory` see `changed`.

        Raises:
            RuntimeError: naming one, and the way out.
        """
        first = self.changed(memory=memory)
        if first is not None:
            n = sum(1 for s in self.slots.values() if s.change())
            raise RuntimeError(
                f"{n} parameters changed after they were wrapped (one of shape "
                f"{tuple(first.shape)}: {first.change()}) and lost their hooks; nothing was "
                "updated. Call zero_grad() after moving or converting the model, or wrap after it"
            )

    def _hook(self, slot: Slot) -> None:
        param = slot.param
        is_trained = param.requires_grad
        try:
            # A frozen one, of which a checkpoint has something, is hooked for the time after.
            param.requires_grad_(True)
            # A node runs on the stream that it was made on. All on one: a launch adds gradients of
            # many, and must not read those that another stream still writes.
            with torch.cuda.stream(self._stream):
                slot.node, slot.seen_at = node_of(param), slot.place
        finally:
            param.requires_grad_(is_trained)
        # The node holds the hook and the slot the node: a strong reference back would be a
        # cycle that Python's collector cannot see. The node itself holds the parameter.
        slot_ref, owner_ref = weakref.ref(slot), self._owner_ref
        waiting, shard = self._waiting, slot.shard

        # It runs for each parameter at every micro-batch, so what is usual is seen here.
        def prehook(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
            slot = slot_ref()
            if slot is None or slot.node is None:
                return None
            grad, before = grads[0], param.grad
            if grad is None and slot.takes_products:
                return None  # on a GPU this may be another thread than the backward's
            is_usual = (
                (before is slot.grad if before is not None else not slot.fill)
                and current_task() in waiting.tasks
                and not slot.pending
                and waiting.nbytes + slot.nbytes <= waiting.limit
            )
            if not is_usual:
                owner = owner_ref()
                if owner is None:
                    return None
                owner.make_room(slot)
            waiting.put(slot, grad is not None)
            # Here, where every process is at the same place of the same graph.
            if shard is not None and grad is not None:
                return (shard.placed(grad),)
            return None

        slot.hook = slot.node.register_prehook(prehook)
        _owners[id(param)] = self

    def detach(self, gone: str = "") -> None:
        """Remove every hook and give `grad` its usual dtype again.

        Args:
            gone: why nothing is served any more, where that is for good.
        """
        for slot in self.slots.values():
            slot.node = None  # which a hook that was not noted here asks for
            if slot.hook is not None:
                slot.hook.remove()
            _owners.pop(id(slot.param), None)
            slot.param.grad = None
            slot.param.grad_dtype = slot.param.dtype
        self.slots.clear()
        self.queues.clear()
        self._left = []
        self._known = self._unchanged = None
        self.gone = gone
