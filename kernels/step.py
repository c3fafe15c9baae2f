"""The optimizer step: one launch for the whole model, with the update rule passed in.

    grad          = scalars[tensor][0] * acc              (normalisation, clipping and sign)
    param, states = RULE(param, grad, states, scalars[tensor][2:])

computed in fp32. How the parameter is kept is MASTER:

    "none"   the parameter is loaded and stored in its own dtype
    "split"  a bf16 parameter and an int16 remainder are together the exact fp32 master; one
             that somebody wrote from outside keeps its remainder, at most half a bf16 step
    "fp32"   an fp32 master beside the parameter; where the parameter is no longer the rounded
             master, somebody wrote it from outside, and the written element wins
    "stochastic"
             a bf16 parameter without a master, rounded up or down at random

Parameters, masters and states are updated in place; accumulators are only read. When the skip flag
is set nothing is written. No @autotune: its trial launches would apply the update repeatedly.
"""

import triton
import triton.language as tl

from ._math import join_master, mix_bits, round_stochastic, split_master, typed_pointer
from .layout import ScalarsRow, StepRow

PARAM = tl.constexpr(StepRow.PARAM)
MASTER_COLUMN = tl.constexpr(StepRow.MASTER)
ACC = tl.constexpr(StepRow.ACC)
NUMEL = tl.constexpr(StepRow.NUMEL)
TENSOR = tl.constexpr(StepRow.TENSOR)
KEY = tl.constexpr(StepRow.KEY)
STATES = tl.constexpr(StepRow.STATES)
COEF = tl.constexpr(ScalarsRow.COEF)
STEP = tl.constexpr(ScalarsRow.STEP)
OWN = tl.constexpr(ScalarsRow.OWN)


@triton.jit
def _load(ptr, offsets, mask):
    """Load a block; `other` is an error without a mask, so the two forms are spelled out."""
    if mask is None:
        value = tl.load(ptr + offsets)
    else:
        value = tl.load(ptr + offsets, mask=mask, other=0)
    return value


@triton.jit
def _step_block(
    param_ptr,
    master_ptr,
    acc_ptr,
    state_ptrs,
    coef,
    scalars,
    key,
    offsets,
    mask,
    RULE: tl.constexpr,
    MASTER: tl.constexpr,
    N_STATES: tl.constexpr,
):
    """Update one block; a mask of None means a full block."""
    stored = _load(param_ptr, offsets, mask)
    if MASTER == "split":
        param = join_master(stored, _load(master_ptr, offsets, mask))
    elif MASTER == "fp32":
        master = _load(master_ptr, offsets, mask)
        param = tl.where(master.to(stored.dtype) == stored, master, stored.to(tl.float32))
    else:
        param = stored.to(tl.float32)
    grad = _load(acc_ptr, offsets, mask) * coef
    states = ()
    for i in tl.static_range(N_STATES):
        states = states + (_load(state_ptrs[i], offsets, mask),)

    param, states = RULE(param, grad, states, scalars)

    if MASTER == "split":
        high, remainder = split_master(param)
        tl.store(param_ptr + offsets, high, mask=mask)
        tl.store(master_ptr + offsets, remainder, mask=mask)
    elif MASTER == "stochastic":
        tl.store(param_ptr + offsets, round_stochastic(param, key, offsets), mask=mask)
    else:
        tl.store(param_ptr + offsets, param.to(stored.dtype), mask=mask)
        if MASTER == "fp32":
            tl.store(master_ptr + offsets, param, mask=mask)
    for i in tl.static_range(N_STATES):
        tl.store(state_ptrs[i] + offsets, states[i], mask=mask)


@triton.jit
def step_kernel(
    table_ptr,  # int64 [n_tensors, STATES + N_STATES]
    chunks_ptr,  # int32 [n_chunks, 2]: row of the table, chunk within the tensor
    scalars_ptr,  # fp32 [*, OWN + N_SCALARS], one row a tensor
    skip_ptr,  # int32 [1]
    RULE: tl.constexpr,
    N_STATES: tl.constexpr,
    N_SCALARS: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    MASTER: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program updates one chunk of one tensor."""
    if tl.load(skip_ptr) != 0:
        return
    pid = tl.program_id(0).to(tl.int64)
    row = tl.load(chunks_ptr + 2 * pid).to(tl.int64)
    chunk = tl.load(chunks_ptr + 2 * pid + 1).to(tl.int64)
    table_ptr += row * (STATES + N_STATES)
    n_elements = tl.load(table_ptr + NUMEL)
    MASTER_DTYPE: tl.constexpr = tl.int16 if MASTER == "split" else tl.float32
    start = tl.multiple_of(chunk * CHUNK, CHUNK)
    # Pointers to the chunk, so that offsets in it are int32, which cost half the registers.
    param_ptr = typed_pointer(tl.load(table_ptr + PARAM), PARAM_DTYPE, VECTOR) + start
    master_ptr = typed_pointer(tl.load(table_ptr + MASTER_COLUMN), MASTER_DTYPE, VECTOR) + start
    acc_ptr = typed_pointer(tl.load(table_ptr + ACC), tl.float32, VECTOR) + start
    state_ptrs = ()
    for i in tl.static_range(N_STATES):
        address = tl.load(table_ptr + STATES + i)
        state_ptrs = state_ptrs + (typed_pointer(address, tl.float32, VECTOR) + start,)

    scalars_ptr += tl.load(table_ptr + TENSOR) * (OWN + N_SCALARS)
    coef = tl.load(scalars_ptr + COEF)
    scalars = ()
    for i in tl.static_range(N_SCALARS):
        scalars = scalars + (tl.load(scalars_ptr + OWN + i),)
    key = 0
    if MASTER == "stochastic":
        step = tl.load(scalars_ptr + STEP).to(tl.uint32)
        own_key = tl.load(table_ptr + KEY).to(tl.uint32)
        key = mix_bits(mix_bits(own_key ^ step) + chunk.to(tl.uint32))

    if start + CHUNK <= n_elements:
        # A full chunk is its own branch: a mask, even an all-true one, costs the vector access.
        for block in range(0, CHUNK, BLOCK):
            offsets = block + tl.arange(0, BLOCK)
            _step_block(
                param_ptr, master_ptr, acc_ptr, state_ptrs, coef, scalars, key, offsets, None,
                RULE, MASTER, N_STATES,
            )  # fmt: skip
    else:
        rest = (n_elements - start).to(tl.int32)
        for block in range(0, rest, BLOCK):
            offsets = block + tl.arange(0, BLOCK)
            _step_block(
                param_ptr, master_ptr, acc_ptr, state_ptrs, coef, scalars, key, offsets,
                offsets < rest, RULE, MASTER, N_STATES,
            )  # fmt: skip
