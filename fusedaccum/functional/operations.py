"""The operations on lists of tensors, for framework authors and micro-benchmarks.

Everything works in place on tensors the caller owns, in one launch per operation on a GPU, and
allocates nothing that grows with the model. `FusedAccumOptimizer` is made of the same operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Add, Backend, SumOfSquares, norm_of
from ..backends.operations import GRAD_DTYPES
from ..backends.tables import count_chunks
from ..backends.tensors import is_dense, laid_out_like
from ..backends.untraced import untraced
from .numbers import check_number
from .run import backend_for, check, check_apart, check_shapes, check_written


@untraced
@torch.no_grad()
def accumulate_(
    accumulators: Sequence[Tensor],
    grads: Sequence[Tensor],
    scale: float = 1.0,
    *,
    first: bool = False,
    backend: str | None = None,
) -> None:
    """Add scaled gradients into fp32 accumulators.

        acc = (0 if first else acc) + scale * float32(grad)

    Args:
        accumulators: fp32 tensors, dense; changed in place.
        grads: as many tensors of the same shapes, bf16, fp16 or fp32, in any layout (an expanded,
            transposed or sparse one is copied first). Only read.
        scale: 1/N of an N-micro-batch mean, say.
        first: store instead of add, so that accumulators need no zeroing.
        backend: None (automatic), "triton" or "torch".

    Raises:
        TypeError: for another dtype, and a scale that is no number.
        ValueError: for lists, shapes or devices that do not match.

    Example:
        >>> acc = [torch.empty(3)]
        >>> accumulate_(acc, [torch.tensor([1.0, 2.0, 3.0])], 0.5, first=True)
        >>> accumulate_(acc, [torch.tensor([1.0, 2.0, 3.0])], 0.5)
        >>> acc
        [tensor([1., 2., 3.])]
    """
    check("accumulators", accumulators, (torch.float32,))
    check("grads", grads, GRAD_DTYPES)
    check_number("scale", scale)
    check_written("accumulators", accumulators, accumulators)
    if len(accumulators) != len(grads):
        raise ValueError(f"{len(accumulators)} accumulators but {len(grads)} grads")
    check_shapes("grads", grads, accumulators)
    if not accumulators:
        return
    laid_out = [laid_out_like(g, a) for g, a in zip(grads, accumulators, strict=True)]
    check_apart({"accumulators": accumulators}, {"grads": laid_out})
    pairs = list(zip(accumulators, laid_out, strict=True))
    backend_for(backend, accumulators[0].device).accumulate(Add(pairs, float(scale), first))
    torch.autograd.graph.increment_version(list(accumulators))


@untraced
@torch.no_grad()
def global_norm(tensors: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """L2 norm of all elements of all tensors together, as `clip_grad_norm_` means it.

    Squares are summed in fp32 within 8,192 elements and in float64 beyond; an element above
    1.8e19 in magnitude makes it inf, as in torch.

    Args:
        tensors: bf16, fp16 or fp32, any layout; only read.
        backend: None (automatic), "triton" or "torch".

    Returns:
        0-d fp32 tensor on the tensors' device; nothing waits for it. No tensors: 0, on the CPU.

    Raises:
        TypeError: for another dtype.
        ValueError: for tensors on several devices.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    check("tensors", tensors, GRAD_DTYPES)
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    sums = _sum_of_squares(backend_for(backend, tensors[0].device), tensors)
    return norm_of(sums).float().to(sums.device)


def _sum_of_squares(backend: Backend, tensors: Sequence[Tensor]) -> Tensor:
    """fp32 sums of squares of dense or strided tensors, one per chunk."""
    strided = [t if t.layout is torch.strided else t.to_dense() for t in tensors]
    dense = [t if t.is_contiguous() or is_dense(t) else t.contiguous() for t in strided]
    cells, end = [], 0
    for tensor in dense:
        cells.append(end)
        end += count_chunks(tensor.numel())
    sums = torch.zeros(end, dtype=torch.float32, device=tensors[0].device)
    backend.sum_of_squares(SumOfSquares(dense, sums, cells))
    return sums
