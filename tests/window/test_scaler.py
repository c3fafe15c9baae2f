"""torch.amp.GradScaler around the wrapper, where the loop owns the window."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests.cases import case_id, small_model
from tests.scaler_loops import (
    TOLERANCES,
    assert_close,
    exactly,
    inputs,
    window,
    wrap,
)
from tests.tolerances import equal_bits


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no-clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=case_id)
def test_the_stock_loop(dtype: torch.dtype, clip: bool) -> None:
    """fp16 parameters too: their accumulators are fp32, so unscale_ takes them."""
    ours, exact = small_model(dtype), small_model(dtype).float()
    opt = FusedAccumOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1))
    plain = torch.optim.SGD(exact.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for start in range(0, 12, 4):
        xs = inputs(12, dtype)[start : start + 4]
        window(ours, opt, scaler, xs, clip, unscale=clip)
        for x in xs:
            (exact(x.float()).square().mean() / 4).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(exact.parameters(), 0.1)
        plain.step()
        plain.zero_grad()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("unscale", [True, False])
def test_overflow_skips_the_window_and_lowers_the_scale(unscale: bool) -> None:
    model = small_model(torch.float16)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    xs = inputs(4, torch.float16)
    window(model, opt, scaler, xs, False, unscale)
    before = [p.detach().clone() for p in model.parameters()]
    bad = [*xs[:3], xs[3] * float("inf")]
    window(model, opt, scaler, bad, False, unscale)
    assert scaler.get_scale() == 32.0
    assert all(equal_bits(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))
    assert float(opt.state[next(model.parameters())]["step"]) == 1
    window(model, opt, scaler, xs, False, unscale)
    assert float(opt.state[next(model.parameters())]["step"]) == 2


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "fused-unscale"])
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no-clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=case_id)
def test_the_loop_owns_the_window_without_a_pass(
    dtype: torch.dtype, clip: bool, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, exact = small_model(dtype), small_model(dtype).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = wrap(ours, None, scaler if linked else None, fused_unscale=not linked)
    passes: list[int] = []
    backend = opt._core.collector.backend
    stock = backend.sum_of_squares
    monkeypatch.setattr(backend, "sum_of_squares", lambda *a: (passes.append(1), stock(*a)))
    xs = inputs(12, dtype)
    for start in range(0, 12, 4):
        window(ours, opt, scaler, xs[start : start + 4], clip, unscale=clip)
    exactly(exact, xs, 4, clip=0.1 if clip else None)
    assert_close(ours, exact, TOLERANCES[dtype])
    assert bool(passes) is clip  # torch's clip_grad_norm_ writes p.grad, nothing else does
    window(ours, opt, scaler, [xs[0] * float("nan")], clip, unscale=clip)
    assert int(opt.skipped_steps) == 1 and scaler.get_scale() == 32.0


def test_a_step_that_raised_leaves_no_scale_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """GradScaler would multiply its next scale with what it finds."""
    ours, exact = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = wrap(ours, None, None, fused_unscale=True)
    (x,) = inputs(1, torch.float32)
    scaler.scale(ours(x).square().mean()).backward()

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(opt._core.updater, "prepare", fail)
        with pytest.raises(MemoryError):
            scaler.step(opt)
    scaler.step(opt)
    exactly(exact, [x], 1)
    assert_close(ours, exact, TOLERANCES[torch.float32])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"grad_scaler": 64.0}, "must be a torch.amp.GradScaler or None, got float"),
        ({"fused_unscale": 1}, "fused_unscale must be True or False, got 1"),
        ({"fused_unscale": True, "gradient_accumulation_steps": 2}, "is for gradient_acc"),
        (
            {"fused_unscale": True, "grad_scaler": torch.amp.GradScaler("cpu")},
            "grad_scaler=GradScaler",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], says: str) -> None:
    inner = torch.optim.SGD(small_model().parameters())
    with pytest.raises((TypeError, ValueError), match=says):
        FusedAccumOptimizer(inner, **options)


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("how", ["max_grad_norm", "clip_grad_norm_"])
@pytest.mark.parametrize("mode", ["stock", "fused-unscale", "linked"])
def test_the_norm_is_of_the_unscaled_gradient(mode: str, how: str, unscale: bool) -> None:
    """unscale_ moves no version counter: the sums that the backward left went unnoticed as those
    of the scaled gradient, and clipping was too tight by the scale."""
    ours, exact = small_model(), small_model()
    max_norm = 0.1 if how == "max_grad_norm" else None
    plain = torch.optim.SGD(exact.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = FusedAccumOptimizer(
        torch.optim.SGD(ours.parameters(), lr=0.1),
        max_grad_norm=max_norm,
        grad_scaler=scaler if mode == "linked" else None,
        fused_unscale=mode == "fused-unscale",
    )
    for x in inputs(3, torch.float32):
        opt.zero_grad()
        plain.zero_grad()
        scaler.scale(ours(x).square().mean()).backward()
        exact(x).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(exact.parameters(), 0.1)
        if unscale:
            scaler.unscale_(opt)
        if how == "clip_grad_norm_":
            returned = opt.clip_grad_norm_(0.1)
            is_unscaled = unscale or mode == "linked"
            torch.testing.assert_close(returned, norm if is_unscaled else norm * 64.0)
        scaler.step(opt)
        scaler.update()
        plain.step()
        assert norm > 0.1
        torch.testing.assert_close(opt.grad_norm, norm)
    for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
