"""What the wrapper knows of each parameter: its place in the buffers, and its window."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor

from ..backends.tables import count_chunks
from ..backends.tensors import is_dense, refuse_tensor, sharing
from .buffers import Block
from .engines import refuse_partitioned
from .shards import local_of, shard_of

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Fill(IntEnum):
    """What a parameter's accumulator holds of the open window."""

    EMPTY = 0  # Nothing: the next gradient is stored and not added.
    EARLIER = 1  # A sum that the open micro-batch has not contributed to.
    CURRENT = 2  # A sum that the open micro-batch has contributed to.


def check_param(name: str, param: Tensor) -> None:
    """Refuse a parameter that cannot be accumulated.

    Raises:
        TypeError: for its dtype, and for a tensor that does not own its memory.
        ValueError: for its layout or device.
    """
    refuse_partitioned(name, param)
    shard = shard_of(param)
    if shard is not None:
        name, param = f"the local tensor of {name}", shard.local(param)
    refuse_tensor(name, param)
    if param.dtype not in PARAM_DTYPES:
        allowed = ", ".join(str(d) for d in PARAM_DTYPES)
        raise TypeError(
            f"{name} of shape {tuple(param.shape)} has dtype {param.dtype}; allowed: {allowed}. "
            "Convert it, freeze it (requires_grad_(False)), or give it an optimizer of its own"
        )
    if param.device.type == "meta":
        raise ValueError(
            f"{name} is on the meta device; materialise the model before wrapping the optimizer"
        )
    if param.layout is not torch.strided or not is_dense(param):
        raise ValueError(
            f"{name} of shape {tuple(param.shape)} has layout {param.layout} and strides "
            f"{param.stride()}; parameters must be dense: make it from tensor.contiguous()"
        )


def check_once(params: Sequence[Tensor]) -> None:
    """Refuse a trained parameter that stands in the param groups more than once.

    Raises:
        ValueError: naming it.
    """
    if len(set(params)) == len(params):
        return
    for param, n in Counter(params).items():
        if n > 1 and param.requires_grad:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} stands {n} times in the param groups, "
                "and would be updated as often at the same time: let it stand in one place only"
            )


