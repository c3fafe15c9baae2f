"""The precise value of each parameter: the parameter itself, or what a master adds to it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import reference
from ..window.slots import Slot


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


class Master:
    """How one parameter's precise value is kept.

    Args:
        slot: of the parameter.
        kind: "none", "stochastic", "split" or "fp32", see `master_kind`.

    Attributes:
        kind: as given, or what `use_fp32` has made of it.
        tensor: remainder or fp32 master, made at the first update.
        loaded: an fp32 master from a checkpoint, not yet compared with the parameter: the weights
            may be loaded after the optimizer.
    """

    __slots__ = ("_slot", "kind", "loaded", "tensor")

    def __init__(self, slot: Slot, kind: str) -> None:
        self._slot = slot
        self.kind = kind
        self.tensor: Tensor | None = None
        self.loaded: Tensor | None = None

    @property
    def is_kept(self) -> bool:
        """Whether something beside the parameter keeps its precise value."""
        return self.kind in ("split", "fp32")

    def refresh(self) -> None:
        """Make the master where there is none yet, and take over a checkpoint's.

        A parameter written from outside needs nothing more. A remainder stays: with the written
        value it is a master within half a bf16 step of it. An fp32 master is compared with the
        parameter, element by element, wherever it is read (`reference.precise`). So a master of
        zeros is that of any parameter as it is.
        """
        if not self.is_kept:
            return
        if self.tensor is None:
            dtype = torch.int16 if self.kind == "split" else torch.float32
            self.tensor = self._slot.view("master", dtype)
        if self.loaded is not None:
            self.tensor.copy_(self._adopted(self.loaded))
            self.loaded = None

    def _adopted(self, loaded: Tensor) -> Tensor:
        """The master of what a checkpoint had; a parameter written since keeps the remainder."""
        return loaded if self.kind == "fp32" else reference.split_master(loaded)[1]

    def forget(self) -> None:
        """Let the parameter count alone, as before the first update."""
        self.loaded = None
        if self.tensor is not None:
            self.tensor.zero_()

    def use_fp32(self) -> Tensor:
        """The precise value as an fp32 master, now and from now on, for steps of other packages."""
        value = self.precise()
        tensor = self._slot.view("master").copy_(self._slot.param if value is None else value)
        self.kind, self.tensor, self.loaded = "fp32", tensor, None
        return tensor

    def precise(self) -> Tensor | None:
        """The fp32 value that an update would start from, a new tensor; None without a master.

        Nothing is changed: a parameter that is swapped for the time being keeps its master.
        """
        master = self.tensor if self.loaded is None else self._adopted(self.loaded)
        if not self.is_kept or master is None:
            return None
        return reference.precise(self._slot.param.detach(), master)


class Masters(dict[Slot, Master]):
    """Each parameter's master, made when it is first asked for.

    Args:
        mode: `master_weights` of `FusedAccumOptimizer`, or "stochastic".
        splits: whether a master may be split; else it is an fp32 copy.
    """

    def __init__(self, mode: str | None, splits: bool) -> None:
        super().__init__()
        self._mode, self._splits = mode, splits

    def check(self, dtype: torch.dtype) -> None:
        """Refuse a parameter's dtype.

        Raises:
            ValueError: see `master_kind`.
        """
        master_kind(self._mode, dtype)

    def __missing__(self, slot: Slot) -> Master:
        kind = master_kind(self._mode, slot.dtype)
        if kind == "split" and not self._splits:
            kind = "fp32"
        master = self[slot] = Master(slot, kind)
        return master
