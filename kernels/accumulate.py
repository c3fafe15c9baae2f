"""Accumulate micro-batch gradients: one launch for any number of tensors.

    acc = (0 if IS_FIRST else acc) + scale * float32(grad)

With HAS_CONTROL two more numbers are read on the device: a factor on `scale` (a GradScaler's
1/scale), and 0 to start afresh, as IS_FIRST does (after a micro-batch that overflowed).

Gradients are loaded as bf16, fp16 or fp32 and computed in fp32; accumulators are fp32. The first
micro-batch of a window stores, so nobody ever zeroes an accumulator. With HAS_NORM each program
also leaves the sum of squares of what it wrote in its own cell of `partials` (a cell has one
writer: no atomics, the same bits every run), which is where the norm and the finite check come
from without another pass.

Accumulators and gradients never alias. Nothing else is written.
"""

import triton
import triton.language as tl

from ._math import typed_pointer
from .layout import AccumulateRow

GRAD = tl.constexpr(AccumulateRow.GRAD)
ACC = tl.constexpr(AccumulateRow.ACC)
NUMEL = tl.constexpr(AccumulateRow.NUMEL)
PARTIAL = tl.constexpr(AccumulateRow.PARTIAL)
COLUMNS = tl.constexpr(AccumulateRow.COLUMNS)


@triton.jit
def _accumulate_block(
    grad_ptr,
    acc_ptr,
    scale,
    keeps,
    offsets,
    mask,
    IS_FIRST: tl.constexpr,
    HAS_CONTROL: tl.constexpr,
):
    """Add one block and return what it wrote; a mask of None means a full block."""
    # `other` is an error without a mask, so the two forms are spelled out.
    if mask is None:
        grad = tl.load(grad_ptr + offsets)
    else:
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    acc = grad.to(tl.float32) * scale
    if not IS_FIRST:
        if mask is None:
            old = tl.load(acc_ptr + offsets)
        else:
            old = tl.load(acc_ptr + offsets, mask=mask, other=0.0)
        if HAS_CONTROL:
            old = tl.where(keeps, old, 0.0)  # not a product: what is left behind may be inf
        acc += old
    tl.store(acc_ptr + offsets, acc, mask=mask)
    return acc


@triton.jit
def accumulate_kernel(
    table_ptr,  # int64 [n_tensors, COLUMNS]
    chunks_ptr,  # int32 [n_chunks, 2]: row of the table, chunk within the tensor
    partials_ptr,  # fp32, read only with HAS_NORM
    control_ptr,  # fp32 [2], read only with HAS_CONTROL
    scale,
    GRAD_DTYPE: tl.constexpr,
    IS_FIRST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_CONTROL: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program adds one chunk of one tensor."""
    pid = tl.program_id(0).to(tl.int64)
    row = tl.load(chunks_ptr + 2 * pid).to(tl.int64)
    chunk = tl.load(chunks_ptr + 2 * pid + 1).to(tl.int64)
    table_ptr += row * COLUMNS
    n_elements = tl.load(table_ptr + NUMEL)
    grad_ptr = typed_pointer(tl.load(table_ptr + GRAD), GRAD_DTYPE, VECTOR)
    acc_ptr = typed_pointer(tl.load(table_ptr + ACC), tl.float32, VECTOR)
    start = tl.multiple_of(chunk * CHUNK, CHUNK)
    # From here on int32: offsets within a chunk, which in int64 cost twice the registers.
    grad_ptr += start
    acc_ptr += start

    keeps = True
    if HAS_CONTROL:
        scale *= tl.load(control_ptr)
        keeps = tl.load(control_ptr + 1) != 0.0

    total = tl.zeros([BLOCK], tl.float32)
    if start + CHUNK <= n_elements:
        # A full chunk is its own branch: a mask, even an all-true one, costs the vector access.
        for block in range(0, CHUNK, BLOCK):
            offsets = block + tl.arange(0, BLOCK)
            acc = _accumulate_block(
                grad_ptr, acc_ptr, scale, keeps, offsets, None, IS_FIRST, HAS_CONTROL
            )
            if HAS_NORM:
                total += acc * acc
    else:
        rest = (n_elements - start).to(tl.int32)
        for block in range(0, rest, BLOCK):
            offsets = block + tl.arange(0, BLOCK)
            mask = offsets < rest
            acc = _accumulate_block(
                grad_ptr, acc_ptr, scale, keeps, offsets, mask, IS_FIRST, HAS_CONTROL
            )
            if HAS_NORM:
                # Masked lanes hold scale * 0: only a scale that is not finite would show.
                total += acc * acc
    if HAS_NORM:
        tl.store(partials_ptr + tl.load(table_ptr + PARTIAL) + chunk, tl.sum(total, 0))
