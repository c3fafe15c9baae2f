"""Every tolerance of the tests, with its reason. u = 2**-24 is fp32's unit roundoff.

Accumulation. A window computes, in fp32,

    acc_1 = fl(s_1 g_1),   acc_i = fl(acc_{i-1} + fl(s_i g_i)),   mean = fl(c * acc_N)

with s_i = fl(w_i / W_ref) (one rounding; exact for a power of two) and c = fl(W_ref / sum w). Each
micro-gradient goes through at most: the rounding of s_i, of its product, of N - 1 sums, of c and of
the last product, so its share of the mean carries a factor (1 + d), |d| <= (N + 3) u (to first
order). With M = sum |w_i g_i| / sum w_i, the mean of magnitudes,

    |mean - exact| <= gamma(N + 4) * M,      gamma(k) = k u / (1 - k u)

which is Higham's bound for recursive summation (Accuracy and Stability, 2002, section 4.2). One u
is spare for the FMA-or-not freedom of GPUs. The bound is relative to M and not to the mean: terms
may cancel.

Steps. One update of a rule has fewer than 16 roundings on any path from gradient to parameter. The
parameter moves by less than its own magnitude plus the step, so an update differs from a float64
one by at most 16 u (|param| + |step| * amplification). Adam's first steps amplify: the step is
lr * m / (sqrt(v) + eps) whose relative error is at most the gradient's relative error times two.
"""

from __future__ import annotations

import torch
from torch import Tensor

U = 2.0**-24
# The smallest normal fp32: below it roundings are absolute, not relative.
TINY = 2.0**-126


def gamma(k: int) -> float:
    """Higham's k u / (1 - k u)."""
    return k * U / (1 - k * U)


def mean_bound(magnitudes: Tensor, n: int) -> Tensor:
    """Largest error of a window's mean gradient.

    Args:
        magnitudes: sum |w_i g_i| / sum w_i, float64.
        n: micro-batches.
    """
    # Underflow: each of the 2 n operations may lose up to half of the smallest subnormal.
    return gamma(n + 4) * magnitudes + 2 * n * 2.0**-149


# Norm: squares are summed pairwise in blocks of 8,192 and then in float64. A lane sums at most 512
# squares (8,192 elements over 16 lanes), a tree of at most 4,096 has depth 12, so each square is
# rounded at most 512 + 12 + 1 times; half of that is the norm's, and u for the last rounding.
NORM_RTOL = gamma(512 + 13) / 2 + U

# One fused step in fp32 against the reference in float64, relative to |param| + |step|.
STEP_ROUNDINGS = 16

# The same holds between two fp32 implementations of a rule whose operations round differently:
# ATen's vectorised sqrt is up to 1 ulp off (MKL's "high accuracy" mode), GPUs contract products and
# sums to FMA. The interpreter and the compiled loops do neither and are compared bit for bit.


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the bit; NaN equals NaN, -0 does not equal 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def update_bound(param: Tensor, moved: Tensor, n: int, updates: int) -> Tensor:
    """Largest error of fp32 (master) parameters after windows of micro-batches.

    For gradients and decay terms that do not cancel, the mean has a relative error of at most
    gamma(n + 4); rules then divide a first moment by the root of a second, which at most doubles
    it, and Adam's moments carry it on to every later update. Each update adds its own roundings.

    Args:
        param: the parameter, float64.
        moved: sum of the magnitudes of its updates, float64.
        n: micro-batches per window.
        updates: windows.
    """
    gradient = 2 * gamma(n + 4) * moved
    return gradient + STEP_ROUNDINGS * updates * U * (param.abs() + moved) + TINY
