"""torch's Join: a process that has run out of data takes part in what the others average.

A process that leaves a Join block does, once for each micro-batch of the others, what its own
backward would have done: their collectives, with what it still holds of the open window. It does
not update, as a rate or a clip of theirs would be missing here. When all have left, those that left
early take parameters and optimizer over from the last one, to the bit.
"""

from __future__ import annotations

import io
import pickle
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from ..window.collector import Collector
from ..window.grad_scaler import Scaling
from ..window.weights import Window
from .reduction import broadcast


class Member(Protocol):
    """What is asked of an optimizer.

    Attributes:
        window, scaling, collector: its parts.
        window_closed: whether the last micro-batch ended a window.
    """

    window: Window
    scaling: Scaling
    collector: Collector
    window_closed: bool

    def check_usable(self) -> None:
        """Raise after a load that was interrupted."""

    def zero_grad(self, set_to_none: bool) -> None:
        """Discard the window."""

    def whole_state(self) -> Any:
        """All that another process needs to go on from here."""

    def take_over(self, whole_state: Any) -> None:
        """Go on from there, with the open window of this process."""


class Membership:
    """One optimizer's part in Join blocks.

    Args:
        member: gives the optimizer, a weak reference.
        group: of processes, where there is no DDP module to be in the list.
    """

    def __init__(
        self, member: Callable[[], Member | None], group: ProcessGroup | None = None
    ) -> None:
        self._member, self._group = member, group
        self._joinable: weakref.ref[Joinable] | None = None  # while a block is open

    @property
    def is_over(self) -> bool:
        """Whether the optimizer is gone, or serves no parameters any more."""
        member = self._member()
        return member is None or bool(member.collector.attached.gone)

    @property
    def member(self) -> Member:
        member = self._member()
        assert member is not None
        return member

    def hook(self, joinable: Joinable, options: Mapping[str, Any]) -> JoinHook:
        """For a block that is about to be opened.

        Raises:
            ValueError: see `check`.
        """
        self.check(options)
        self._joinable = weakref.ref(joinable)
        return GroupHook(self)

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse what a block was given and what cannot be done.

        Raises:
            ValueError: naming the way round.
        """
        if not self.member.collector.attached.updates_all:
            raise ValueError(
                "Join with shard_states=True, where a process that has left would still have to "
                "update its part: leave shard_states out, or end all processes' data together"
            )
        is_counted = self.member.window.steps is not None
        if not is_counted and not options.get("divide_by_initial_world_size", True):
            raise ValueError(
                "Join(divide_by_initial_world_size=False) where the loop owns the window: "
                "gradients are averaged over all processes there, of which those without data give "
                "zeros. Leave it out; micro_batch(weight=...) gives the exact mean of what there is"
            )

    def is_joint(self) -> bool:
        """Whether the optimizer itself is in the list of an open block."""
        joinable: Any = None if self._joinable is None else self._joinable()
        return joinable is not None and bool(joinable._join_config.enable)

    def notify(self) -> None:
        """Tell processes that have left the block that this one has not."""
        joinable = None if self._joinable is None else self._joinable()
        if self.member.scaling.is_behind:
            return
        work = None if joinable is None else Join.notify_join_context(joinable)
        if work is not None:
            work.wait()

    def stand_in(self, is_due: bool) -> None:
        """Another process closes a micro-batch; this one has none.

        Args:
            is_due: whether the others average at its end, where a loop owns the window.

        Raises:
            RuntimeError: for a window that cannot be used, or a micro-batch that was not closed.
        """
        member, window = self.member, self.member.window
        member.check_usable()
        member.collector.check()
        member.collector.adopt_assigned()
        counts = window.steps is not None
        if counts and member.collector.slots.has_arrivals:
            raise RuntimeError(
                "Join was left between backward() and step(), and the other processes wait for the "
                "window that was not closed. Call step() after every backward()"
            )
        member.scaling.is_behind = True
        member.window_closed = window.is_last if counts else is_due
        if not member.window_closed:
            if counts:
                window.pass_micro_batch()
            return
        member.collector.reduction.complete(closes=False)
        if counts:
            member.collector.end_window()
        else:
            member.zero_grad(set_to_none=True)

    def follow(self, is_last: bool, group: ProcessGroup, has_params: bool) -> None:
        """Be where the optimizer of the last process to leave is; collective.

        Args:
            is_last: whether this one left the block last, as others may have too.
            group: of processes.
            has_params: whether somebody has copied that process's parameters already.
        """
        member = self.member
        device = member.collector.attached.device
        member.scaling.is_behind = False
        own = dist.get_rank(group)
        said = torch.tensor([own if is_last else -1, not is_last], dtype=torch.int64, device=device)
        dist.all_reduce(said, dist.ReduceOp.MAX, group)
        rank, is_anybody_behind = said.tolist()
        if not is_anybody_behind:
            return
        if not has_params:
            broadcast(member.collector.slots, group, rank)
        theirs = handed_on(member.whole_state() if own == rank else None, rank, group, device)
        if not is_last:
            member.take_over(theirs)

    def follow_without_ddp(self, is_last: bool) -> None:
        """The same where nobody else copies parameters."""
        assert self._group is not None
        self.follow(is_last, self._group, has_params=False)
        self._joinable = None


class DdpHook(JoinHook):
    """Takes part for a DDP module whose reducer rests."""

    def __init__(self, module: DistributedDataParallel, membership: Membership) -> None:
        self._module: Any = module
        self._membership = membership

    def main_hook(self) -> None:
        """What the others' forward and backward do."""
        module = self._module
        module.reducer._rebuild_buckets()
        module._check_and_sync_module_buffers()
        is_due = module._check_global_requires_backward_grad_sync(is_joined_rank=True)
        module.require_forward_param_sync = is_due
        self._membership.stand_in(is_due)

    def post_hook(self, is_last_joiner: bool) -> None:
        """All have left."""
        module = self._module
        module._sync_final_model(is_last_joiner)
        self._membership.follow(is_last_joiner, module.process_group, has_params=True)
        # torch leaves it on, and the next forward would wait for processes that have no data.
        module._join_config = module._join_config._replace(enable=False)


