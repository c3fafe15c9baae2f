"""What the wrapper knows of each parameter: its place in the buffers, and its window."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.tables import count_chunks
from ..backends.tensors import is_dense, refuse_tensor
from .buffers import Block
from .engines import refuse_partitioned

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Fill(IntEnum):
    """What a parameter's accumulator holds of the open window."""

    EMPTY = 0  # Nothing: the next gradient is stored and not added.
    EARLIER = 1  # A sum that the open micro-batch has not contributed to.
    CURRENT = 2  # A sum that the open micro-batch has contributed to.


def master_kind(mode: str | None, dtype: torch.dtype) -> str:
    """How the precise value of a parameter of `dtype` is kept under `master_weights=mode`.

    "stochastic" is "none" with stochastic rounding, of bf16 parameters.

    Raises:
        ValueError: for an unknown mode, and for "split" on fp16.
    """
    if mode not in (None, "split", "fp32", "none", "stochastic"):
        raise ValueError(
            f'master_weights must be None (automatic), "split", "fp32" or "none", got {mode!r}'
        )
    if dtype == torch.float32 or mode == "none":
        return "none"
    if dtype == torch.bfloat16:
        return mode or "split"
    if mode == "stochastic":
        return "none"
    if mode == "split":
        raise ValueError(
            'master_weights="split" needs bfloat16 parameters (the high half of a float32 number '
            'is a bfloat16), but the model has float16 ones; use None or "fp32"'
        )
    return "fp32"


def check_param(name: str, param: Tensor) -> None:
    """Refuse a parameter that cannot be accumulated.

    Raises:
        TypeError: for its dtype, and for a tensor that does not own its memory.
        ValueError: for its layout or device.
    """
    refuse_partitioned(name, param)
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


class Slot:
    """One parameter.

    Attributes:
        param: the parameter, where it always was.
        row: its row in the update's device tables.
        acc: its fp32 accumulator, part of a flat buffer, made when first needed.
        grad: the same memory as `acc`, the tensor that `param.grad` shows. It has a version
            counter of its own, so that a change from outside is seen.
        fill: what `acc` holds of the open window.
        closed_version: version of `grad` when the last micro-batch was closed.
        is_zero: whether `acc` holds zeros because somebody asked for them.
        pending: whether a gradient waits in the collector's queue.
        is_due: whether that is one, and not a None.
        cell, n_cells: where its partial sums of squares are.
        sums_version: version of `grad` that the partial sums belong to, None if they do not.
        has_sums: whether its cells may hold something other than zero.
        kind: "none", "stochastic", "split" or "fp32", see `master_kind`.
        master: remainder or fp32 master, made at the first update.
        loaded_master: fp32 master from a checkpoint, not yet compared with the parameter: the
            weights may be loaded after the optimizer.
        states: the optimizer's states, fp32, in the rule's order.
        starts: what states and numbers started as, by name, where that is not zero.
        step: its step count, 0-d, on the device.
        knows_step: whether a checkpoint told its step count.
        numbers: the 0-d states that `state[param]` shows, by torch's names.
        node: the AccumulateGrad node, which autograd itself holds only weakly.
        hook: the handle of the hook on it.
    """

    __slots__ = (
        "__weakref__", "_block", "_position", "acc", "cell", "closed_version", "device", "dtype",
        "fill", "grad", "has_sums", "hook", "is_contiguous", "is_due", "is_zero", "kind",
        "knows_step", "loaded_master", "master", "n_cells", "nbytes", "node", "numbers", "numel",
        "param", "pending", "row", "shape", "starts", "states", "step", "stride", "sums_version",
    )  # fmt: skip

    def __init__(
        self, param: Tensor, block: Block, position: int, row: int, cell: int, kind: str
    ) -> None:
        self.param = param
        self.dtype, self.device = param.dtype, param.device
        self.shape, self.stride = param.shape, param.stride()
        self.is_contiguous = param.is_contiguous()
        self.numel = param.numel()
        self.nbytes = self.numel * param.element_size()
        self._block, self._position = block, position
        self.row, self.cell, self.n_cells = row, cell, count_chunks(self.numel)
        self.kind = kind
        self.acc: Tensor = None  # type: ignore[assignment]  # see `allocate`
        self.grad: Tensor | None = None
        self.fill = Fill.EMPTY
        self.pending = self.has_sums = self.knows_step = self.is_zero = self.is_due = False
        self.closed_version = 0
        self.sums_version: int | None = None
        self.master: Tensor | None = None
        self.loaded_master: Tensor | None = None
        self.states: tuple[Tensor, ...] = ()
        self.starts: dict[str, float] = {}
        self.step: Tensor | None = None
        self.numbers: dict[str, Tensor] = {}
        self.node: Any = None
        self.hook: Any = None

    def allocate(self) -> None:
        """Make the accumulator. Its first use stores, so it is not zeroed."""
        if self.grad is None:
            self.acc = self._block.view("acc", self._position, torch.float32, zeroed=False)
            # .data: the same memory with a version counter of its own.
            self.grad = self.acc.data
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

    def show_again(self) -> None:
        """Make `grad` anew, after `model.to()` converted the tensor that showed `acc`."""
        self.grad = self.acc.data
        self.sums_version = None
        self.note_version()

    def view(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """This parameter's part of the flat buffer `name`, which starts as zeros."""
        return self._block.view(name, self._position, dtype, zeroed=True)

    @property
    def has_master(self) -> bool:
        """Whether something beside the parameter keeps its precise value."""
        return self.kind in ("split", "fp32")

    @property
    def sums_are_current(self) -> bool:
        """Whether the partial sums are those of what `param.grad` shows now."""
        return self.grad is not None and self.sums_version == self.grad._version

    def difference(self) -> str | None:
        """What became of the parameter since it was wrapped, if anything did."""
        param = self.param
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

    def refresh_master(self) -> None:
        """Make the master where there is none yet, and take over a checkpoint's.

        A parameter written from outside needs nothing more. A remainder stays: with the written
        value it is a master within half a bf16 step of it. An fp32 master is compared with the
        parameter, element by element, wherever it is read (`reference.precise`). So a master of
        zeros is that of any parameter as it is.
        """
        if not self.has_master:
            return
        if self.master is None:
            dtype = torch.int16 if self.kind == "split" else torch.float32
            self.master = self.view("master", dtype)
        if self.loaded_master is not None:
            self.master.copy_(self._adopted(self.loaded_master))
            self.loaded_master = None

    def _adopted(self, loaded: Tensor) -> Tensor:
        """The master of what a checkpoint had; a parameter written since keeps the remainder."""
        return loaded if self.kind == "fp32" else reference.split_master(loaded)[1]

    def forget_master(self) -> None:
        """Let the parameter count alone, as before the first update."""
        self.loaded_master = None
        if self.master is not None:
            self.master.zero_()

    def use_fp32_master(self) -> Tensor:
        """The precise value as an fp32 master, now and from now on, for steps of other packages."""
        value = self.precise()
        if self.kind == "split":
            self.kind, self.master, self.loaded_master = "fp32", None, None
        self.refresh_master()
        assert self.master is not None
        return self.master.copy_(self.param if value is None else value)

    def precise(self) -> Tensor | None:
        """The fp32 value that an update would start from, a new tensor; None without a master.

        Nothing is changed: a parameter that is swapped for the time being keeps its master.
        """
        master = self.master if self.loaded_master is None else self._adopted(self.loaded_master)
        if not self.has_master or master is None:
            return None
        return reference.precise(self.param.detach(), master)
