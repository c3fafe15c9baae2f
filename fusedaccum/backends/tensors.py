"""Tensors whose memory a backend can walk: dense, their own, each element where it seems to be.

Tensors that are something else are refused by name, at once: a sharded one has no address, and an
engine would train wrong without a word. Nothing is imported for that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .devices import starts as starts_of

# Elements: views into a flat buffer start at multiples of it, which are multiples of 32 bytes even
# for 2-byte types.
ALIGNMENT = 16

FSDP2 = (
    "Use fully_shard (FSDP2), with mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32), "
    "before the optimizer is made"
)


def refuse_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose memory is not one block of its own that holds its values.

    Raises:
        TypeError: naming its class and what to do.
        ValueError: for memory that is not there.
    """
    kind = type(tensor)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        _refuse_kind(name, kind)
    if getattr(tensor, "_is_flat_param", False):  # FSDP1; its class is Parameter
        raise TypeError(
            f"{name} is a FlatParameter of FullyShardedDataParallel (FSDP1), which holds many "
            f"parameters and moves its memory: it is not supported. {FSDP2}"
        )
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor, which is not one dense block of memory")
    if tensor.layout is not torch.strided or tensor.is_meta:
        return  # others say what is wrong there
    if tensor.is_neg():
        raise TypeError(
            f"{name} is the negative of what its memory holds; make it from tensor.resolve_neg()"
        )
    if tensor.numel() and tensor.data_ptr() == 0:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} has no memory: an engine that shards it has "
            "taken that away, or it was freed. Wrap the optimizer where the parameters are whole"
        )


def _refuse_kind(name: str, kind: type[Tensor]) -> None:
    """Refuse a subclass of Tensor that is not one block of memory.

    Raises:
        TypeError: naming it.
    """
    if is_dtensor(kind):
        raise TypeError(
            f"{name} is a {kind.__name__}, whose memory is in shards on several processes: give "
            "what this one holds, tensor.to_local()"
        )
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name} is a {kind.__name__}, a tensor subclass that runs operations itself "
            "(__torch_dispatch__): its memory is not one block that a kernel could write. Keep "
            "such tensors out of here: freeze them, or use the plain optimizer"
        )


def is_dtensor(kind: type[Tensor]) -> bool:
    """By name: nothing of torch.distributed is imported for those who do not use it."""
    return any(base.__name__ == "DTensor" for base in kind.__mro__)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order, each exactly once."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for size, stride in sorted(
        ((n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1),
        key=lambda pair: pair[1],
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether element `i` of the memory of dense `a` is element `i` of that of `b`, for every `i`.

    A dimension of size 1 may have any stride.
    """
    if a.shape != b.shape:
        return False
    if a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous()):
        return True
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(x == y for n, x, y in pairs if n != 1) or a.numel() == 0


def holds_values(tensor: Tensor) -> bool:
    """Whether the values of a strided tensor are those in its memory.

    They are not where it is the negative of them, as gradients of complex arithmetic may be (the
    imaginary part of a conjugate), or a zero that has no memory.
    """
    return not (tensor.is_neg() or tensor._is_zerotensor())


def laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` itself where element `i` of its memory is element `i` of `like`'s, else such a copy.

    A gradient may be expanded, transposed, sparse, or other numbers than its memory; the kernels
    walk memory.
    """
    if tensor.layout is torch.strided:
        if same_order(tensor, like) and holds_values(tensor):
            return tensor
    else:
        tensor = tensor.to_dense()
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def sharing(tensors: Sequence[Tensor], n_written: int) -> tuple[int, int] | None:
    """Two of some dense tensors that share memory, of which one or both are written.

    Args:
        tensors: those that are written, and then those that are only read, which may share theirs.
        n_written: how many are written.

    Returns:
        Their positions, the lower one first; None where there are none.
    """
    starts = starts_of(tensors)
    ends = starts + np.fromiter((t.nbytes for t in tensors), np.int64, len(tensors))
    order = np.lexsort((ends, starts))
    order = order[(ends[order] > starts[order]) & (starts[order] > 0)]  # empty ones share nothing
    is_written = order < n_written
    # How far what came before reaches: anything, and what is written.
    reach = np.maximum.accumulate(np.append(0, ends[order]))[:-1]
    reach_written = np.maximum.accumulate(np.append(0, np.where(is_written, ends[order], 0)))[:-1]
    clash = starts[order] < np.where(is_written, reach, reach_written)
    if not clash.any():
        return None
    position = int(np.argmax(clash))
    second = int(order[position])
    before = [int(i) for i in order[:position] if is_written[position] or i < n_written]
    first = next(i for i in before if ends[i] > starts[second])
    return min(first, second), max(first, second)
