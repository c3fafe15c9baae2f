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
        ({"lr": None}, TypeError, "must be a number, .* got None"),  # was a NaN to the kernels
        ({"eps": None}, TypeError, "got None"),
        ({"lr": torch.ones(2)}, TypeError, "a tensor of one element; got tensor"),
        ({"grad_scale": torch.ones(2)}, TypeError, "one element"),
        ({"weight_decay": 1j}, TypeError, "got 1j"),
        ({"lr": 10**400}, TypeError, "must be a number"),
        ({"lr": "1e-3"}, TypeError, "got '1e-3'"),  # of a YAML file
        ({"grad_scale": True}, TypeError, "got True"),
        ({"betas": (0.9, 0.99, 0.999)}, ValueError, "betas must be a pair of numbers, got"),
        ({"betas": (0.9,)}, ValueError, "a pair of numbers"),
        ({"betas": 0.9}, ValueError, "a pair of numbers, got 0.9"),
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


def one(function: Any, n_states: int, **options: Any) -> list[float]:
    param, states = torch.ones(3), [[torch.zeros(3)] for _ in range(n_states)]
    function([param], [torch.ones(3)], *states, torch.zeros(1), **options)
    return param.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("function", "n_states", "options", "words"),
    [
        (F.adamw_, 2, {"betas": (1.0, 0.999)}, "adamw_: betas must be from 0 to below 1, as"),
        (F.adamw_, 2, {"betas": (0.9, torch.tensor(1.0))}, "betas"),  # ZeroDivisionError was raised
        (F.adamw_, 2, {"betas": (-0.1, 0.999)}, "betas"),  # was NaN
        (F.lion_, 1, {"betas": (0.9, math.nan)}, "betas"),
        (F.adam_, 2, {"eps": -1.0}, "eps must be from 0, as .* got -1.0"),
        (F.adam_, 2, {"lr": -1.0}, "lr"),
        (F.radam_, 2, {"lr": torch.tensor(-1.0)}, "lr"),
        (F.adamax_, 2, {"weight_decay": math.nan}, "weight_decay"),
        (F.adagrad_, 1, {"lr_decay": -1.0}, "lr_decay"),
        (F.rmsprop_, 1, {"alpha": -1.0}, "alpha"),
        (F.adadelta_, 2, {"rho": 2.0}, "rho must be from 0 to 1"),
        (F.sgd_, 1, {"momentum": -0.5}, "momentum"),
        (F.sgd_, 1, {"momentum": 0.0, "nesterov": True}, "nesterov=True needs a momentum"),
        (F.sgd_, 1, {"momentum": 0.5, "dampening": 0.5, "nesterov": True}, "no dampening"),
    ],
)
def test_numbers_that_torchs_class_refuses(
    function: Any, n_states: int, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        one(function, n_states, **{"lr": 0.1, **options})


def test_what_rprop_refuses() -> None:
    for etas in ((1.2, 0.5), (0.0, 1.2), (0.5, 1.0)):
        with pytest.raises(ValueError, match="etas must be one below 1, one above"):
            one(F.rprop_, 2, etas=etas)


def test_numbers_at_the_ends_of_what_is_allowed() -> None:
    ends = {"lr": 0, "betas": [0, 0], "eps": 0.0, "weight_decay": 0}
    assert one(F.adamw_, 2, **ends) == [1.0] * 3
    assert one(F.adadelta_, 2, lr=1.0, rho=1.0) != [1.0] * 3


@pytest.mark.parametrize("scale", ["2", None, True, [2.0], 1j, torch.ones(2)])
def test_a_scale_that_is_no_number(scale: Any) -> None:
    acc = torch.zeros(2)
    with pytest.raises(TypeError, match="scale must be a number, or a tensor of one element; got"):
        F.accumulate_([acc], [torch.ones(2)], scale)
    assert not acc.any()
