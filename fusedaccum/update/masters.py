"""The precise value of each parameter: the parameter itself, or what a master adds to it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Keep, reference
from ..window.slots import Slot


class Master:
    """How one parameter's precise value is kept.

    Args:
        slot: of the parameter.
        keep: how its precise value is kept.

    Attributes:
        keep: as given, or what `use_fp32` has made of it.
        tensor: remainder or fp32 master, made at the first update.
        loaded: an fp32 master from a checkpoint, not yet compared with the parameter: the weights
            may be loaded after the optimizer.
    """

    __slots__ = ("_slot", "keep", "loaded", "tensor")

    def __init__(self, slot: Slot, keep: Keep) -> None:
        self._slot = slot
        self.keep = keep
        self.tensor: Tensor | None = None
        self.loaded: Tensor | None = None

    @property
    def is_kept(self) -> bool:
        """Whether something beside the parameter keeps its precise value."""
        return self.keep.master_dtype is not None

    def refresh(self) -> None:
        """Make the master where there is none yet, and take over a checkpoint's.

        A parameter written from outside needs nothing more. A remainder stays: with the written
        value it is a master within half a bf16 step of it. An fp32 master is compared with the
        parameter, element by element, wherever it is read (`reference.precise`). So a master of
        zeros is that of any parameter as it is.
        """
        dtype = self.keep.master_dtype
        if dtype is None:
            return
        if self.tensor is None:
            self.tensor = self._slot.view("master", dtype)
        if self.loaded is not None:
            self.tensor.copy_(self._adopted(self.loaded))
            self.loaded = None

    def _adopted(self, loaded: Tensor) -> Tensor:
        """The master of what a checkpoint had; a parameter written since keeps the remainder."""
        return loaded if self.keep is Keep.FP32 else reference.split_master(loaded)[1]

    def forget(self) -> None:
        """Let the parameter count alone, as before the first update."""
        self.loaded = None
        if self.tensor is not None:
            self.tensor.zero_()

    def restore(self, loaded: Tensor | None) -> None:
        """Go on with an fp32 master of a checkpoint, or without one."""
        self.forget()
        if loaded is not None:
            self.loaded = self._slot.part(loaded).to(self._slot.device, torch.float32)

    def use_fp32(self) -> Tensor:
        """The precise value as an fp32 master, now and from now on, for steps of other packages."""
        value = self.precise()
        tensor = self._slot.view("master").copy_(self._slot.local if value is None else value)
        self.keep, self.tensor, self.loaded = Keep.FP32, tensor, None
        return tensor

    def precise(self) -> Tensor | None:
        """The fp32 value that an update would start from, a new tensor; None without a master.

        Nothing is changed: a parameter that is swapped for the time being keeps its master.
        """
        master = self.tensor if self.loaded is None else self._adopted(self.loaded)
        if not self.is_kept or master is None:
            return None
        param = self._slot.local.detach()
        return reference.precise(param, master.to(param.device))  # the model may have moved


class Masters(dict[Slot, Master]):
    """Each parameter's master, made when it is first asked for.

    Args:
        mode: `master_weights` of `FusedAccumOptimizer`.
        splits: whether a master may be split; else it is an fp32 copy.
        is_stochastic: whether bf16 parameters without a master are rounded at random.
    """

    def __init__(self, mode: str | None, splits: bool, is_stochastic: bool) -> None:
        super().__init__()
        self._mode, self._splits, self._is_stochastic = mode, splits, is_stochastic

    def check(self, dtype: torch.dtype) -> None:
        """Refuse a parameter's dtype.

        Raises:
            ValueError: see `Keep.of`.
        """
        Keep.of(self._mode, dtype)

    def __missing__(self, slot: Slot) -> Master:
        keep = Keep.of(self._mode, slot.dtype, self._is_stochastic)
        if keep is Keep.SPLIT and not self._splits:
            keep = Keep.FP32
        master = self[slot] = Master(slot, keep)
        return master
