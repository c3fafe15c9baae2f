"""Weights that are infinite, as the bias of what a model masks is, stay what torch leaves them.

Without weight decay zero times the weight must not join the gradient: zero times inf is NaN.
"""

from __future__ import annotations

import math

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests.cases import CASES, Case, WithoutCompiler, case_id, forget_compiled

WEIGHTS = [-math.inf, math.inf, 1.0, -0.0]
GRADS = [[0.0, 0.0, 1.0, -0.0], [0.5, -2.0, -3.0, 0.0], [0.0, -0.0, 1.0, 0.0]]


@pytest.mark.parametrize("backend", ["triton", "compiled", "aten"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_infinite_weights(
    case: Case, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN where torch has NaN (weight decay that joins the gradient), and nowhere else."""
    if backend == "aten":
        WithoutCompiler(monkeypatch)
    ours = torch.nn.Parameter(torch.tensor(WEIGHTS, dtype=dtype))
    plain = torch.nn.Parameter(torch.tensor(WEIGHTS))
    name = "triton" if backend == "triton" else "torch"
    opt, exact = FusedAccumOptimizer(case.make([ours]), 1, backend=name), case.make([plain])
    for grads in GRADS:
        ours.grad, plain.grad = torch.tensor(grads, dtype=dtype), torch.tensor(grads)
        opt.step()
        exact.step()
    forget_compiled()
    if not dict(case.options).get("weight_decay") or case.kind is torch.optim.AdamW:
        assert not plain.isnan().any()
    rtol = 1e-5 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(ours.float(), plain, rtol=rtol, atol=1e-6, equal_nan=True)
