"""DeepSpeed, and engines of any name, take the optimizer over: refused before anything is lost.

Modules of DeepSpeed's names stand in for it; `make deepspeed` runs the installed one.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedaccum import FusedAccumOptimizer
from tests.cases import small_model

_ENGINE = """
class DeepSpeedEngine(__import__("torch").nn.Module):
    def __init__(self, model, optimizer, zero):
        super().__init__()
        self.module = model
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
        self.optimizer = optimizer if zero is None else zero(optimizer)
"""
# What ZeRO does to a client optimizer: flat fp32 partitions take the parameters' place.
_ZERO = """
import torch

class DeepSpeedZeroOptimizer:
    def __init__(self, optimizer):
        self.optimizer, self.params = optimizer, []
        for group in optimizer.param_groups:
            self.params += group["params"]
            flat = torch.cat([p.detach().flatten().float() for p in group["params"]])
            group["params"] = [torch.nn.Parameter(flat)]

    def step(self):
        flat = self.optimizer.param_groups[0]["params"][0]
        flat.grad = torch.cat([p.grad.flatten().float() for p in self.params])
        self.optimizer.step()
        sizes = [p.numel() for p in self.params]
        for p, part in zip(self.params, flat.detach().split(sizes)):
            p.data.copy_(part.view_as(p))
"""


def _module(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> Any:
    """A module made of `text`, as if it were installed."""
    module = ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    return _module(monkeypatch, "deepspeed.runtime.engine", _ENGINE).DeepSpeedEngine


@pytest.fixture
def zero(monkeypatch: pytest.MonkeyPatch) -> Any:
    return _module(
        monkeypatch, "deepspeed.runtime.zero.stage_1_and_2", _ZERO
    ).DeepSpeedZeroOptimizer


def _unchanged_and_usable(model: nn.Module, opt: FusedAccumOptimizer, before: list[Tensor]) -> None:
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for _ in range(opt.gradient_accumulation_steps or 1):
        sum(p.sum() for p in model.parameters()).backward()
        opt.step()
    assert all(torch.equal(p, b - 0.5) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("steps", [None, 2])
def test_zero_is_refused_as_it_starts(engine: Any, zero: Any, steps: int | None) -> None:
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), steps)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"DeepSpeed.*detach\(\).*grad_accum_dtype"):
        engine(model, opt, zero)
    _unchanged_and_usable(model, opt, before)


def test_stage_0_is_refused_where_two_count(engine: Any) -> None:
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), 2)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"steps=2\) counts.*DeepSpeed.*steps=None"):
        engine(model, opt, None)
    _unchanged_and_usable(model, opt, before)


def test_stage_0_is_served_where_deepspeed_counts(engine: Any) -> None:
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    before = [p.detach().clone() for p in model.parameters()]
    assert engine(model, opt, None).optimizer is opt
    _unchanged_and_usable(model, opt, before)


def test_offload_of_accelerate_is_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes an optimizer of its own of our param groups, and drops ours."""
    text = "def map_pytorch_optim_to_deepspeed(optimizer):\n    return list(optimizer.param_groups)"
    module = _module(monkeypatch, "accelerate.utils.deepspeed", text)
    opt = FusedAccumOptimizer(torch.optim.SGD(small_model().parameters(), lr=0.5))
    with pytest.raises(RuntimeError, match=r"DeepSpeed.*detach\(\)"):
        module.map_pytorch_optim_to_deepspeed(opt)


def test_a_loop_that_replaces_its_parameters_reads_first_what_it_has_to_do() -> None:
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    params = list(model.parameters())
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt.param_groups[0]["params"] = others
    with pytest.raises(RuntimeError, match=r"If your code replaces .*detach\(\).*DeepSpeed's ZeRO"):
        opt.step()
    opt.param_groups[0]["params"] = params
    opt.zero_grad()
    inner = opt.detach()
    inner.param_groups[0]["params"] = others
    again = FusedAccumOptimizer(inner)
    others[0].sum().backward()
    again.step()
    assert torch.equal(others[0], params[0] - 0.5)


@pytest.mark.parametrize("inner", [False, True], ids=["wrapper", "wrapped"])
def test_an_engine_of_any_name_that_exchanges_parameters(
    monkeypatch: pytest.MonkeyPatch, inner: bool
) -> None:
    zero = _module(monkeypatch, "shardlib", _ZERO).DeepSpeedZeroOptimizer
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    params, before = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    sharded = zero(opt.optimizer if inner else opt)
    for call in (lambda: sum(p.sum() for p in params).backward(), opt.step):
        with pytest.raises(RuntimeError, match=r"replaced in param_groups.*detach\(\)"):
            call()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert sharded.params == params
    opt.param_groups[0]["params"] = params
    opt.zero_grad()
    _unchanged_and_usable(model, opt, before)


def test_the_schedule_of_deepspeed_may_read_param_groups(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "def rates(optimizer):\n    return [g['lr'] for g in optimizer.param_groups]"
    schedules = _module(monkeypatch, "deepspeed.runtime.lr_schedules", text)
    opt = FusedAccumOptimizer(torch.optim.SGD(small_model().parameters(), lr=0.5), 2)
    assert schedules.rates(opt) == [0.5]


def test_a_partition_of_zero_3() -> None:
    param = nn.Parameter(torch.ones(3))
    param.ds_id = 0  # type: ignore[attr-defined]  # as deepspeed.zero.Init marks them
    with pytest.raises(TypeError, match=r"ZeRO-3.*detach\(\)"):
        FusedAccumOptimizer(torch.optim.SGD([param], lr=0.1))
