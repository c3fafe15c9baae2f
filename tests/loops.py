"""The smallest training there is: a parameter, a gradient, and a rate of 1."""

from __future__ import annotations

from typing import Any

import torch

from fusedaccum import FusedAccumOptimizer


def one(value: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((3,), value, dtype=dtype))


def sgd(*params: torch.nn.Parameter, n: int | None = None, **options: Any) -> FusedAccumOptimizer:
    """lr 1: an update shows its gradient."""
    return FusedAccumOptimizer(torch.optim.SGD(params, lr=1.0), n, **options)


def give(param: torch.Tensor, value: float) -> None:
    (param.float() * value).sum().backward()
