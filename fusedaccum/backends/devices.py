"""What a device may lack that CPUs and CUDA GPUs have: Apple's GPUs, for one.

They have no float64, and `data_ptr()` is no address there: it is a handle of the storage, plus an
offset, so that ranges of different tensors seem to overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_HAVE_BOTH = ("cpu", "cuda")
_STORAGE_BITS = 44  # no storage has as many bytes as this counts


@cache
def _has_float64(device: torch.device) -> bool:
    if device.type in _HAVE_BOTH:
        return True
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def with_float64(tensor: Tensor) -> Tensor:
    """A tensor, or a copy of it on the host where its device has no float64."""
    return tensor if _has_float64(tensor.device) else tensor.cpu()


def norm_of(sums: Tensor) -> Tensor:
    """The norm of which these are partial sums of squares: 0-d float64, see `with_float64`."""
    return with_float64(sums).double().sum().sqrt()


def starts(tensors: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    """Where the memory of each tensor begins, in bytes: tensors that share memory overlap.

    Args:
        tensors: of one device.
    """
    found = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    if not tensors or tensors[0].device.type in _HAVE_BOTH:
        return found
    bytes_before = (int(t.storage_offset()) * t.element_size() for t in tensors)
    offsets = np.fromiter(bytes_before, np.int64, len(tensors))
    _, storages = np.unique(found - offsets, return_inverse=True)
    return np.where(found == 0, 0, (storages + 1 << _STORAGE_BITS) + offsets)


def same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype begin at the same memory."""
    is_address = one.device.type in _HAVE_BOTH or one.storage_offset() == other.storage_offset()
    return is_address and one.data_ptr() == other.data_ptr()