class GroupHook(JoinHook):
    """Takes part for an optimizer that averages in a group, without DDP."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def main_hook(self) -> None:
        """What the others' backward does."""
        self._membership.stand_in(True)

    def post_hook(self, is_last_joiner: bool) -> None:
        """All have left."""
        self._membership.follow_without_ddp(is_last_joiner)


class _Pickler(pickle.Pickler):
    """Takes tensors out of what it writes."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if type(value) not in (Tensor, torch.nn.Parameter):  # subclasses know how to be pickled
            return None
        self.tensors.append(value.detach())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Puts them back."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Any:
        return self._tensors[pid]


@torch.no_grad()
def handed_on(value: Any, rank: int, group: ProcessGroup, device: torch.device) -> Any:
    """`value` of the process `rank` of a group, whose tensors are sent as they are; collective.

    Args:
        value: what there is to send; read in that process alone.
        rank: in the group.
        group: of processes.
        device: on which its backend works.
    """
    is_source = dist.get_rank(group) == rank
    source = dist.get_global_rank(group, rank)
    file = io.BytesIO()
    pickler = _Pickler(file)
    if is_source:
        pickler.dump(value)
    kinds = [(t.shape, t.dtype, t.device.type) for t in pickler.tensors]
    head = [(file.getvalue(), kinds)]
    dist.broadcast_object_list(head, source, group, device)
    text, kinds = head[0]
    tensors = []
    for i, (shape, dtype, kind) in enumerate(kinds):
        sent = torch.empty(shape, dtype=dtype, device=device)
        if is_source:
            sent.copy_(pickler.tensors[i])
        if sent.numel():  # bytes: not every backend knows every dtype
            dist.broadcast(sent.view(-1).view(torch.uint8), source, group)
        tensors.append(sent.cpu() if kind == "cpu" else sent)
    return _Unpickler(io.BytesIO(text), tensors).load()
