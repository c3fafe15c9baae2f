"""Parameters that somebody takes out of the param groups of a wrapped optimizer."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from tests.tolerances import equal_bits

SIZE = 5000


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A warning that no test expects is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def param(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, SIZE, dtype=dtype))


def wrapped(*params: Tensor, n: int | None = None) -> Any:
    groups: Any = [{"params": [p]} for p in params]
    return FusedAccumOptimizer(torch.optim.AdamW(groups, lr=2.0**-6), n)


def train(opt: Any, *params: Tensor, n: int = 1) -> None:
    for i in range(n):
        torch.stack([p.float().mul(i + 1.5).sin().sum() for p in params]).sum().backward()
        opt.step()
        opt.zero_grad()


def replace(opt: Any) -> torch.nn.Parameter:
    """Another parameter in the first group, with the old one's states, as 3D Gaussian splatting
    makes it."""
    group = opt.param_groups[0]
    old = group["params"][0]
    states = opt.state.pop(old)
    new = group["params"][0] = torch.nn.Parameter(old.detach().clone())
    opt.state[new] = states
    return new


def test_parameters_that_were_replaced_are_freed() -> None:
    p, q = param(), param()
    stock_p, stock_q = param(), param()
    stock = torch.optim.AdamW([{"params": [stock_p]}, {"params": [stock_q]}], lr=2.0**-6)
    opt = wrapped(p, q)
    gone = []
    for _ in range(3):
        train(opt, p, q, n=2)
        train(stock, stock_p, stock_q, n=2)
        gone += [weakref.ref(p), weakref.ref(opt.state[p]["exp_avg"])]
        p, stock_p = replace(opt), replace(stock)
    train(opt, p, q)
    train(stock, stock_p, stock_q)
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    torch.testing.assert_close(p, stock_p)
    torch.testing.assert_close(q, stock_q)


def test_a_group_that_returns_has_its_states_and_its_master() -> None:
    p, q = param(torch.bfloat16), param(torch.bfloat16)
    opt = wrapped(p, q)
    train(opt, p, q, n=3)
    before = opt.state_dict()["state"][0]["master_param"].clone()
    assert not torch.equal(before, p.detach().float())
    group = opt.param_groups.pop(0)
    p.requires_grad_(False)
    train(opt, q, n=2)
    opt.param_groups.insert(0, group)
    p.requires_grad_(True)
    assert equal_bits(opt.state_dict()["state"][0]["master_param"], before)
    train(opt, p, q)
    assert int(opt.state[p]["step"]) == 4 and int(opt.state[q]["step"]) == 6


@pytest.mark.parametrize("n", [None, 2])
def test_one_that_goes_on_getting_gradients_is_told(n: int | None) -> None:
    p, q = param(), param()
    opt = wrapped(p, q, n=n)
    train(opt, p, q, n=2)
    opt.param_groups.pop(0)
    with pytest.warns(RuntimeWarning, match="taken out of the param groups.*opt.state.pop"):
        train(opt, p, q, n=4)
    train(opt, p, q, n=2)  # once


@pytest.mark.parametrize("n", [None, 2])
@pytest.mark.parametrize("kind", ["plain", "wrapped"])
def test_another_optimizer_may_have_one_whose_states_are_gone_too(n: int | None, kind: str) -> None:
    """The remedy of that warning."""
    params = [param(), param()]
    stock = torch.optim.SGD([params[0]], lr=2.0**-10)
    p, q = param(), param()
    opt = wrapped(p, q, n=n)
    opt.param_groups.pop(0)
    opt.state.pop(p, None)
    opt.zero_grad()
    other: Any = torch.optim.SGD([p], lr=2.0**-10)
    if kind == "wrapped":
        other = FusedAccumOptimizer(other)
    for i in range(6):
        for one in (p, params[0]):
            (one * (i + 1.0)).square().sum().backward()
        (q * 2.0).square().sum().backward()
        opt.step()
        opt.zero_grad()
        if i % 3 == 2:
            for optimizer in (other, stock):
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(p, params[0])
