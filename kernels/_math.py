"""Small pieces that several kernels share: split master weights, rounding, vector hints.

A split master keeps one fp32 number in two places. The visible bf16 parameter is the high half,
rounded to nearest (ties away from zero); an int16 remainder is the signed distance from it:

    bits(master) = (bits(high) << 16) + remainder          exactly, for every finite master and inf

so that high is a parameter that a model can use and nothing of the fp32 value is lost.

Others may write the parameter, so any high half can meet any remainder. The sum of the two is then
a number that rounds to high, within half a bf16 step of it, with two exceptions: a negative
remainder beside a high half of +-0, and a positive one beside +-inf, would make the sum a NaN. No
master has such a pair, so the high half alone counts there. A negative remainder beside inf is
legitimate: the two are a finite master of more than 3.39e38, which rounds to inf.
"""

import triton
import triton.language as tl

from . import layout

VECTOR_BYTES = tl.constexpr(layout.VECTOR_BYTES)
ROUND_HALF = tl.constexpr(layout.ROUND_HALF)
QUIET_NAN_HIGH = tl.constexpr(layout.QUIET_NAN_HIGH)
MIX_FIRST = tl.constexpr(layout.MIX_FIRST)
MIX_SECOND = tl.constexpr(layout.MIX_SECOND)
GOLDEN = tl.constexpr(layout.GOLDEN)


@triton.jit
def join_master(high, remainder):
    """fp32 master from a bf16 high half and its int16 remainder, which never makes it a NaN."""
    bits = (high.to(tl.int16, bitcast=True).to(tl.int32) << 16) + remainder.to(tl.int32)
    master = bits.to(tl.float32, bitcast=True)
    return tl.where(master == master, master, high.to(tl.float32))


@triton.jit
def split_master(master):
    """bf16 high half and int16 remainder of an fp32 master."""
    bits = master.to(tl.int32, bitcast=True)
    high = (bits + ROUND_HALF) >> 16
    remainder = bits - (high << 16)
    is_nan = master != master
    high = tl.where(is_nan, QUIET_NAN_HIGH, high)
    remainder = tl.where(is_nan, 0, remainder)
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), remainder.to(tl.int16)


@triton.jit
def mix_bits(x):
    """Hash of 32 bits; `fusedaccum/backends/rounding.py` says where it comes from."""
    x = x ^ (x >> 16)
    x = x * MIX_FIRST
    x = x ^ (x >> 15)
    x = x * MIX_SECOND
    return x ^ (x >> 16)


@triton.jit
def round_stochastic(value, key, offsets):
    """bf16 of fp32, up with the probability of what is cut off; `key` is the chunk's own."""
    random = mix_bits(key + offsets.to(tl.uint32) * GOLDEN) >> 16
    high = (value.to(tl.uint32, bitcast=True) + random) >> 16
    high = tl.where(value != value, QUIET_NAN_HIGH, high)
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def typed_pointer(address, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointer to DTYPE from an int64 address.

    A hint says that a thread may access VECTOR elements at once, or 128 bits where these are more;
    with 0 there is none. The address must be a multiple of 128 bits for it.
    """
    ptr = address.to(tl.pointer_type(DTYPE))
    if VECTOR > 0:
        width: tl.constexpr = VECTOR * DTYPE.primitive_bitwidth // 8
        ptr = tl.multiple_of(ptr, VECTOR_BYTES if width > VECTOR_BYTES else width)
    return ptr
