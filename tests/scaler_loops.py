"""Loops around torch.amp.GradScaler, and what they must come to, for the tests of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer


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


def wrap(model: Any, steps: int | None, scaler: Any, **options: Any) -> FusedAccumOptimizer:
    kind = options.pop("kind", torch.optim.SGD)
    inner = kind(model.parameters(), lr=options.pop("lr", 0.1))
    return FusedAccumOptimizer(inner, steps, grad_scaler=scaler, **options)


def micro_batches(model: Any, opt: Any, scaler: Any, xs: list[Tensor], unscale: bool) -> None:
    """torch's stock loop around one micro-batch each; the wrapper counts the window."""
    for x in xs:
        scaler.scale(model(x).float().square().mean()).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()


def exactly(model: Any, xs: list[Tensor], n: int, clip: float | None = None) -> None:
    """The same windows by plain torch in fp32."""
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    for start in range(0, len(xs), n):
        for x in xs[start : start + n]:
            (model(x.float()).square().mean() / n).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        plain.step()
        plain.zero_grad()


def assert_close(ours: Any, exact: Any, tolerance: float) -> None:
    for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q, rtol=tolerance, atol=tolerance)


# fp32: rounding of the windows; fp16: forward and backward are in fp16.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}
