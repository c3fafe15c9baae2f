"""Stochastic rounding of fp32 to bf16: up or down at random, right on average.

    bits(bf16) = (bits(fp32) + r) >> 16          r uniform in [0, 2**16)

rounds up with the probability of the part that is cut off, so that the mean of many roundings is
the value and updates smaller than a bf16 step are not lost. r is a hash of seed, tensor, update and
element and nothing else: the same run draws the same bits on every backend, after a resume too, and
no generator is kept.

The hash is a finalizer of C. Wellons's family (lowbias32), applied to key + element * 2**32/phi as
SplitMix (Steele, Lea and Flood 2014) does; keys are chained through the same hash.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.layout import CHUNK, GOLDEN, MIX_FIRST, MIX_SECOND

MASK = 0xFFFFFFFF


def mix_bits(x: int) -> int:
    """A bijection of 32-bit numbers in which every input bit moves every output bit."""
    x ^= x >> 16
    x = (x * MIX_FIRST) & MASK
    x ^= x >> 15
    x = (x * MIX_SECOND) & MASK
    return x ^ (x >> 16)


def tensor_key(seed: int, tensor: int) -> int:
    """32 bits of a tensor's own, from a 64-bit seed."""
    key = mix_bits(mix_bits(seed & MASK) ^ ((seed >> 32) & MASK))
    return mix_bits((key + tensor * GOLDEN) & MASK)


def chunk_key(key: int, step: int, chunk: int) -> int:
    """32 bits of a chunk's own, in update `step`."""
    return mix_bits((mix_bits(key ^ (step & MASK)) + chunk) & MASK)


def random_bits(key: int, step: int, start: int, n: int) -> Tensor:
    """r for `n` elements from `start`, int64 in [0, 2**16)."""
    index = torch.arange(start, start + n, dtype=torch.int64, device="cpu")
    first, last = start // CHUNK, (start + n - 1) // CHUNK
    chunks = [chunk_key(key, step, c) for c in range(first, last + 1)]
    keys = torch.tensor(chunks, dtype=torch.int64, device="cpu")
    x = (keys[index // CHUNK - first] + (index % CHUNK) * GOLDEN) & MASK
    x ^= x >> 16
    x = (x * MIX_FIRST) & MASK
    x ^= x >> 15
    x = (x * MIX_SECOND) & MASK
    return (x ^ (x >> 16)) >> 16


def round_stochastic(value: Tensor, random: Tensor) -> Tensor:
    """bf16 of fp32 `value`, up or down by `random` (see `random_bits`). NaN stays NaN."""
    bits = (value.view(torch.int32).to(torch.int64) & MASK) + random.view(value.shape)
    rounded = ((bits >> 16) & 0xFFFF).to(torch.int16).view(torch.bfloat16)
    return torch.where(value.isnan(), torch.full_like(rounded, torch.nan), rounded)
