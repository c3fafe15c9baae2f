"""Without the skip, a NaN or an overflow in one element does what torch's optimizer makes of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests.cases import CASES, Case, WithoutCompiler, case_id, forget_compiled

BACKENDS = ["triton", "compiled", "aten"]


def trained(case: Case, grads: list[list[float]], backend: str) -> list[torch.Tensor]:
    """Weights after windows of these gradients: the wrapper's and torch's."""
    ours, plain = (torch.nn.Parameter(torch.ones(len(grads[0]))) for _ in range(2))
    name = "triton" if backend == "triton" else "torch"
    opt = FusedAccumOptimizer(case.make([ours]), 1, backend=name, skip_nonfinite=False)
    # torch's fused and foreach forms are for other devices.
    exact = case.make([plain], **({} if case.kind.__name__ == "Lion" else {"foreach": False}))
    for grad in grads:
        ours.grad, plain.grad = torch.tensor(grad), torch.tensor(grad)
        opt.step()
        exact.step()
    forget_compiled()
    return [ours.detach(), plain.detach()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
# Lion's sign of NaN is another one in each form that lion_pytorch has; ours is NaN.
@pytest.mark.parametrize("case", [case for case in CASES if case.rule != "lion"], ids=case_id)
def test_one_element_that_is_not_finite(
    case: Case, bad: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rprop steps by signs, and NaN has none: that element stays, and goes on afterwards."""
    if backend == "aten":
        WithoutCompiler(monkeypatch)
    grads = [[0.5, -1.0, 2.0], [0.5, bad, 1.0], [-0.5, 1.0, 2.0], [0.5, 1.0, -2.0]]
    ours, exact = trained(case, grads, backend)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert ours[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_variance_that_overflows_is_no_zero(
    momentum: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """inf - inf: the step was the gradient divided by eps, on backends whose maximum drops NaN."""
    if backend == "aten":
        WithoutCompiler(monkeypatch)
    options: Any = (("centered", True), ("momentum", momentum), ("eps", 1e-3))
    case = Case("", torch.optim.RMSprop, options)
    ours, exact = trained(case, [[1e25, 1.0], [1.0, 1.0]], backend)
    assert ours[0].isnan() and ours[1].isfinite()
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-5, atol=1e-6)
