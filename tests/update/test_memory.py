"""Bytes per parameter, counted: 16 and one bucket for bf16 with AdamW."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import LiveBytes
from fusedaccum import FusedAccumOptimizer

WIDTH, LAYERS, N = 256, 16, 4
GRADIENT = 2 * WIDTH * WIDTH


def model(device: str = "cpu") -> torch.nn.Sequential:
    """All parameters and hardly any activations."""
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    return torch.nn.Sequential(*layers).to(device, torch.bfloat16)


def train(net: torch.nn.Module, opt: torch.optim.Optimizer, windows: int, device: str) -> None:
    width = next(net.parameters()).shape[1]
    x = torch.randn(1, width, dtype=torch.bfloat16, device=device)
    for _ in range(windows * N):
        net(x).float().square().mean().backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("bucket", [4 * GRADIENT, 1000 * GRADIENT], ids=["small", "whole-model"])
@pytest.mark.parametrize("owner", [N, None], ids=["wrapper", "loop"])
def test_peak_of_a_window(bucket: int, owner: int | None) -> None:
    net = model()
    n_params = sum(p.numel() for p in net.parameters())
    opt = FusedAccumOptimizer(
        torch.optim.AdamW(net.parameters()), owner, max_grad_norm=1.0, bucket_cap_mb=bucket / 2**20
    )
    with LiveBytes(net.parameters()) as counted:
        train(net, opt, 3, "cpu")
    activations = 2 * (LAYERS + 8) * WIDTH * 4
    fresh = min(bucket, 2 * n_params)
    tables = 64 * 1024
    assert counted.peak <= 16 * n_params + fresh + activations + tables
    # The negative control of the counting: nothing less than the sixteen bytes is possible.
    assert counted.peak >= 16 * n_params


def test_plain_fp32_training_takes_more() -> None:
    """The same precision the usual way, by the same count: 18 to 20 bytes."""
    net = model()
    n_params = sum(p.numel() for p in net.parameters())
    with LiveBytes(net.parameters()) as counted:
        masters = [p.detach().float() for p in net.parameters()]
        opt = torch.optim.AdamW(masters)
        for p, m in zip(net.parameters(), masters, strict=True):
            p.grad_dtype = None
            p.grad = torch.zeros_like(m)
            m.grad = p.grad
        x = torch.randn(1, WIDTH, dtype=torch.bfloat16)
        for _ in range(2):
            net(x).float().square().mean().backward()
            opt.step()
            with torch.no_grad():
                torch._foreach_copy_(list(net.parameters()), masters)
            torch._foreach_zero_([p.grad for p in net.parameters()])
    assert counted.peak > 18 * n_params


@pytest.mark.gpu
def test_peak_of_a_window_on_a_gpu() -> None:
    device, width = "cuda", 2048
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(8)]
    # cuBLAS takes its workspaces now: that of this thread, and that of the backward's.
    warm = torch.randn(256, 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    (warm @ warm).sum().backward()
    del warm
    before = torch.cuda.memory_allocated()
    net = torch.nn.Sequential(*layers).to(device, torch.bfloat16)
    n_params = sum(p.numel() for p in net.parameters())
    bucket = 4 * 2 * width * width
    opt = FusedAccumOptimizer(
        torch.optim.AdamW(net.parameters()), N, max_grad_norm=1.0, bucket_cap_mb=bucket / 2**20
    )
    train(net, opt, 1, device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    train(net, opt, 2, device)
    small_things = 4 * 2**20
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 16 * n_params + bucket + small_things