def check_apart(named: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse parameters that share memory: one launch would update it twice at the same time.

    Raises:
        ValueError: naming two of them.
    """
    params = [local_of(param) for _, param in named]
    found = sharing(params, len(params))
    if found is not None:
        one, other = (named[i][0] for i in found)
        raise ValueError(
            f"{one} and {other} are two parameters that share memory, and would be updated at the "
            "same time: let one Parameter stand in both places (head.weight = embedding.weight), "
            "or give one of them a clone() of what is shared"
        )


def node_of(param: Tensor) -> Any:
    """The node that accumulates a parameter's gradient."""
    with torch.inference_mode(False):  # in which there are no nodes
        return torch.autograd.graph.get_gradient_edge(param).node


class Slot:
    """One parameter.

    Attributes:
        param: the parameter, where it always was.
        shard: how a DTensor lies over the processes; None for an ordinary parameter. All else is
            of what this process holds of it.
        block, position: the flat buffers that it has a part of, and its place in them.
        row: its row in the update's device tables.
        updater, is_own: the rank of the process that keeps its states and updates it, and whether
            that is this one: all do, but where states are shared out.
        acc: its fp32 accumulator, part of a flat buffer, made when first needed.
        grad: the same memory as `acc`, the (D)tensor that `param.grad` shows. It has a version
            counter of its own, so that a change from outside is seen.
        fill: what `acc` holds of the open window.
        closed_version: version of `grad` when the last micro-batch was closed.
        is_zero: whether `acc` holds zeros because somebody asked for them.
        pending: whether a gradient waits in the collector's queue.
        is_due: whether that is one, and not a None.
        takes_products: whether gradients may come as products (`products.Products`), beside which
            autograd brings a None that means nothing.
        cell, n_cells: where its partial sums of squares are.
        sums_version: version of `grad` that the partial sums belong to, None if they do not.
        has_sums: whether its cells may hold something other than zero.
        node: the AccumulateGrad node, which autograd itself holds only weakly.
        seen_at: its `place` when it was last seen to have that node.
        hook: the handle of the hook on it.
    """

    __slots__ = (
        "__weakref__", "acc", "block", "cell", "closed_version", "device", "dtype",
        "fill", "grad", "has_sums", "hook", "is_contiguous", "is_due", "is_own", "is_zero",
        "n_cells", "nbytes", "node", "numel", "param", "pending", "position", "row", "seen_at",
        "shape", "shard", "stride", "sums_version", "takes_products", "updater",
    )  # fmt: skip

    def __init__(
        self,
        param: Tensor,
        block: Block,
        position: int,
        row: int,
        cell: int,
        *,
        updater: int,
        is_own: bool,
    ) -> None:
        self.param, self.shard = param, shard_of(param)
        local = self.local
        self.dtype, self.device = local.dtype, local.device
        self.shape, self.stride = local.shape, local.stride()
        self.is_contiguous = local.is_contiguous()
        self.numel = local.numel()
        self.nbytes = self.numel * local.element_size()
        self.block, self.position = block, position
        self.row, self.cell, self.n_cells = row, cell, count_chunks(self.numel)
        self.updater, self.is_own = updater, is_own
        self.acc: Tensor = None  # type: ignore[assignment]  # see `allocate`
        self.grad: Tensor | None = None
        self.fill = Fill.EMPTY
        self.pending = self.has_sums = self.is_zero = self.is_due = self.takes_products = False
        self.closed_version = 0
        self.sums_version: int | None = None
        self.node: Any = None
        self.seen_at: Any = None
        self.hook: Any = None

    @property
    def local(self) -> Tensor:
        """What this process holds of the parameter: its memory."""
        return self.param if self.shard is None else self.shard.local(self.param)

    def part(self, tensor: Tensor) -> Tensor:
        """What this process holds of a tensor that belongs to the parameter."""
        return tensor if self.shard is None else self.shard.part(tensor)

    def shown(self, local: Tensor) -> Tensor:
        """What people see of a tensor that this process holds: the same memory."""
        return local if self.shard is None else self.shard.whole(local)

    def allocate(self) -> None:
        """Make the accumulator. Its first use stores, so it is not zeroed."""
        if self.grad is None:
            self.acc = self.block.view("acc", self.position, torch.float32, zeroed=False)
            # .data: the same memory with a version counter of its own.
            self.grad = self.shown(self.acc.data)
        elif self.grad.dtype is not torch.float32:
            self.show_again()

    @property
    def is_written(self) -> bool:
        """Whether somebody wrote `grad` in place since the last micro-batch was closed."""
        return self.grad is not None and self.grad._version != self.closed_version

    def note_version(self) -> None:
        """What `grad` is now counts as not written."""
        if self.grad is not None:
            self.closed_version = self.grad._version

    def restore(self, accumulated: Tensor, fill: Fill) -> None:
        """Take over the accumulator of a checkpoint, and show it."""
        self.allocate()
        assert self.grad is not None
        self.acc.copy_(self.part(accumulated))
        self.fill, self.sums_version = fill, None
        self.note_version()
        self.param.grad = self.grad

    def show_zeros(self) -> None:
        """Let `param.grad` show zeros, which the next update uses."""
        self.allocate()
        assert self.grad is not None
        self.param.grad = self.grad
        self.grad.detach().zero_()
        self.fill, self.is_zero, self.sums_version = Fill.EARLIER, True, None
        self.note_version()

    def show_again(self) -> None:
        """Make `grad` anew, after `model.to()` converted the tensor that showed `acc`."""
        self.grad = self.shown(self.acc.data)
        self.sums_version = None
        self.note_version()

    def view(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """This parameter's part of the flat buffer `name`, which starts as zeros."""
        return self.block.view(name, self.position, dtype, zeroed=True)

    def difference(self) -> str | None:
        """What became of the parameter since it was wrapped, if anything did."""
        param = self.local
        if (
            param.dtype is self.dtype
            and param.shape == self.shape
            and (param.is_contiguous() if self.is_contiguous else param.stride() == self.stride)
            and param.device == self.device
        ):
            return None  # nearly always, and asked of every parameter at every micro-batch
        if param.dtype is not self.dtype:
            return f"dtype changed from {self.dtype} to {param.dtype}"
        if param.shape != self.shape:
            return f"shape changed from {tuple(self.shape)} to {tuple(param.shape)}"
        if param.device != self.device:
            return f"device changed from {self.device} to {param.device}"
        if param.stride() != self.stride:
            return f"strides changed from {self.stride} to {param.stride()}"
        return None

    @property
    def place(self) -> Any:
        """Where the parameter is; of a DTensor, which has no address, its attributes, that are
        others once `torch.utils.swap_tensors()` was there."""
        return self.param.data_ptr() if self.shard is None else vars(self.param)

    def change(self) -> str | None:
        """`difference`, or that the parameter has another node than the one with the hook.

        `set_()` has autograd make it another one, and so have a conversion there and back and
        `torch.utils.swap_tensors()`, by which `model.to()` replaces shards.
        `p.data = ...` of the same kind does not.
        """
        if (difference := self.difference()) or self.node is None:
            return difference
        place = self.place
        is_there = place is self.seen_at if self.shard is not None else place == self.seen_at
        if is_there or not self.param.requires_grad:
            return None
        if node_of(self.param) is not self.node:
            return (
                "its memory was replaced, by set_() as in register_parametrization(), by "
                "swap_tensors() as in to() of a model with DTensors, or by a conversion there and "
                "back"
            )
        self.seen_at = place
        return None


_fill, _grad, _dtype = attrgetter("fill"), attrgetter("grad"), attrgetter("dtype")
_acc = attrgetter("acc")
_grad_version, _sums_version = attrgetter("grad._version"), attrgetter("sums_version")


class Slots(dict[Tensor, Slot]):
    """Those of an optimizer, by parameter.

    What is asked at every micro-batch is answered without Python code for each of them, where there
    are nearly always thousands that are as they should be.
    """

    def filled(self) -> list[Slot]:
        """Those that the open window holds a gradient for."""
        return [slot for slot in self.values() if slot.fill]

    @property
    def is_any_filled(self) -> bool:
        """Whether the open window holds a gradient for any parameter."""
        return any(map(_fill, self.values()))

    @property
    def are_all_filled(self) -> bool:
        return Fill.EMPTY not in map(_fill, self.values())

    @property
    def has_arrivals(self) -> bool:
        """Whether the open micro-batch has contributed anything."""
        return Fill.CURRENT in map(_fill, self.values())

    def suspects(self) -> list[Slot]:
        """Those whose `p.grad` somebody wrote or assigned, where the open micro-batch brought
        nothing: it may have been autograd, past a hook that is lost."""
        current = Fill.CURRENT
        if {current}.issuperset(map(_fill, self.values())):
            return []  # nearly always, where a backward was before
        return [
            slot
            for slot in self.values()
            if slot.fill is not current
            and (grad := slot.param.grad) is not None
            and (grad is not slot.grad or slot.is_written)
        ]

    def showing_others(self) -> list[Slot]:
        """Those whose `grad` has other memory than `acc`: somebody assigned `p.grad.data`."""
        address = Tensor.data_ptr
        try:
            grads, accs = map(_grad, self.values()), map(_acc, self.values())
            if all(map(eq, map(address, grads), map(address, accs))):
                return []
        except TypeError:  # no accumulator yet
            pass
        return [
            slot
            for slot in self.values()
            if slot.grad is not None
            and slot.shard is None
            and address(slot.grad) != address(slot.acc)
        ]

    @property
    def are_shown(self) -> bool:
        """Whether every parameter shows its accumulator, or None where there is none yet."""
        return all(map(is_, map(_grad, self), map(_grad, self.values())))

    @property
    def are_fp32(self) -> bool:
        """Whether every accumulator is there, and none was converted by `model.to()`."""
        try:
            return set(map(_dtype, map(_grad, self.values()))) == {torch.float32}
        except AttributeError:  # a None
            return False

    @property
    def have_sums(self) -> bool:
        """Whether the partial sums of every parameter are those of what it has accumulated now."""
        try:
            return list(map(_grad_version, self.values())) == list(
                map(_sums_version, self.values())
            )
        except AttributeError:  # no accumulator yet
            return False

    def memory(self) -> Any:
        """Where each parameter is, and its dtype; NaN, which equals nothing, where one has no
        address, as shards have none."""
        addresses = list(map(Tensor.data_ptr, self))
        return math.nan if 0 in addresses else (addresses, list(map(_dtype, self)))

    def layout(self) -> Any:
        """The parameters' sizes and strides."""
        return list(map(Tensor.size, self)), list(map(Tensor.stride, self))

    def close_micro_batch(self) -> None:
        """What the open micro-batch has brought is a part of the sum."""
        earlier = Fill.EARLIER
        for slot in self.values():
            if slot.fill and slot.grad is not None:
                slot.fill, slot.closed_version = earlier, slot.grad._version

    def end_window(self, keeps: bool) -> None:
        """The window was used; with `keeps`, the next one goes on adding to the sum."""
        for slot in self.values():
            slot.fill = Fill.EARLIER if keeps and slot.fill else Fill.EMPTY

    def empty(self) -> None:
        """The window is given up."""
        for slot in self.values():
            slot.fill, slot.pending = Fill.EMPTY, False
