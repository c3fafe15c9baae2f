"""What the wrapper knows of each parameter: its place in the buffers, and its window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .buffers import Block, is_dense
from .engines import refuse_partitioned, refuse_tensor
from .tables import count_chunks

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


class Segment:
    """One parameter.

    Attributes:
        param: the parameter, where it always was.
        row: its row in the update's device tables.
        acc: its fp32 accumulator, part of a flat buffer, made when first needed.
        grad: the same memory as `acc`, the tensor that `param.grad` shows. It has a version
            counter of its own, so that a change from outside is seen.
        filled: whether `acc` holds something of this window (if not, the next gradient stores).
        arrived: whether the open micro-batch has contributed.
        pending: whether a gradient waits in the collector's queue.
        cell, n_cells: where its partial sums of squares are.
        sums_version: version of `grad` that the partial sums belong to, None if they do not.
        has_sums: whether its cells may hold something other than zero.
        kind: "none", "stochastic", "split" or "fp32", see `master_kind`.
        master: remainder or fp32 master, made at the first update.
        loaded_master: fp32 master from a checkpoint, not yet compared with the parameter.
        param_version: version of `param` after the last update.
        states: the optimizer's states, fp32, in the rule's order.
        step: its step count, 0-d, on the device.
        numbers: the 0-d states that `state[param]` shows, by torch's names.
        node: the AccumulateGrad node, which autograd itself holds only weakly.
        hook: the handle of the hook on it.
    """

    __slots__ = (
        "__weakref__", "_block", "_position", "acc", "arrived", "cell", "device", "dtype",
        "filled", "grad", "has_sums", "hook", "is_contiguous", "kind", "loaded_master",
        "master", "n_cells", "nbytes", "node", "numbers", "numel", "param", "param_version",
        "pending", "row", "shape", "states", "step", "stride", "sums_version",
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
        self.filled = self.arrived = self.pending = self.has_sums = False
        self.sums_version: int | None = None
        self.master: Tensor | None = None
        self.loaded_master: Tensor | None = None
        self.param_version = param._version
        self.states: tuple[Tensor, ...] = ()
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
        """Make the master agree with the parameter where somebody wrote the parameter.

        An fp32 master is compared element by element in the step itself. A remainder is dropped
        when the version counter moved; a write past it (`param.data`) leaves a remainder of at
        most half a bf16 step, under which the new value still shows.
        """
        param = self.param
        if not self.has_master:
            return
        if self.master is None:
            dtype = torch.int16 if self.kind == "split" else torch.float32
            self.master = self.view("master", dtype)
            self.param_version = -1
        if self.loaded_master is not None:
            self._adopt_loaded(self.loaded_master)
        elif self.param_version != param._version:
            if self.kind == "split":
                self.master.zero_()
            else:
                known = self.master.to(param.dtype) == param
                self.master.copy_(torch.where(known, self.master, param.float()))
        self.param_version = param._version

    def _adopt_loaded(self, loaded: Tensor) -> None:
        """Take a checkpoint's master wherever the parameter is its rounded value."""
        assert self.master is not None
        self.loaded_master = None
        if self.kind == "split":
            from .reference import split_master

            high, remainder = split_master(loaded)
            agrees = high == self.param
            self.master.copy_(torch.where(agrees, remainder, torch.zeros_like(remainder)))
        else:
            agrees = loaded.to(self.dtype) == self.param
            self.master.copy_(torch.where(agrees, loaded, self.param.float()))

    def precise(self) -> Tensor | None:
        """The fp32 master of the parameter as it is now, a new tensor; None if it has none."""
        if not self.has_master or (self.master is None and self.loaded_master is None):
            return None
        self.refresh_master()
        assert self.master is not None
        if self.kind == "split":
            from .reference import join_master

            return join_master(self.param.detach(), self.master)
        return self.master.clone()
