"""Lightning: partial windows, weights, manual optimization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning")

from lightning.pytorch.plugins import MixedPrecision

from fusedaccum import FusedAccumOptimizer
from tests.lightning_module import (
    MICRO_BATCHES,
    Counted,
    Make,
    Manual,
    Module,
    N,
    adamw,
    curve_distance,
    fit,
    loader,
    sgd,
    trainer,
    wrapped,
)
from tests.tolerances import mean_bound

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and the like


def still(params: Any) -> torch.optim.Optimizer:
    """The weights stand still; after the first update the momentum is that update's gradient."""
    return torch.optim.SGD(params, lr=0.0, momentum=0.9)


def first_update(module: Module) -> list[Tensor]:
    state = module.trainer.optimizers[0].state
    return [state[p]["momentum_buffer"] for p in module.net.parameters()]


def is_mean(module: Module, weights: list[float]) -> bool:
    """Whether the first update took the weighted mean, as fp32 allows."""
    parameters = [*module.net.parameters()]
    micro = [
        torch.autograd.grad(module.loss(batch), parameters)
        for batch, _ in zip(loader(), weights, strict=False)
    ]
    for mean, *gradients in zip(first_update(module), *micro, strict=True):
        shares = [w / sum(weights) for w in weights]
        terms = torch.stack([s * g.double() for s, g in zip(shares, gradients, strict=True)])
        bound = mean_bound(terms.abs().sum(0), len(weights))
        if not bool(((mean.double() - terms.sum(0)).abs() <= bound).all()):
            return False
    return True


class Weighted(Module):
    """Automatic optimization with weights: `backward` is all that it takes."""

    weights = [1.0] * MICRO_BATCHES

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.weight = self.weights[batch_idx]
        return self.loss(batch)

    def backward(self, loss: Tensor) -> None:
        with self.optimizers().micro_batch(weight=self.weight):
            (loss * self.trainer.accumulate_grad_batches).backward()


@pytest.mark.parametrize("count", [2, 4], ids=["partial", "full"])
def test_issue_19987_a_partial_window_is_divided_by_what_arrived(count: int) -> None:
    """Lightning itself divides by N: test_framework_laws.py."""
    ours = Weighted(wrapped(still))
    fit(ours, N, updates=1, micro_batches=count)
    assert is_mean(ours, [1.0] * count)


@pytest.mark.parametrize("count", [3, 4], ids=["partial", "full"])
def test_token_weights_in_automatic_optimization(count: int) -> None:
    ours = Weighted(wrapped(still))
    ours.weights = [3.0, 1.0, 17.0, 5.0]
    fit(ours, N, updates=1, micro_batches=count)
    assert is_mean(ours, ours.weights[:count])
    assert not is_mean(ours, [1.0] * count)


def test_a_weighted_window_is_clipped_by_the_wrapper() -> None:
    """`p.grad` is there the mean up to a factor, so `gradient_clip_val` would be off by it."""
    ours, exact = Weighted(wrapped(sgd, max_grad_norm=0.3)), Module(sgd)
    fit(ours, N, updates=12, micro_batches=16)
    fit(exact, N, updates=12, micro_batches=16, gradient_clip_val=0.3)
    torch.testing.assert_close(ours.losses, exact.losses, rtol=1e-5, atol=1e-6)
    off = Weighted(wrapped(sgd))
    fit(off, N, updates=12, micro_batches=16, gradient_clip_val=0.3)
    assert curve_distance(off, exact) > 1e-2


@pytest.mark.parametrize("micro_batches", [16, 18], ids=["whole-windows", "partial-last"])
def test_manual_optimization(micro_batches: int) -> None:
    plain, looped = Manual(adamw), Manual(wrapped(adamw))
    counted = Counted(wrapped(adamw, gradient_accumulation_steps=N))
    for module in (plain, looped, counted):
        made = trainer(max_epochs=3)
        made.fit(module, loader(micro_batches))
        # Lightning counts calls of step(), those that only close a micro-batch too.
        updates = 3 * -(-micro_batches // N)
        assert made.global_step == (3 * micro_batches if module is counted else updates)
    assert looped.rates == plain.rates == counted.rates and len(plain.rates) == updates
    torch.testing.assert_close(looped.losses, plain.losses, rtol=1e-5, atol=1e-6)
    # In a partial window the hand-written loop does what the issue complains of. Adam does not mind
    # the gradient's scale, only its scale against that of the windows before.
    same = curve_distance(counted, plain) < 1e-5
    assert same is (micro_batches == 16)


class ManualWeighted(Counted):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt = self.optimizers()
        with opt.micro_batch(weight=1.0 + batch_idx):
            self.manual_backward(self.loss(batch))
        opt.clip_grad_norm_(1e9)
        opt.step()
        opt.zero_grad()


def test_manual_optimization_with_weights() -> None:
    ours = ManualWeighted(wrapped(still, gradient_accumulation_steps=N))
    trainer(max_epochs=1).fit(ours, loader(N))
    assert is_mean(ours, [1.0, 2.0, 3.0, 4.0])
    assert not is_mean(ours, [1.0] * N)


class ManualClipped(Manual):
    """Clips through the LightningOptimizer that `self.optimizers()` gives."""

    clips = True

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(batch))
        if isinstance(opt, FusedAccumOptimizer):
            opt.clip_grad_norm_(0.3)
        elif self.clips:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.3)
        opt.step()


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_manual_clipping(precision: str) -> None:
    """Under a GradScaler too, although Lightning unscales only inside step(): the clipping is part
    of the update. (Clipped by hand before step(), gradients are still scaled, as in
    pytorch-lightning#9694.)"""
    ours, exact, unclipped = (ManualClipped(m) for m in (wrapped(sgd), sgd, sgd))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    amp = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    fit(ours, updates=12, **(amp if precision == "16-mixed" else {}))
    fit(exact, updates=12)
    unclipped.clips = False
    fit(unclipped, updates=12)
    # fp16's own rounding, u = 2**-11, in forward and backward of 12 updates.
    bound = 1e-5 if precision == "32-true" else 12 * 4 * 2.0**-11
    assert curve_distance(ours, exact) < bound < curve_distance(unclipped, exact)


class TwoPlayers(Module):
    """Two optimizers in turn, each with the other's parameters frozen, as a GAN is trained."""

    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for opt, sign in zip(self.optimizers(), (1.0, -0.1), strict=True):
            self.toggle_optimizer(opt)
            self.manual_backward(sign * self.loss(batch) / 2)
            if batch_idx % 2:
                opt.step()
                opt.zero_grad()
            self.untoggle_optimizer(opt)

    def configure_optimizers(self) -> Any:
        return [self.make(self.net[0].parameters()), self.make(self.net[2].parameters())]


def test_two_optimizers_in_turn() -> None:
    plain, ours = TwoPlayers(adamw), TwoPlayers(wrapped(adamw))
    for module in (plain, ours):
        trainer(max_epochs=2).fit(module, loader())
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-5, atol=1e-6)
    alone = TwoPlayers(wrapped(adamw))
    alone.configure_optimizers = lambda: [  # type: ignore[method-assign]
        alone.make(alone.net[0].parameters()),
        wrapped(still)(alone.net[2].parameters()),
    ]
    trainer(max_epochs=2).fit(alone, loader())
    assert curve_distance(alone, plain) > 1e-2
