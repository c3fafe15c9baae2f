"""An object before the wrapper that derives its class from the wrapper's, as Lightning's does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests.cases import small_model
from tests.tolerances import equal_bits


class StandIn:
    """lightning.pytorch.core.optimizer.LightningOptimizer, reduced to what matters here."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        name = "StandIn" + type(optimizer).__name__
        self.__class__ = type(name, (type(self), type(optimizer)), {})

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def pair(**options: Any) -> tuple[torch.nn.Module, FusedAccumOptimizer, Any]:
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    return model, opt, StandIn(opt)


def backward(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 7, generator=generator)).square().mean().backward()


def test_what_is_asked_and_set_through_it_reaches_the_optimizer() -> None:
    model, opt, stand_in = pair(gradient_accumulation_steps=2)
    assert isinstance(stand_in, FusedAccumOptimizer)
    for i in range(3):
        with stand_in.micro_batch(weight=1 + i):
            backward(model, i)
        stand_in.step()
        stand_in.zero_grad()
        assert stand_in.window_closed is opt.window_closed is (i == 1)
        assert stand_in.micro_batches == opt.micro_batches == [1, 0, 1][i]
    stand_in.flush()
    assert opt.window_closed and stand_in.window_closed
    backward(model)
    stand_in.step()
    assert not stand_in.window_closed
    stand_in.param_groups[0]["lr"] = 0.5
    assert opt.optimizer.param_groups[0]["lr"] == 0.5
    assert stand_in.grad_norm is opt.grad_norm and "window: 2" in repr(stand_in)
    assert set(vars(stand_in)) == {"_optimizer"}


def test_clipping_through_it_clips() -> None:
    """It used to be remembered by the stand-in alone: the update went unclipped."""
    ours, _, stand_in = pair()
    theirs, opt, _ = pair()
    for model, optimizer in ((ours, stand_in), (theirs, opt)):
        backward(model)
        assert optimizer.clip_grad_norm_(1e-3) > 1e-2
        optimizer.step()
    changed = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(equal_bits(a.detach(), b.detach()) for a, b in changed)


def test_a_model_that_moved_is_taken_up_through_it() -> None:
    model, opt, stand_in = pair()
    model.to(torch.bfloat16)
    stand_in.zero_grad()
    model(torch.randn(4, 7, dtype=torch.bfloat16)).square().mean().backward()
    opt.step()
    assert opt.state_dict().keys() == stand_in.state_dict().keys()
    assert stand_in.detach() is opt.optimizer


def test_a_subclass_and_a_mixin_stay_what_they_are() -> None:
    class Noted:
        def note(self) -> str:
            return "noted"

    class Mine(Noted, FusedAccumOptimizer):
        def zero_grad(self, set_to_none: bool = True) -> None:
            self.zeroed = True
            super().zero_grad(set_to_none)

    model = small_model()
    opt = Mine(torch.optim.SGD(model.parameters(), lr=0.1), gradient_accumulation_steps=1)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    opt.step()
    opt.zero_grad()
    assert opt.window_closed and opt.zeroed and opt.note() == "noted"
    assert not all(
        equal_bits(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True)
    )
    with pytest.raises(AttributeError):
        opt.no_such_thing  # noqa: B018
