"""A product of two matrices, added to an fp32 accumulator by the GEMM itself.

    acc = beta acc + alpha a b        a [m, k], b [k, n]: fp32, bf16 or fp16; acc [m, n]: fp32

The products of bf16 and fp16 numbers are exact in fp32, and their sum is never rounded to the
dtype of `a` and `b`. On a GPU cuBLAS reads and writes `acc` in its epilogue. Torch has no such GEMM
for a CPU, where `a` and `b` are converted first: slower, and to the same numbers.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

FP32 = torch.float32


@torch.no_grad()
def add_product(acc: Tensor, a: Tensor, b: Tensor, *, alpha: float, adds: bool) -> None:
    """`acc = alpha a b`, or with `adds` `acc += alpha a b`, in place.

    What `acc` held before is not read without `adds`, so it may hold NaN.
    """
    beta = 1.0 if adds else 0.0
    if a.dtype is FP32:
        acc.addmm_(a, b, beta=beta, alpha=alpha)
    elif acc.device.type == "cpu":
        acc.addmm_(a.float(), b.float(), beta=beta, alpha=alpha)
    elif not a.shape[1]:  # nothing to add
        if not adds:
            acc.zero_()
    else:
        # The same tensor object twice: another one of the same memory would cost a copy.
        torch.addmm(acc, a, b, out_dtype=FP32, beta=beta, alpha=alpha, out=acc)


@cache
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `add_product` cannot take operands of `dtype` on a device; None where it can.

    Tried once for each, with a few numbers: it depends on the device and on the build of torch.
    """
    if dtype is FP32 or device.type == "cpu":
        return None
    name = str(dtype).removeprefix("torch.")
    a = torch.ones(16, 32, dtype=dtype, device=device)
    acc = torch.full((16, 16), torch.nan, dtype=FP32, device=device)
    try:
        add_product(acc, a, a.t(), alpha=0.5, adds=False)
        add_product(acc, a, a.t(), alpha=0.25, adds=True)
        is_right = bool((acc == 24.0).all())
    except (RuntimeError, TypeError) as error:
        return f"torch cannot add a product of {name} to float32 on {device}: {error}"
    return None if is_right else f"torch adds a product of {name} to float32 wrongly on {device}"
