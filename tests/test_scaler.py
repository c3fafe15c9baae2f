"""torch.amp.GradScaler around the wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from tests.cases import case_id, small_model
from tests.tolerances import equal_bits


def window(model: Any, opt: Any, scaler: Any, xs: list[Tensor], clip: bool, unscale: bool) -> None:
    """The loop of torch's documentation, with the loop owning the window."""
    for x in xs:
        loss = model(x).float().square().mean() / len(xs)
        scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(opt)
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


def inputs(n: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 7, generator=generator).to(dtype) for _ in range(n)]


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


@pytest.mark.parametrize("unscale", [True, False])
def test_where_the_wrapper_counts_it_is_refused(unscale: bool) -> None:
    """It would divide the whole sum by the scale at every micro-batch."""
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(model(inputs(1, torch.float32)[0]).square().mean()).backward()
    if unscale:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="gradient_accumulation_steps=None"):
        scaler.step(opt)
    assert all(equal_bits(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))
    opt.zero_grad()
    for x in inputs(2, torch.float32):
        model(x).square().mean().backward()
        opt.step()
    assert opt.window_closed


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("how", ["max_grad_norm", "clip_grad_norm_"])
def test_the_norm_is_of_the_unscaled_gradient(how: str, unscale: bool) -> None:
    """unscale_ moves no version counter: the sums that the backward left went unnoticed as those
    of the scaled gradient, and clipping was too tight by the scale."""
    ours, exact = small_model(), small_model()
    max_norm = 0.1 if how == "max_grad_norm" else None
    opt = FusedAccumOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1), max_grad_norm=max_norm)
    plain = torch.optim.SGD(exact.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
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
            torch.testing.assert_close(returned, norm if unscale else norm * 64.0)
        scaler.step(opt)
        scaler.update()
        plain.step()
        assert norm > 0.1
        torch.testing.assert_close(opt.grad_norm, norm)
    for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
