"""What all else is held against is held against torch: the reference, and the rules' text."""

from __future__ import annotations

import math

import pytest
import torch

from fusedaccum.backends import reference
from fusedaccum.doctor import rules
from fusedaccum.rules.as_torch import as_torch
from tests import tolerances
from tests.cases import CASES, Case, case_id


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_rule_is_torchs(case: Case) -> None:
    """Parameters and states, by the doctor's check with more options."""
    rules.check(case.rule, case.kind, dict(case.options)).run()


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
