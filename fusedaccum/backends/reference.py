"""What the operations mean, in plain torch: slow, obvious, any floating dtype.

The kernels, the compiled CPU loops and the fallback all follow these functions in the same order of
operations. Run in float64 the tests hold them against torch; run in float32 they are what the torch
backend falls back to. What a rule means is its text, run as torch: `rules/as_torch.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..kernels.layout import CLIP_EPS, ROUND_HALF


def accumulate(acc: Tensor, grad: Tensor, scale: float, first: bool) -> Tensor:
    """The accumulator after one more gradient: `(0 if first else acc) + scale * grad`."""
    update = grad.to(acc.dtype) * scale
    return update if first else acc + update


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of all elements of all tensors together, in float64."""
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for tensor in tensors:
        total += tensor.cpu().double().square().sum()
    return total.sqrt()


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """What torch.nn.utils.clip_grad_norm_ multiplies gradients of that norm with."""
    if math.isnan(norm):
        return norm
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + CLIP_EPS))


def join_master(high: Tensor, remainder: Tensor) -> Tensor:
    """fp32 master from its bf16 high half and int16 remainder.

    A remainder that would make a number a NaN came with another parameter (`kernels/_math.py` says
    which do); the parameter then counts alone.
    """
    alone = high.float()
    master = (alone.view(torch.int32) + remainder.int()).view(torch.float32)
    return torch.where(master.isnan(), alone, master)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 high half (nearest, ties away from zero) and int16 remainder of an fp32 master."""
    master = torch.where(master.isnan(), torch.full_like(master, math.nan), master)
    bits = master.view(torch.int32)
    high = (bits + ROUND_HALF) >> 16
    remainder = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def precise(param: Tensor, master: Tensor) -> Tensor:
    """fp32 value of a parameter as it is now and its master, an int16 remainder or fp32.

    An element of an fp32 master counts as long as the parameter is its rounded value. Elsewhere
    somebody wrote the parameter, and the written element counts.
    """
    if master.dtype == torch.int16:
        return join_master(param, master)
    return torch.where(master.to(param.dtype) == param, master, param.float())
