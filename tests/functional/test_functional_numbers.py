"""The numbers that the updates take: as many as there are, in every form that torch takes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedaccum.functional as F

BACKENDS = ["torch", "triton"]


def adamw(backend: str, **options: Any) -> Tensor:
    param, states = torch.ones(3), [[torch.zeros(3)] for _ in range(2)]
    grad = torch.tensor([1.0, -2.0, 3.0])
    F.adamw_([param], [grad], *states, torch.zeros(1), backend=backend, **{"lr": 0.1, **options})
    return param


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_in_every_form(backend: str) -> None:
    """A tensor of one element may have any shape; the kernels' table took one of none only."""
    expected = adamw(backend, grad_scale=0.5)
    for shape in ((), (1,), (1, 1)):
        for dtype in (torch.float32, torch.float64):
            lr = torch.full(shape, 0.1, dtype=dtype)
            found = adamw(backend, lr=lr, grad_scale=torch.full(shape, 0.5))
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    numbers = {"lr": np.float64(0.1), "eps": np.float32(1e-8), "betas": np.array([0.9, 0.999])}
    assert torch.equal(adamw(backend, grad_scale=np.float16(0.5), **numbers), expected)
    assert not torch.equal(adamw(backend, lr=0.2), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": None}, TypeError, "must be numbers, .* got None"),  # was a NaN to the kernels
        ({"eps": None}, TypeError, "got None"),
        ({"lr": torch.ones(2)}, TypeError, "tensors of one element; got tensor"),
        ({"grad_scale": torch.ones(2)}, TypeError, "one element"),
        ({"weight_decay": 1j}, TypeError, "got 1j"),
        ({"lr": 10**400}, TypeError, "must be numbers"),
        ({"betas": (0.9, 0.99, 0.999)}, ValueError, "pairs of numbers; got 7 .* there are 6"),
        ({"betas": (0.9,)}, ValueError, "got 5"),
    ],
)
def test_what_is_no_number(
    backend: str, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        adamw(backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_beyond_what_fp32_holds(backend: str) -> None:
    acc = torch.zeros(2)
    F.accumulate_([acc], [torch.tensor([1.0, -1.0])], 1e300, backend=backend)
    assert acc.tolist() == [math.inf, -math.inf]
