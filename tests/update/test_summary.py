"""The line in the log at the first update: what it says, once, and only where somebody listens."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from fusedaccum.update import summary

WIDTH, LAYERS = 64, 3  # no padding between tensors of 64 * 64


def train(
    make: Any, dtype: torch.dtype = torch.bfloat16, updates: int = 2, **options: Any
) -> FusedAccumOptimizer:
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*layers).to(dtype)
    opt = FusedAccumOptimizer(make(model.parameters()), 1, **options)
    for _ in range(updates):
        model(torch.ones(1, WIDTH, dtype=dtype)).float().square().mean().backward()
        opt.step()
        opt.zero_grad()
    return opt


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(r.name == "fusedaccum" and r.levelno == logging.INFO for r in caplog.records)
    return [record.getMessage() for record in caplog.records]


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fusedaccum"):
        opt = train(torch.optim.AdamW, updates=1)
        expected = (
            "FusedAccumOptimizer(AdamW): 3 tensors, 12,288 parameters on cpu; backend torch; "
            "group 0: fused rule 'adam'; 16 bytes per parameter (2 of parameters, 4 of "
            "accumulators, 2 of masters, 8 of states); 1 process"
        )
        assert lines(caplog) == [expected]
        for param in opt.param_groups[0]["params"]:
            param.sum().backward()
        opt.step()
        assert lines(caplog) == [expected]


def test_it_costs_nothing_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own default is WARNING."""

    def refuse(*_: Any) -> str:
        raise AssertionError("the line was made for nobody")

    monkeypatch.setattr(summary, "summary", refuse)
    assert not summary.LOGGER.isEnabledFor(logging.INFO)
    train(torch.optim.AdamW)
    summary.LOGGER.setLevel(logging.INFO)
    try:
        with pytest.raises(AssertionError, match="for nobody"):
            train(torch.optim.AdamW)  # the negative control
    finally:
        summary.LOGGER.setLevel(logging.NOTSET)


def plain_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def adagrad(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(params)


class Own(torch.optim.AdamW):
    """A subclass has no fused rule."""


@pytest.mark.parametrize(
    ("make", "dtype", "options", "kept"),
    [
        (plain_sgd, torch.float32, {}, (4, 4, 0, 0)),
        (plain_sgd, torch.bfloat16, {"master_weights": "none"}, (2, 4, 0, 0)),
        (adagrad, torch.float16, {}, (2, 4, 4, 4)),
        (torch.optim.AdamW, torch.bfloat16, {"master_weights": "fp32"}, (2, 4, 4, 8)),
        (Own, torch.bfloat16, {}, (2, 4, 4, 8)),
    ],
    ids=["sgd-fp32", "sgd-bf16-none", "adagrad-fp16", "adamw-bf16-fp32", "wrapped-bf16"],
)
def test_bytes_are_counted(
    make: Any, dtype: torch.dtype, options: Any, kept: tuple[int, ...]
) -> None:
    opt = train(make, dtype, **options)
    n = LAYERS * WIDTH * WIDTH
    assert tuple(summary.bytes_of(opt._core.updater).values()) == tuple(n * b for b in kept)
    # All of it, and nothing else, is in the flat buffers and the parameters.
    slots = opt._core.collector.slots.values()
    flats = {id(t): t for slot in slots for t in slot.block._flats.values()}
    held = sum(t.nbytes for t in flats.values()) + sum(slot.nbytes for slot in slots)
    if make is not Own:
        assert held == n * sum(kept)


def test_paths_of_groups(caplog: pytest.LogCaptureFixture) -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(7)]
    groups = [{"params": [p]} for p in params]
    with caplog.at_level(logging.INFO, "fusedaccum"):
        for inner in (Own(groups[:2]), torch.optim.SGD(groups, lr=0.1)):
            opt = FusedAccumOptimizer(inner)
            sum(p.sum() for p in params).backward()
            opt.step()
            assert "; 1 tensor, 2 parameters: 1 float32" in repr(opt)
            opt.detach()
    first, second = lines(caplog)
    assert "; groups 0, 1: native step on fp32 gradients (Own is a subclass of AdamW" in first
    assert "; groups 0, 1, 2, 3 and 3 more: fused rule 'sgd'; 8 bytes" in second
