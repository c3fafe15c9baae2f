"""The norm, and everything a step needs to know that is not a tensor.

`sum_of_squares_kernel` leaves one partial sum per chunk for tensors whose sum is not already there
(the last accumulation of a window leaves it for free).

`finalize_kernel` is one program that turns partial sums into the update's scalars, all on the
device so that nothing waits:

    norm  = correction * sqrt(sum partials)                              (in float64)
    skip  = SKIP_NONFINITE and norm is not finite
    coef  = correction * min(1, max_norm / (norm + 1e-6))                (torch's clip_grad_norm_)
    step  = step + 1 for each tensor of the update, unless skip
    scalars[tensor], memory[tensor] = coef, step and SCALARS(hyper, step, memory[tensor])

The rule's scalars (bias corrections and the like) are computed in float64 and rounded once:
`1 - 0.999**t` in float32 is wrong by 6e-5 relative at t = 1.
"""

import triton
import triton.language as tl

from . import layout
from ._math import typed_pointer
from .layout import ScalarsRow, SquaresRow

DATA = tl.constexpr(SquaresRow.DATA)
NUMEL = tl.constexpr(SquaresRow.NUMEL)
PARTIAL = tl.constexpr(SquaresRow.PARTIAL)
COLUMNS = tl.constexpr(SquaresRow.COLUMNS)
COEF = tl.constexpr(ScalarsRow.COEF)
STEP = tl.constexpr(ScalarsRow.STEP)
OWN = tl.constexpr(ScalarsRow.OWN)
CLIP_EPS = tl.constexpr(layout.CLIP_EPS)


@triton.jit
def sum_of_squares_kernel(
    table_ptr,  # int64 [n_tensors, COLUMNS]
    chunks_ptr,  # int32 [n_chunks, 2]
    partials_ptr,  # fp32
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program sums the squares of one chunk."""
    pid = tl.program_id(0).to(tl.int64)
    row = tl.load(chunks_ptr + 2 * pid).to(tl.int64)
    chunk = tl.load(chunks_ptr + 2 * pid + 1).to(tl.int64)
    table_ptr += row * COLUMNS
    n_elements = tl.load(table_ptr + NUMEL)
    data_ptr = typed_pointer(tl.load(table_ptr + DATA), DTYPE, VECTOR)
    start = tl.multiple_of(chunk * CHUNK, CHUNK)
    data_ptr += start  # from here on int32: offsets within a chunk

    total = tl.zeros([BLOCK], tl.float32)
    if start + CHUNK <= n_elements:
        for block in range(0, CHUNK, BLOCK):
            data = tl.load(data_ptr + block + tl.arange(0, BLOCK)).to(tl.float32)
            total += data * data
    else:
        rest = (n_elements - start).to(tl.int32)
        for block in range(0, rest, BLOCK):
            offsets = block + tl.arange(0, BLOCK)
            data = tl.load(data_ptr + offsets, mask=offsets < rest, other=0.0).to(tl.float32)
            total += data * data
    tl.store(partials_ptr + tl.load(table_ptr + PARTIAL) + chunk, tl.sum(total, 0))


# Counts change with the model: no variant of its own for a multiple of 16, or for 1.
@triton.jit(do_not_specialize=["n_partials", "n_tensors"])
def finalize_kernel(
    partials_ptr,  # fp32 [n_partials], read only with HAS_NORM
    tensors_ptr,  # int32 [n_tensors, 2]: row in steps and scalars, row in hyper
    hyper_ptr,  # fp64 [1 + n_groups, N_HYPER + 1]: (correction, max_norm), then a row per group:
    #             the sign of the gradient and the rule's own hyper-parameters
    steps_ptr,  # fp32, updates so far, advanced here
    scalars_ptr,  # fp32 [n_steps, OWN + N_SCALARS], written here
    memory_ptr,  # fp32 [n_steps, N_MEMORY], what the rule keeps per tensor; updated here
    norm_ptr,  # fp32 [1], written with HAS_NORM
    skip_ptr,  # int32 [1], written here
    skipped_ptr,  # int64 [1], skipped updates so far, advanced here
    n_partials,
    n_tensors,
    SCALARS: tl.constexpr,
    N_HYPER: tl.constexpr,
    N_SCALARS: tl.constexpr,
    N_MEMORY: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program in all."""
    correction = tl.load(hyper_ptr)
    coef = correction
    skip = 0
    if HAS_NORM:
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, n_partials, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            total += tl.load(partials_ptr + offsets, mask=offsets < n_partials, other=0.0)
        norm = correction * tl.sqrt(tl.sum(total, 0))
        if HAS_CLIP:
            max_norm = tl.load(hyper_ptr + 1)
            coef = correction * tl.minimum(1.0, max_norm / (norm + CLIP_EPS))
        # A NaN norm must reach the weights when skipping is off, as it does in torch.
        coef = tl.where(norm == norm, coef, norm)
        if SKIP_NONFINITE:
            # x - x is 0 for a finite x and NaN for the others.
            skip = tl.where(norm - norm == 0.0, 0, 1)
        tl.store(norm_ptr, norm.to(tl.float32))
    tl.store(skip_ptr, skip)
    tl.store(skipped_ptr, tl.load(skipped_ptr) + skip)

    for start in range(0, n_tensors, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < n_tensors
        tensor = tl.load(tensors_ptr + 2 * offsets, mask=mask, other=0).to(tl.int64)
        group = tl.load(tensors_ptr + 2 * offsets + 1, mask=mask, other=0).to(tl.int64)
        step = tl.load(steps_ptr + tensor, mask=mask, other=0.0) + (1 - skip)
        tl.store(steps_ptr + tensor, step, mask=mask)

        hyper_row = hyper_ptr + (1 + group) * (N_HYPER + 1)
        hyper = ()
        for i in tl.static_range(N_HYPER):
            # Any `other` that has a logarithm: lanes beyond the end are computed and dropped.
            hyper = hyper + (tl.load(hyper_row + 1 + i, mask=mask, other=0.5),)
        memory_row = memory_ptr + tensor * N_MEMORY
        memory = ()
        for i in tl.static_range(N_MEMORY):
            memory = memory + (tl.load(memory_row + i, mask=mask, other=0.5).to(tl.float64),)
        # A skipped first window leaves step 0, where a bias correction would divide by zero.
        scalars, memory = SCALARS(hyper, tl.maximum(step, 1.0).to(tl.float64), memory)
        scalar_row = scalars_ptr + tensor * (OWN + N_SCALARS)
        sign = tl.load(hyper_row, mask=mask, other=1.0)
        tl.store(scalar_row + COEF, (coef * sign).to(tl.float32), mask=mask)
        tl.store(scalar_row + STEP, step, mask=mask)
        for i in tl.static_range(N_SCALARS):
            tl.store(scalar_row + OWN + i, scalars[i].to(tl.float32), mask=mask)
        kept = offsets < n_tensors * (1 - skip)
        for i in tl.static_range(N_MEMORY):
            tl.store(memory_row + i, memory[i].to(tl.float32), mask=kept)
