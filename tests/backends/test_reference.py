"""What all else is held against is held against torch: the reference, and the rules' text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum.backends import reference
from fusedaccum.rules import registry
from fusedaccum.rules.as_torch import as_torch
from fusedaccum.rules.rule import sign
from tests import tolerances
from tests.cases import CASES, Case, case_id, tensor

UPDATES = 10
# Some roundings of 2**-53 an update, of numbers around 1 (3e-15 is the most that was seen); a wrong
# rule is off by a share of the learning rate.
ALLOWED = 1e-13


@pytest.fixture
def _float64() -> Iterator[None]:
    """torch.optim keeps numbers of its own in the default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def check_rule(case: Case, as_text: Any = as_torch) -> None:
    """Some updates of one tensor by torch.optim and by the rule's text, parameters and states."""
    param = tensor(257, torch.float64)
    theirs = torch.nn.Parameter(param.clone())
    optimizer = case.make([theirs], lr=0.25)
    (group,) = optimizer.param_groups
    rule = registry.select(optimizer, group)
    assert rule is not None and rule.name == case.rule
    text = as_text(rule.family.kernels, torch.float64)
    states: tuple[Tensor, ...]
    states = tuple(torch.full_like(param, rule.start(state, group)) for state in rule.states)
    memory = tuple(float(start(group)) for _, start in rule.family.memory)
    for update in range(1, UPDATES + 1):
        grad = tensor(257, torch.float64, seed=update)
        theirs.grad = grad.clone()
        optimizer.step()
        hyper = rule.family.hyper(group)
        assert len(hyper) == rule.family.n_hyper
        scalars, memory = getattr(text, f"{rule.family.name}_scalars")(hyper, update, memory)
        param, states = getattr(text, case.rule)(param, sign(group) * grad, states, scalars)
        torch.testing.assert_close(theirs.detach(), param, rtol=ALLOWED, atol=ALLOWED)
    for state, new in zip(rule.states, states, strict=True):
        kept = optimizer.state[theirs][state]
        torch.testing.assert_close(kept, new, rtol=ALLOWED, atol=ALLOWED)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_rule_is_torchs(case: Case) -> None:
    check_rule(case)


@pytest.mark.usefixtures("_float64")
def test_a_rule_whose_text_is_wrong_is_found() -> None:
    (case,) = (case for case in CASES if case.id == "sgd")

    def wrong(*args: Any) -> Any:
        text = dict(vars(as_torch(*args)))
        sgd = text["sgd"]
        text["sgd"] = lambda param, grad, *rest: sgd(param, grad * (1 + 1e-9), *rest)
        return SimpleNamespace(**text)

    with pytest.raises(AssertionError, match="not close"):
        check_rule(case, wrong)


def test_another_rule_differs() -> None:
    """The negative control of the test above."""
    param, grad = torch.randn(2, 257, dtype=torch.float64).unbind()
    states = (torch.zeros_like(param), torch.zeros_like(param))
    text = as_torch("fusedaccum.kernels.rules", torch.float64)
    results = []
    for is_decoupled in (0.0, 1.0):
        scalars, _ = text.adam_scalars((1e-2, 0.9, 0.999, 1e-8, 0.1, is_decoupled), 1.0, ())
        results.append(text.adam(param, grad, states, scalars)[0])
    assert not torch.allclose(*results, rtol=1e-6)


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
def test_clip_coefficient_is_torchs(max_norm: float | None) -> None:
    grads = [torch.randn(n, dtype=torch.float64) for n in (3, 1000)]
    norm = float(reference.global_norm(grads))
    coef = reference.clip_coefficient(norm, max_norm)
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(params, max_norm)
    for param, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(param.grad, grad * coef, rtol=1e-12, atol=0)


def test_masters_round_trip() -> None:
    """Every finite fp32 and inf comes back; the high half is the nearest bf16."""
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int64).to(torch.int32)
    edges = torch.tensor(
        [0, -(2**31), 1, 0x7FFF, 0x8000, 0x8001, 0x7F7FFFFF, 0x7F800000, -0x00800000, 0x3F808000],
        dtype=torch.int32,
    )
    master = torch.cat([bits, edges]).view(torch.float32)
    master = master[~master.isnan()]
    high, remainder = reference.split_master(master)
    assert tolerances.equal_bits(reference.join_master(high, remainder), master)
    nearest = master.to(torch.bfloat16)
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert tolerances.equal_bits(high[~tie], nearest[~tie])
    assert (high[tie].double().abs() >= master[tie].double().abs()).all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x00400000])
def test_nan_masters_show_as_nan(bits: int) -> None:
    """NVIDIA's NaN, 0x7FFFFFFF, would round up to -0.0 if it were treated as a number."""
    master = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    high, remainder = reference.split_master(master)
    assert math.isnan(high.item())
    assert math.isnan(reference.join_master(high, remainder).item())
