"""Gradients that somebody takes away or zeroes, and parameters that have none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests.loops import give, one, sgd


def test_a_gradient_set_to_none_cancels_the_parameter() -> None:
    """As DINO cancels its last layer."""
    p, q = one(), one()
    opt = sgd(p, q, n=1)
    ((p + q) * 2.0).sum().backward()
    p.grad = None
    opt.step()
    assert p.tolist() == [1.0] * 3 and q.tolist() == [-1.0] * 3


def test_a_gradient_set_to_none_takes_the_window_along() -> None:
    p, q = one(), one()
    opt = sgd(p, q, n=2)
    for value in (2.0, 4.0):
        ((p + q) * value).sum().backward()
        if value == 4.0:
            p.grad = None
        opt.step()
        opt.zero_grad()
    assert p.tolist() == [1.0] * 3 and q.tolist() == [-2.0] * 3


@pytest.mark.parametrize("between", [False, True])
def test_the_models_zero_grad_before_step_discards_the_window(between: bool) -> None:
    model = torch.nn.Linear(6, 2)
    before, x = model.weight.detach().clone(), torch.randn(4, 6)
    opt = sgd(*model.parameters(), n=2)
    model(x).sum().backward()
    opt.step()
    model(x).sum().backward()
    model.zero_grad()
    with pytest.warns(RuntimeWarning, match="discards the whole window: 1 closed"):
        if between:
            model(x).sum().backward()
        opt.step()
    assert opt.micro_batches == 1 and torch.equal(model.weight, before)


def test_the_models_zero_grad_after_step_keeps_the_window() -> None:
    p, q = one(), one()
    model = torch.nn.ParameterList([p, q])
    opt = sgd(p, q, n=2)
    for value in (2.0, 4.0):
        give(torch.cat([p, q]) if value == 2.0 else p, value)
        opt.step()
        if value == 2.0:
            model.zero_grad()
    assert p.tolist() == [-2.0] * 3 and q.tolist() == [0.0] * 3
    # What was used is shown, also of one that the second micro-batch brought nothing for.
    assert p.grad is not None and p.grad.tolist() == [3.0] * 3
    assert q.grad is not None and q.grad.tolist() == [1.0] * 3


@pytest.mark.parametrize("goes_on", ["backward", "step", "flush"])
def test_the_models_zero_grad_in_place_inside_a_window_is_refused(goes_on: str) -> None:
    p = one()
    model = torch.nn.ParameterList([p])
    opt = sgd(p, n=3)
    give(p, 2.0)
    opt.step()
    model.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match=r"zeroed in place.*Call zero_grad\(\)"):
        give(p, 4.0) if goes_on == "backward" else getattr(opt, goes_on)()
    with pytest.raises(RuntimeError, match="zeroed in place"):
        opt.step()
    with pytest.warns(RuntimeWarning, match="discards the whole window"):
        opt.zero_grad()
    for _ in range(3):
        give(p, 2.0)
        opt.step()
    assert p.tolist() == [-1.0] * 3


def test_accumulators_scaled_inside_a_window_are_not_taken_for_zeroed() -> None:
    p, q = one(), one()
    opt = sgd(p, q, n=2)
    ((p * 2.0) + (q * 0.0)).sum().backward()
    opt.step()
    torch.nn.utils.clip_grad_norm_([p, q], 0.5)
    shown = p.grad.clone()  # type: ignore[union-attr]
    ((p * 2.0) + (q * 0.0)).sum().backward()
    opt.step()
    assert torch.equal(p.detach(), 1.0 - (shown + 1.0))


def test_a_loops_weighted_window_starts_afresh_when_its_gradients_are_zeroed() -> None:
    p = one()
    model = torch.nn.ParameterList([p])
    opt = sgd(p)
    for weight, value in ((1.0, 5.0), (2.0, 3.0), (1.0, 6.0)):
        if weight == 2.0:
            model.zero_grad(set_to_none=False)
        with opt.micro_batch(weight=weight):
            give(p, value)
    opt.step()
    assert p.tolist() == [1.0 - 4.0] * 3


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adafactor])
def test_zeros_shown_by_zero_grad_are_no_micro_batch(make: Callable[..., Any]) -> None:
    p = one()
    opt = FusedAccumOptimizer(make([p], lr=1.0, weight_decay=0.5), 2)
    for _ in range(2):
        give(p, 1.0)
        opt.step()
    before = p.detach().clone()
    opt.zero_grad(set_to_none=False)
    assert p.grad is not None and not p.grad.any()
    opt.flush()
    assert torch.equal(p, before) and not opt.window_closed


# --- what native steps must not touch ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_native_step_leaves_parameters_without_a_gradient_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(torch.randn(4, 3, dtype=dtype)) for _ in range(2))
    opt = FusedAccumOptimizer(torch.optim.Adafactor([p, q], lr=0.1), 2)
    for _ in range(2):
        ((p + q) * 2.0).sum().backward()
        opt.step()
    before, states = q.detach().clone(), opt.state[q]["step"].clone()
    for _ in range(2):
        (p * 2.0).sum().backward()
        opt.step()
    assert torch.equal(q, before) and torch.equal(opt.state[q]["step"], states)
    before = p.detach().clone()
    with pytest.warns(RuntimeWarning, match="no gradient arrived"):
        for _ in range(2):
            opt.step()
    assert torch.equal(p, before) and opt.window_closed


@pytest.mark.parametrize("when", ["after backward", "after step"])
def test_a_conversion_that_leaves_the_parameters_as_they_are(when: str) -> None:
    """`model.half()` of an fp16 model converts `p.grad` alone, which shows the accumulator."""
    p = one(1.0, torch.float16)
    opt = sgd(p, n=2)
    for value in (1 / 3, 1.0):
        give(p, value)
        if when == "after backward":
            torch.nn.ParameterList([p]).half()
        opt.step()
        if when == "after step":
            torch.nn.ParameterList([p]).half()
    expected = torch.tensor(1.0) - (torch.tensor(1 / 3).half().float() + 1.0) / 2
    assert opt.state_dict()["state"][0]["master_param"].tolist() == [float(expected)] * 3


def test_a_parameter_frozen_at_a_load_is_accumulated_when_it_is_not_any_more() -> None:
    p = one()
    opt = sgd(p, n=1)
    give(p, 2.0)
    saved = opt.state_dict()
    fresh = one().requires_grad_(False)
    again = sgd(fresh, n=1)
    again.load_state_dict(saved)
    again.step()
    assert fresh.tolist() == [-1.0] * 3
    fresh.requires_grad_(True)
    give(fresh, 3.0)
    assert fresh.grad is not None and fresh.grad.tolist() == [3.0] * 3
    again.step()
    assert fresh.tolist() == [-4.0] * 3


@pytest.mark.parametrize("model", [True, False])
def test_an_assigned_gradient_that_is_removed_again_takes_the_window_along(model: bool) -> None:
    """The sum that it was added to is not that of the closed micro-batches any more."""
    p, q = one(), one()
    opt = sgd(p, q, n=3)
    ((p + q) * 2.0).sum().backward()
    opt.step()
    p.grad = torch.ones(3)
    opt.clip_grad_norm_(1e-3)  # takes it over
    for each in (p, q) if model else (p,):
        each.grad = None
    with pytest.warns(RuntimeWarning, match="discards the whole window: 1 closed"):
        ((p + q) * 3.0).sum().backward()
    opt.flush()
    assert p.tolist() == q.tolist() == [-2.0] * 3


@pytest.mark.parametrize("zeroes", ["zero_grad", "zero_grad(False)", "load"])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("n", [None, 2])
def test_data_of_a_gradient_that_is_assigned(n: int | None, at: int, zeroes: str) -> None:
    """p.grad showed it, and the update used the accumulator of before."""
    p = one()
    opt = sgd(p, n=n)
    saved = copy.deepcopy(opt.state_dict())

    def window(changes: bool) -> None:
        for i in range(2):
            give(p, 2.0 if n else 1.0)
            if changes and i == at:
                assert p.grad is not None
                p.grad.data = p.grad.data * 3.0
            if n or i == 1:
                opt.step()

    with pytest.raises(RuntimeError, match=r"p\.grad\.data .* was assigned.*Call zero_grad\(\)"):
        window(changes=True)
    assert p.tolist() == [1.0] * 3
    if zeroes == "load":
        opt.load_state_dict(saved)
    else:
        opt.zero_grad(set_to_none=zeroes == "zero_grad")
    window(changes=False)
    assert p.tolist() == [-1.0] * 3
