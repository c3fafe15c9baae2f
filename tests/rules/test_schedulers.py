"""Every torch scheduler drives the wrapper as it drives the optimizer alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as lrs

from fusedaccum import FusedAccumOptimizer
from tests.cases import Gradients

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.ConstantLR(o, 0.1, 2), lrs.ExponentialLR(o, 0.9)], [2]
    ),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 6),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.1, 2), lrs.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=10),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 2),
}


def test_all_of_torchs_schedulers_are_here() -> None:
    own = {name for name in lrs.__all__ if name not in ("LRScheduler", "_LRScheduler")}
    assert own == set(SCHEDULERS)


@pytest.mark.parametrize("on", ["the wrapper", "the wrapped"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name: str, on: str) -> None:
    ours, theirs = Gradients([torch.ones(5)]), Gradients([torch.ones(5)])
    inner, plain = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5) for m in (ours, theirs))
    opt = FusedAccumOptimizer(inner, 2)
    with warnings.catch_warnings():
        # What torch itself has to say of a scheduler, it says of both.
        warnings.filterwarnings("ignore", message=".*epoch parameter.*")
        warnings.filterwarnings("error", message=".*before `optimizer.step.*")
        schedules = [SCHEDULERS[name](opt if on == "the wrapper" else inner)]
        schedules.append(SCHEDULERS[name](plain))
        for update in range(6):
            for _ in range(2):
                ours.backward([torch.full((5,), 1.0 + update)])
                opt.step()
                opt.zero_grad()
            theirs.backward([torch.full((5,), 1.0 + update)])
            plain.step()
            plain.zero_grad()
            assert opt.window_closed
            for schedule in schedules:
                schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            assert opt.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
            assert opt.param_groups[0]["momentum"] == plain.param_groups[0]["momentum"]
    torch.testing.assert_close(ours.params[0], theirs.params[0], rtol=1e-6, atol=1e-7)
