"""What only Lightning has; what it shares with other frameworks is in test_framework_laws.py.

Lightning divides the loss itself and decides when a window ends, so the wrapper leaves both to it
(`gradient_accumulation_steps=None`). The last micro-batch's forward and backward run inside
`step(closure)`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch.plugins import MixedPrecision

from fusedaccum import FusedAccumOptimizer
from tests.lightning_module import (
    Make,
    Module,
    adamw,
    curve_distance,
    fit,
    loader,
    sgd,
    trainer,
    wrapped,
)
from tests.tolerances import U, equal_bits

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and the like


def fp16_plugin(scale: float = 1024.0) -> MixedPrecision:
    """What precision="16-mixed" is on a GPU; on a CPU Lightning takes it as a plugin only."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize("form", ["optimizer", "two lists", "scheduler dict"])
def test_schedulers_and_counters_advance_per_update(form: str) -> None:
    plain, ours = Module(adamw, form), Module(wrapped(adamw), form)
    trainers = [fit(plain, 4, updates=12), fit(ours, 4, updates=12)]
    assert [t.global_step for t in trainers] == [12, 12]
    assert ours.rates == plain.rates
    assert len(set(ours.rates)) == (1 if form == "optimizer" else 12)
    if form != "optimizer":
        assert [t.lr_scheduler_configs[0].scheduler.last_epoch for t in trainers] == [12, 12]
    assert isinstance(trainers[1].optimizers[0], FusedAccumOptimizer)
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_lightning_clips_the_accumulator(algorithm: str) -> None:
    """It multiplies, or clamps, `p.grad` in place: that is what the update takes."""
    limit = 0.3 if algorithm == "norm" else 0.05
    options = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    plain, ours = Module(sgd), Module(wrapped(sgd))
    for module in (plain, ours):
        fit(module, 4, updates=12, **options)
        norms = [float(torch.nn.utils.get_total_norm(module.grad_before_clipping))]
        assert norms[-1] > module.norms[-1] > 0  # it did clip
    # fp32 against fp32 over 12 updates: 12 times some ten roundings.
    torch.testing.assert_close(ours.norms, plain.norms, rtol=128 * U, atol=0)
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-5, atol=1e-6)
    unclipped = Module(wrapped(sgd))
    fit(unclipped, 4, updates=12)
    assert curve_distance(unclipped, plain) > 1e-2


class ClippedInTheStep(Module):
    """Clipping without a pass over the gradients."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        optimizer.clip_grad_norm_(gradient_clip_val)


@pytest.mark.parametrize("how", ["max_grad_norm", "configure_gradient_clipping"])
def test_clipping_inside_the_step_is_the_same(how: str) -> None:
    plain = Module(sgd)
    fit(plain, 4, updates=12, gradient_clip_val=0.3)
    if how == "max_grad_norm":
        ours = Module(wrapped(sgd, max_grad_norm=0.3))
        fit(ours, 4, updates=12)
    else:
        ours = ClippedInTheStep(wrapped(sgd))
        fit(ours, 4, updates=12, gradient_clip_val=0.3)
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 4])
def test_fp16_autocast(n: int) -> None:
    """fp32 parameters, autocast, and a GradScaler that unscales `p.grad`.

    The first gradient is Lightning's own to the bit. After it a last-bit difference of a weight may
    flip a rounding of the forward: the runs stay far closer than that precision is to fp32.
    """
    full, plain, ours = Module(adamw), Module(adamw), Module(wrapped(adamw))
    fit(full, n, updates=20)
    for module in (plain, ours):
        fit(module, n, updates=20, plugins=[fp16_plugin()])
    assert all(equal_bits(a, b) for a, b in zip(ours.first, plain.first, strict=True))
    assert not all(equal_bits(a, b) for a, b in zip(ours.first, full.first, strict=True))
    assert curve_distance(ours, plain) < curve_distance(plain, full) / 2
    assert curve_distance(ours, plain) < 5e-3


def fused_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, fused=True)


@pytest.mark.parametrize("clip", [None, 0.3], ids=["issue-15501", "issue-21435-clip"])
def test_a_fused_optimizer_under_fp16_amp(clip: float | None) -> None:
    """A fused AdamW unscales in its own step. Lightning first unscaled it twice (#15501) and now
    refuses to clip it (#21435). Wrapped it is any optimizer: unscaled once, and clipped."""

    def run(make: Make) -> Module:
        module = Module(make)
        fit(module, 4, updates=12, plugins=[fp16_plugin()], gradient_clip_val=clip)
        return module

    if clip is not None:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            run(fused_adamw)
    ours, plain = run(wrapped(fused_adamw)), run(adamw)
    if clip is not None:
        assert max(ours.norms) <= clip * (1 + 8 * U)
    assert all(equal_bits(a, b) for a, b in zip(ours.first, plain.first, strict=True))
    # What a flipped rounding of the forward may do, see test_fp16_autocast.
    assert curve_distance(ours, plain) < 5e-3


def test_an_overflow_under_fp16_amp_skips_the_update() -> None:
    """A scale that overflows fp16: both runs skip the same updates, then go on together."""
    plain, ours = Module(adamw), Module(wrapped(adamw))
    scales = []
    for module in (plain, ours):
        plugin = fp16_plugin(2.0**24)
        fit(module, 4, updates=12, plugins=[plugin])
        scales.append(plugin.scaler.get_scale())
    assert scales[0] == scales[1] < 2.0**24
    assert curve_distance(ours, plain) < 5e-3


def test_validation_between_windows_and_unused_parameters() -> None:
    """Lightning calls `zero_grad()` on the module before it validates, and not inside a window."""

    class Validated(Module):
        def __init__(self, make: Make) -> None:
            super().__init__(make)
            self.unused = torch.nn.Linear(3, 3)

        def parameters(self, recurse: bool = True) -> Any:
            return self.net.parameters(recurse)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

    plain, ours = Validated(adamw), Validated(wrapped(adamw))
    for module in (plain, ours):
        made = trainer(
            max_epochs=2, accumulate_grad_batches=4, val_check_interval=3, limit_val_batches=1
        )
        made.fit(module, loader(), loader())
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-5, atol=1e-6)
